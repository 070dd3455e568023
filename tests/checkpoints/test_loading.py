"""Loading: real files with all that they carry, offline, silent, and with a tokenizer that reads."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from imma_cli.checkpoints import open_checkpoint, writing
from imma_cli.checkpoints.row_map import row_map
from imma_cli.checkpoints.safetensors_file import rewrite
from imma_cli.errors import ImmaError
from imma_cli.families import CONFIGS
from imma_cli.families.model import Model

TEXT = "cond_stage_model.transformer.text_model."
HARMLESS = {
    "betas": torch.zeros(10),
    "alphas_cumprod": torch.zeros(10),
    "alphas_cumprod_prev": torch.zeros(10),
    "sqrt_alphas_cumprod": torch.zeros(10),
    "sqrt_one_minus_alphas_cumprod": torch.zeros(10),
    "log_one_minus_alphas_cumprod": torch.zeros(10),
    "sqrt_recip_alphas_cumprod": torch.zeros(10),
    "sqrt_recipm1_alphas_cumprod": torch.zeros(10),
    "posterior_variance": torch.zeros(10),
    "posterior_log_variance_clipped": torch.zeros(10),
    "posterior_mean_coef1": torch.zeros(10),
    "posterior_mean_coef2": torch.zeros(10),
    "logvar": torch.zeros(10),
    "model_ema.decay": torch.zeros(()),
    "model_ema.num_updates": torch.zeros((), dtype=torch.int32),
    f"{TEXT}embeddings.position_ids": torch.arange(77)[None],
    "cond_stage_model.logit_scale": torch.zeros(()),
    "cond_stage_model.text_projection": torch.zeros(16, 16),
    "cond_stage_model.transformer.text_projection.weight": torch.zeros(16, 16),
}
"""What the files of the original release and of the community carry beside the three networks."""


def edited(source: Path, target: Path, **changes: Any) -> Path:
    save_file({**load_file(source), **changes}, target, {"format": "pt"})
    return target


def load_plainly(path: Path, config: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_single_file(
        str(path), config=str(config), local_files_only=True, torch_dtype=torch.float32
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_file_is_read_as_diffusers_reads_it(
    tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    path = tmp_path / "in.safetensors"
    save_file({k: v.to(dtype) for k, v in load_file(tiny_checkpoint).items()}, path, {"format": "pt"})
    assert_same(open_checkpoint(path, tiny_config).load(), load_plainly(path, tiny_config))


def test_a_folder_is_read_as_diffusers_reads_it(tiny_folder: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    whole = StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True, torch_dtype=torch.float32)
    assert_same(open_checkpoint(tiny_folder).load(), whole)
    sharded = tmp_path / "sharded"
    whole.save_pretrained(sharded, max_shard_size="60KB")
    assert (sharded / "unet" / "diffusion_pytorch_model.safetensors.index.json").exists()
    assert_same(open_checkpoint(sharded).load(), whole)


def assert_same(model: Model, pipeline: Any) -> None:
    for part, network in model.networks.items():
        expected = getattr(pipeline, part).state_dict()
        found = network.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert {p.dtype for p in network.parameters()} == {torch.float32}
        for (name, ours), (_, theirs) in zip(
            network.named_buffers(), getattr(pipeline, part).named_buffers(), strict=True
        ):
            assert torch.equal(ours, theirs), name
    for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "steps_offset", "prediction_type"):
        assert model.scheduler.config[key] == pipeline.scheduler.config.get(key, model.scheduler.config[key])
    assert model.scheduler.config["set_alpha_to_one"] == pipeline.scheduler.config["set_alpha_to_one"]


def test_training_what_was_read_does_not_reach_the_file(
    tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path
) -> None:
    path = tmp_path / "in.safetensors"
    save_file({k: v.float() for k, v in load_file(tiny_checkpoint).items()}, path, {"format": "pt"})
    before = path.read_bytes()
    model = open_checkpoint(path, tiny_config).load()
    with torch.no_grad():
        for weight in model.unet.parameters():
            weight.add_(1)
    assert path.read_bytes() == before
    again = open_checkpoint(path, tiny_config).load()
    assert not torch.equal(again.unet.conv_in.weight, model.unet.conv_in.weight)


def test_harmless_extra_keys_are_read_and_kept(tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path) -> None:
    path = edited(tiny_checkpoint, tmp_path / "in.safetensors", **HARMLESS)
    checkpoint = open_checkpoint(path, tiny_config)
    checkpoint.load()
    checkpoint.write(tmp_path / "out.safetensors", {}, {})
    left_out = HARMLESS.keys() - load_file(tmp_path / "out.safetensors").keys()
    assert left_out == {"model_ema.decay", "model_ema.num_updates"}
    load_plainly(tmp_path / "out.safetensors", tiny_config)


def test_linear_and_convolutional_attention_of_the_autoencoder_are_both_read_and_written_back(
    tiny_checkpoint: Path, tiny_config: Path, tiny_model: Model, tmp_path: Path
) -> None:
    key, name = "first_stage_model.decoder.mid.attn_1.k.weight", "decoder.mid_block.attentions.0.to_k.weight"
    value = tiny_model.vae.state_dict()[name] + 1
    for shape in ((12, 12, 1, 1), (12, 12)):
        path = edited(
            tiny_checkpoint, tmp_path / "in.safetensors", **{key: load_file(tiny_checkpoint)[key].view(shape)}
        )
        output = tmp_path / "out.safetensors"
        open_checkpoint(path, tiny_config).write(output, {f"vae.{name}": value}, {}, force=True)
        assert load_file(output)[key].shape == shape
        assert torch.equal(load_plainly(output, tiny_config).vae.state_dict()[name], value.half().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_of_every_precision_keep_it(
    dtype: torch.dtype, tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path
) -> None:
    path = tmp_path / "in.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in load_file(tiny_checkpoint).items()}, path)
    checkpoint = open_checkpoint(path, tiny_config)
    model = checkpoint.load()
    changed = {"unet.conv_in.weight": model.unet.conv_in.weight + 0.1}
    checkpoint.write(tmp_path / "out.safetensors", changed, {})
    written = load_file(tmp_path / "out.safetensors")["model.diffusion_model.input_blocks.0.0.weight"]
    assert torch.equal(written, changed["unet.conv_in.weight"].detach().to(dtype))


def test_training_a_loaded_model_does_not_touch_the_file(
    tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path
) -> None:
    """A float32 file may be mapped into memory, and its weights with it."""
    path = tmp_path / "in.safetensors"
    save_file({key: tensor.float() for key, tensor in load_file(tiny_checkpoint).items()}, path)
    before = path.read_bytes()
    model = open_checkpoint(path, tiny_config).load()
    with torch.no_grad():
        for network in model.networks.values():
            for weight in network.parameters():
                weight.add_(1)
    assert path.read_bytes() == before


def test_loading_is_offline_and_silent(
    tiny_checkpoint: Path,
    tiny_config: Path,
    tiny_folder: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("the network was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    open_checkpoint(tiny_checkpoint, tiny_config).load()
    open_checkpoint(tiny_folder).load()
    assert capfd.readouterr() == ("", "")


def test_the_resolution_is_the_configurations(tiny_model: Model) -> None:
    assert tiny_model.family.resolution(tiny_model) == 64


def test_a_model_keeps_its_resolution_under_an_old_configuration(
    tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path
) -> None:
    """diffusers takes sample_size < 64 in a configuration written before 0.9 for a mistake."""
    config = Path(shutil.copytree(tiny_config, tmp_path / "config"))
    path = config / "unet" / "config.json"
    path.write_text(path.read_text().replace('"0.42.1"', '"0.6.0"'))
    model = open_checkpoint(tiny_checkpoint, config).load()
    assert model.family.resolution(model) == 64


def test_a_tokenizer_that_reads_every_prompt_alike_is_refused(
    tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path
) -> None:
    config = Path(shutil.copytree(tiny_config, tmp_path / "config"))
    (config / "tokenizer" / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1}')
    (config / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ImmaError, match="tokenizer does not work"):
        open_checkpoint(tiny_checkpoint, config).load()


def test_a_tokenizer_of_another_model_is_refused(tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path) -> None:
    config = Path(shutil.copytree(tiny_config, tmp_path / "config"))
    shutil.rmtree(config / "tokenizer")
    shutil.copytree(CONFIGS / "sd1" / "tokenizer", config / "tokenizer")
    with pytest.raises(ImmaError, match="its text encoder knows 2858 only"):
        open_checkpoint(tiny_checkpoint, config).load()


def test_a_file_that_changes_after_it_was_opened_is_refused(
    tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(tiny_checkpoint, tmp_path / "in.safetensors"))
    checkpoint = open_checkpoint(path, tiny_config)
    path.write_bytes(path.read_bytes() + b"x")
    for use in (checkpoint.load, lambda: checkpoint.write(tmp_path / "out.safetensors", {}, {})):
        with pytest.raises(ImmaError, match="changed while it was in use"):
            use()


def test_a_configuration_of_another_topology_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, tiny_config: Path
) -> None:
    config = Path(shutil.copytree(tiny_config, tmp_path / "config"))
    for part, old, new in (
        ("unet", '"layers_per_block": 2', '"layers_per_block": 1'),
        ("vae", '"layers_per_block": 2', '"layers_per_block": 1'),
    ):
        path = config / part / "config.json"
        path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ImmaError, match=r"unet/config\.json") as caught:
        open_checkpoint(tiny_checkpoint, config)
    assert "vae/config.json" in str(caught.value)


def test_names_and_shapes_that_the_model_does_not_have_are_refused_at_once(
    tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path
) -> None:
    changed = {
        "unet.nothing": torch.zeros(1),
        "other.conv_in.bias": torch.zeros(8),
        "unet.conv_in.bias": torch.zeros(9),
    }
    with pytest.raises(ImmaError) as caught:
        open_checkpoint(tiny_checkpoint, tiny_config).write(tmp_path / "out.safetensors", changed, {})
    for said in ("unet.nothing", "other.conv_in.bias", "[9] instead of [8]"):
        assert said in str(caught.value)


def test_the_order_in_which_provenance_was_put_together_does_not_matter(
    tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint, tiny_config)
    for name, provenance in (("1", {"seed": 1, "concept": "Ärzte"}), ("2", {"concept": "Ärzte", "seed": 1})):
        checkpoint.write(tmp_path / f"{name}.safetensors", {}, provenance)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    assert open_checkpoint(tmp_path / "1.safetensors", tiny_config).provenance == {"seed": 1, "concept": "Ärzte"}


def test_detection_and_refusals_import_no_torch(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shipped = CONFIGS.parents[1] / "demo" / "model.safetensors"
    (tmp_path / "old.safetensors").write_bytes(b"\x80\x04pickle of a model")
    code = (
        "import sys; from pathlib import Path; from imma_cli.checkpoints import open_checkpoint\n"
        "from imma_cli.errors import ImmaError\n"
        "for path in sys.argv[1:]:\n"
        "    try: open_checkpoint(Path(path)).parts\n"
        "    except ImmaError: pass\n"
        "assert not {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)"
    )
    paths = [str(path) for path in (shipped, tiny_checkpoint, tmp_path / "old.safetensors")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True)


def test_keys_json_is_what_the_topology_gives_and_diffusers_confirms() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "sd1_keys.py"
    subprocess.run([sys.executable, str(script), "--check"], check=True, capture_output=True)


class TestRowMap:
    """The map is general although Stable Diffusion 1.x only renames: later families join and split."""

    def test_a_split_weight_returns_into_its_rows(self) -> None:
        from imma_cli.checkpoints.row_map import RowMap

        rows = {"q": torch.arange(0, 2), "v": torch.arange(4, 6), "bias": torch.tensor([7, 6])}
        split = RowMap(rows, ("qkv", "bias"), torch.tensor([0, 6, 8]))
        file = {"qkv": torch.zeros(6, 3, dtype=torch.float16), "bias": torch.zeros(2)}
        given = {"v": torch.full((2, 3), 2.0), "bias": torch.tensor([1.0, 2.0])}
        scattered = {key: split.scatter(given, tensor, key) for key, tensor in file.items()}
        assert scattered["qkv"].dtype == torch.float16
        assert scattered["qkv"].tolist() == [[0.0] * 3] * 4 + [[2.0] * 3] * 2
        assert scattered["bias"].tolist() == [2.0, 1.0]  # swapped in the file
        assert not file["qkv"].any()

    def test_lost_rows_are_refused(self, tiny_config: Path) -> None:
        with pytest.raises(ValueError, match="every row"):
            row_map("vae", "single-file", {"first_stage_model.unknown.weight": (3, 2)}, tiny_config)


def test_a_file_that_does_not_read_back_as_given_is_not_kept(
    tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget_the_changes(source: Path, header: Any, target: Path, replaced: Any, *others: Any) -> None:
        rewrite(source, header, target, {}.get, *others)

    monkeypatch.setattr(writing, "rewrite", forget_the_changes)
    with pytest.raises(RuntimeError, match=r"unet\.conv_in\.bias does not read back"):
        open_checkpoint(tiny_checkpoint, tiny_config).write(
            tmp_path / "out.safetensors", {"unet.conv_in.bias": torch.full((8,), 9.0)}, {}
        )
    assert list(tmp_path.iterdir()) == []


def test_large_weights_are_compared_in_slices_with_the_same_result(
    tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint, tiny_config)
    weights = checkpoint.load().unet.state_dict()
    changed = {f"unet.{name}": weight + 0.01 * (weight > 0) for name, weight in weights.items()}
    whole = checkpoint.write(tmp_path / "whole.safetensors", changed, {})
    monkeypatch.setattr(writing, "PORTION", 50)
    sliced = checkpoint.write(tmp_path / "sliced.safetensors", changed, {})
    assert (tmp_path / "sliced.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert (sliced.tensors, sliced.parameters) == (whole.tensors, whole.parameters)
    assert whole.parameters == sum(int((weight > 0).sum()) for weight in weights.values())


def test_a_folders_large_weights_are_compared_in_slices_with_the_same_result(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(tiny_folder)
    weights = checkpoint.load().unet.state_dict()
    changed = {f"unet.{name}": weight + 0.01 * (weight > 0) for name, weight in weights.items()}
    whole = checkpoint.write(tmp_path / "whole", changed, {})
    monkeypatch.setattr(writing, "PORTION", 50)
    sliced = checkpoint.write(tmp_path / "sliced", changed, {})
    assert (sliced.tensors, sliced.parameters) == (whole.tensors, whole.parameters)
    one, other = (open_checkpoint(tmp_path / name).load().unet.state_dict() for name in ("whole", "sliced"))
    assert all(torch.equal(other[name], weight) for name, weight in one.items())
    assert not any(torch.equal(other[name], weight) for name, weight in weights.items() if weight.any())


def test_one_wrong_value_in_the_last_slice_is_found(
    tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_value_off(source: Path, header: Any, target: Path, replacement: Any, *others: Any) -> None:
        def replaced(key: str) -> Any:
            tensor = replacement(key)
            if tensor is None:
                return None
            wrong = tensor.clone()
            wrong.view(-1)[-1] += 1
            return wrong

        rewrite(source, header, target, replaced, *others)

    checkpoint = open_checkpoint(tiny_checkpoint, tiny_config)
    weight = checkpoint.load().unet.get_parameter("conv_in.weight").detach()
    monkeypatch.setattr(writing, "PORTION", 50)
    monkeypatch.setattr(writing, "rewrite", one_value_off)
    with pytest.raises(RuntimeError, match=r"unet\.conv_in\.weight does not read back"):
        checkpoint.write(tmp_path / "out.safetensors", {"unet.conv_in.weight": weight + 1}, {})
    assert list(tmp_path.iterdir()) == []


def test_the_conversion_that_a_pickles_refusal_proposes_works(
    tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path
) -> None:
    torch.save({"state_dict": load_file(tiny_checkpoint), "epoch": 3}, tmp_path / "OLD.ckpt")
    with pytest.raises(ImmaError) as caught:
        open_checkpoint(tmp_path / "OLD.ckpt", tiny_config)
    command = next(line for line in str(caught.value.hint).splitlines() if line.startswith("  python -c"))
    shell = command.strip().replace("python", f'"{sys.executable}"', 1)
    subprocess.run(["/bin/sh", "-c", shell], check=True, cwd=tmp_path)
    open_checkpoint(tmp_path / "NEW.safetensors", tiny_config).load()


def test_reading_and_drawing_ask_for_no_package(tiny_checkpoint: Path, tiny_config: Path) -> None:
    """transformers and diffusers tell of optional packages when they are imported; nobody has asked for those."""
    code = (
        "import sys; from pathlib import Path; from imma_cli.checkpoints import open_checkpoint;"
        "model = open_checkpoint(*map(Path, sys.argv[1:])).load(); model.family.draw(model, ['a cat'], [0], steps=1)"
    )
    command = [sys.executable, "-c", code, str(tiny_checkpoint), str(tiny_config)]
    assert "torchvision" not in subprocess.run(command, check=True, capture_output=True, text=True).stderr
