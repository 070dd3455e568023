"""Diffusers folders: what is kept, what is rewritten, and what must not be handed on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from imma_cli.checkpoints import WriteReport, open_checkpoint
from imma_cli.checkpoints import writing as writing_module
from imma_cli.errors import ImmaError
from imma_cli.families.model import Model

NAME = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def harden(folder: Path, model: Model, output: Path, **options: Any) -> WriteReport:
    changed = {f"unet.{NAME}": model.unet.state_dict()[NAME] + 0.5}
    return open_checkpoint(folder).write(output, changed, {"seed": 1}, **options)


def test_only_the_changed_parts_file_differs(folder: Path, tiny_model: Model, tmp_path: Path) -> None:
    report = harden(folder, tiny_model, tmp_path / "out")
    before, after = contents(folder), contents(tmp_path / "out")
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == [weights]
    old, new = load_file(folder / weights), load_file(tmp_path / "out" / weights)
    assert [name for name in old if not torch.equal(old[name], new[name])] == [NAME]
    assert (report.tensors, report.dropped) == (1, ())
    assert open_checkpoint(tmp_path / "out").provenance == {"seed": 1}


def test_the_written_folder_loads_in_plain_diffusers(folder: Path, tiny_model: Model, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    harden(folder, tiny_model, tmp_path / "out")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.float32)
    assert torch.equal(pipeline.unet.state_dict()[NAME], (tiny_model.unet.state_dict()[NAME] + 0.5).half().float())


def test_a_folder_and_a_file_hold_the_same_model(tiny_folder: Path, tiny_model: Model) -> None:
    loaded = open_checkpoint(tiny_folder).load()
    for part, network in loaded.networks.items():
        expected = tiny_model.networks[part].state_dict()
        assert all(torch.equal(weight, expected[name]) for name, weight in network.state_dict().items()), part
    assert loaded.family.encode_prompts(loaded, ["a cat"]).equal(
        tiny_model.family.encode_prompts(tiny_model, ["a cat"])
    )


def test_other_copies_of_the_unhardened_weights_stay_behind(folder: Path, tiny_model: Model, tmp_path: Path) -> None:
    for name in ("v1-5.ckpt", "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors"):
        (folder / name).write_bytes(b"old weights")
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"not changed by hardening")
    (folder / ".git").mkdir()
    (folder / ".git" / "object").write_bytes(b"old weights")
    (folder / "README.md").write_text("A model.")
    report = harden(folder, tiny_model, tmp_path / "out")
    left_out = {name for name in contents(folder) if name not in contents(tmp_path / "out")}
    assert left_out == {*report.dropped, ".git/object"}
    assert set(report.dropped) == {
        "v1-5.ckpt",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    }


def test_half_precision_variants_are_found_and_written_back(folder: Path, tiny_model: Model, tmp_path: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    report = harden(folder, tiny_model, tmp_path / "out")
    assert (tmp_path / "out/unet/diffusion_pytorch_model.fp16.safetensors").is_file()
    assert report.dropped == ()
    assert torch.equal(
        open_checkpoint(tmp_path / "out").load().unet.state_dict()[NAME],
        (tiny_model.unet.state_dict()[NAME] + 0.5).half().float(),
    )


def shard(place: Path) -> None:
    tensors = load_file(place / "diffusion_pytorch_model.safetensors")
    (place / "diffusion_pytorch_model.safetensors").unlink()
    where = {name: f"shard-{index % 2}.safetensors" for index, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({n: t for n, t in tensors.items() if where[n] == file}, place / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (place / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def test_sharded_weights_are_written_back_in_their_shards(folder: Path, tiny_model: Model, tmp_path: Path) -> None:
    shard(folder / "unet")
    harden(folder, tiny_model, tmp_path / "out")
    assert contents(folder).keys() == contents(tmp_path / "out").keys()
    again = open_checkpoint(tmp_path / "out").load().unet.state_dict()
    differing = [name for name, weight in tiny_model.unet.state_dict().items() if not torch.equal(weight, again[name])]
    assert differing == [NAME]


def test_attention_names_of_before_2023_are_read_and_written_as_they_are(
    folder: Path, tiny_model: Model, tmp_path: Path
) -> None:
    """The folders of Stable Diffusion 1.4 and 1.5 on the hub hold their VAE's attention under such names."""
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old(name: str) -> str:
        for new, former in names.items():
            name = name.replace(f"mid_block.attentions.0.{new}.", f"mid_block.attentions.0.{former}.")
        return name

    save_file({old(name): tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    name = "encoder.mid_block.attentions.0.to_q.weight"
    value = tiny_model.vae.state_dict()[name] + 1
    open_checkpoint(folder).write(tmp_path / "out", {f"vae.{name}": value}, {})
    assert "encoder.mid_block.attentions.0.query.weight" in load_file(tmp_path / "out" / "vae" / weights.name)
    assert torch.equal(open_checkpoint(tmp_path / "out").load().vae.state_dict()[name], value.half().float())


def test_an_existing_folder_is_replaced_only_when_forced_and_only_if_it_is_a_model(
    folder: Path, tiny_model: Model, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(folder, tmp_path / "out"))
    with pytest.raises(ImmaError, match="exists already"):
        harden(folder, tiny_model, output)
    harden(folder, tiny_model, output, force=True)
    assert open_checkpoint(output).provenance == {"seed": 1}
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "me.png").write_bytes(b"mine")
    with pytest.raises(ImmaError, match="not a model folder"):
        harden(folder, tiny_model, photos, force=True)
    for around in (folder, folder / "out", tmp_path):
        with pytest.raises(ImmaError, match="it is the input"):
            harden(folder, tiny_model, around, force=True)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError])
def test_a_folder_appears_whole_or_not_at_all(
    failure: Any, folder: Path, tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(shutil.copytree(folder, tmp_path / "out"))
    before = contents(output)

    def fail(*arguments: object) -> None:
        raise failure

    monkeypatch.setattr(writing_module, "rewrite", fail)
    with pytest.raises((KeyboardInterrupt, RuntimeError, ImmaError)) as caught:
        harden(folder, tiny_model, output, force=True)
    if isinstance(failure, OSError):
        assert "disk is full" in str(caught.value)
    assert contents(output) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_every_fault_of_a_folder_is_named_at_once(folder: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").unlink()
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    shutil.rmtree(folder / "vae")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(ImmaError) as caught:
        open_checkpoint(folder)
    for fault in ("scheduler_config.json is missing", "tokenizer_config.json", "vae/config.json", "unet/ holds only"):
        assert fault in str(caught.value)
    assert "weights_only=True" in str(caught.value)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("unet", lambda t: t.pop("conv_in.bias"), "unet: 1 tensor missing: conv_in.bias"),
        ("vae", lambda t: t.update(extra=torch.zeros(1)), "vae: 1 tensor not part of the model: extra"),
        ("unet", lambda t: t.update({"conv_in.bias": torch.zeros(3)}), "conv_in.bias is [3] instead of [8]"),
        ("unet", lambda t: t.update({"conv_in.bias": torch.zeros(8, dtype=torch.int8)}), "conv_in.bias (I8)"),
    ],
)
def test_tensors_that_do_not_fit_the_configuration_are_named(folder: Path, part: str, change: Any, said: str) -> None:
    weights = folder / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights)
    with pytest.raises(ImmaError) as caught:
        open_checkpoint(folder)
    assert said in str(caught.value)


def test_folders_of_other_pipelines_are_refused(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionInpaintPipeline"}))
    unet = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**unet, "in_channels": 9}))
    with pytest.raises(ImmaError, match="StableDiffusionInpaintPipeline") as caught:
        open_checkpoint(folder)
    assert "9 input channels" in str(caught.value)


def test_a_plain_folder_and_a_needless_configuration_are_refused(
    folder: Path, tiny_config: Path, tmp_path: Path
) -> None:
    with pytest.raises(ImmaError, match=r"no model_index\.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(ImmaError, match="carries its own configuration"):
        open_checkpoint(folder, tiny_config)
