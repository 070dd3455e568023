"""Checkpoints: what is read, what is refused and why, and what is written back."""

from __future__ import annotations

import json
import pickle
import resource
import signal
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from imma_cli.checkpoints import compose_single_file, open_checkpoint
from imma_cli.checkpoints import writing as writing_module
from imma_cli.checkpoints.atomic import atomic_file
from imma_cli.checkpoints.safetensors_file import read_header
from imma_cli.errors import ImmaError
from imma_cli.families import CONFIGS
from imma_cli.families.model import Model

KEY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
FILE_KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"


def edited(source: Path, target: Path, change: Any, metadata: dict[str, str] | None = None) -> Path:
    tensors = load_file(source)
    save_file(change(tensors) or tensors, target, metadata)
    return target


def raw_file(path: Path, header: str, data: bytes = b"") -> Path:
    encoded = header.encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def moved(model: Model) -> dict[str, torch.Tensor]:
    return {f"unet.{KEY}": dict(model.unet.named_parameters())[KEY] + 0.25}


def test_a_written_file_keeps_all_but_what_changed(tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path) -> None:
    source = edited(
        tiny_checkpoint, tmp_path / "in.safetensors", lambda t: None, {"format": "pt", "modelspec.title": "mine"}
    )
    opened = open_checkpoint(source, tiny_config)
    report = opened.write(tmp_path / "out.safetensors", moved(opened.load()), {"seed": 1})
    before, after = read_header(source), read_header(report.path)
    assert list(before.entries) == list(after.entries)
    assert [e.dtype for e in before.entries.values()] == [e.dtype for e in after.entries.values()]
    assert {k: v for k, v in after.metadata.items() if k != "imma"} == before.metadata
    old, new = load_file(source), load_file(report.path)
    assert [k for k in old if not torch.equal(old[k], new[k])] == [FILE_KEY]
    assert torch.allclose(new[FILE_KEY].float(), old[FILE_KEY].float() + 0.25, atol=1e-3)
    assert (report.tensors, open_checkpoint(report.path, tiny_config).provenance) == (1, {"seed": 1})


def test_the_written_file_is_what_was_asked_for_when_read_again(
    tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path
) -> None:
    opened = open_checkpoint(tiny_checkpoint, tiny_config)
    model = opened.load()
    values = {f"{part}.{n}": w + 0.125 for part, net in model.networks.items() for n, w in net.named_parameters()}
    opened.write(tmp_path / "out.safetensors", values, {})
    again = open_checkpoint(tmp_path / "out.safetensors", tiny_config).load()
    for part, network in again.networks.items():
        for name, weight in network.named_parameters():
            assert torch.equal(weight, values[f"{part}.{name}"].half().float()), name


def test_averaged_copies_of_the_weights_are_dropped(tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path) -> None:
    def with_ema(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model_ema.diffusion_modelinput_blocks00weight"] = torch.zeros(3)
        tensors["betas"] = torch.zeros(3)

    source = edited(tiny_checkpoint, tmp_path / "in.safetensors", with_ema)
    opened = open_checkpoint(source, tiny_config)
    assert any("model_ema" in notice for notice in opened.notices)
    report = opened.write(tmp_path / "out.safetensors", moved(opened.load()), {})
    assert report.dropped == ("model_ema.diffusion_modelinput_blocks00weight",)
    assert set(load_file(source)) - set(load_file(report.path)) == set(report.dropped)


def test_known_architectures_need_no_configuration() -> None:
    shipped = Path(str(CONFIGS)).parents[1] / "demo" / "model.safetensors"
    opened = open_checkpoint(shipped)
    assert (opened.architecture, opened.family.name) == ("demo", "sd1")
    assert opened.provenance is None


def test_the_full_size_architecture_is_known_by_names_and_shapes(tmp_path: Path) -> None:
    """A file of SD 1.x's real size, sparse on disk: only its header is read."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from imma_cli.families.stable_diffusion_1 import StableDiffusion1

    config = CONFIGS / "sd1"

    def described(part: str) -> dict[str, Any]:
        return json.loads((config / part / "config.json").read_text())

    with torch.device("meta"):
        parts = {
            "unet": UNet2DConditionModel.from_config(described("unet")),
            "vae": AutoencoderKL.from_config(described("vae")),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**described("text_encoder"))),
        }
    model = Model(StableDiffusion1(), parts["unet"], parts["vae"], parts["text_encoder"], None, None)
    header, end = {}, 0
    for name, tensor in compose_single_file(model, config).items():
        size = tensor.numel() * 2
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    path = raw_file(tmp_path / "full.safetensors", json.dumps(header))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + end)
    opened = open_checkpoint(path)
    assert opened.architecture == "sd1"
    assert opened.parts["unet"].parameters == 859_520_964
    assert len(header) == 686 + 248 + 196
    tiny = set(read_header(Path(str(CONFIGS)).parents[1] / "demo" / "model.safetensors").entries)
    assert {k for k in header if ".encoder.layers." not in k} == {k for k in tiny if ".encoder.layers." not in k}


def one(name: str, dtype: str = "F32", shape: str = "[1]", end: int = 4) -> str:
    return f'{{"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{end}]}}}}'


BROKEN_FILES: dict[str, tuple[Any, str]] = {
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "run code"),
    "torch zip": (lambda p: torch.save({"a": torch.zeros(1)}, p), "run code"),
    "empty": (lambda p: p.write_bytes(b""), "empty"),
    "text": (lambda p: p.write_bytes(b"hello world, this is no model at all"), "safetensors"),
    "truncated": (lambda p: raw_file(p, one("a"), b"\0"), "truncated|ends|bytes"),
    "trailing": (lambda p: raw_file(p, one("a"), b"\0" * 9), "bytes|data"),
    "duplicate": (
        lambda p: raw_file(p, '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
        "twice|duplicate|more than once",
    ),
    "space first": (lambda p: raw_file(p, " " + one("a"), b"\0" * 4), "{"),
    "path trick": (lambda p: raw_file(p, one("../../x"), b"\0" * 4), "name"),
    "size zero": (lambda p: raw_file(p, one("a", shape="[0]", end=0)), "a"),
    "unknown dtype": (lambda p: raw_file(p, one("a", dtype="F99"), b"\0" * 4), "F99"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_broken_files_are_refused(kind: str, tmp_path: Path) -> None:
    make, said = BROKEN_FILES[kind]
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(ImmaError, match=said) as caught:
        open_checkpoint(path)
    assert "model.safetensors" in str(caught.value)


OTHER_MODELS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "lora": ({"lora_unet_down_blocks_0_attentions_0.lora_down.weight": (4, 8)}, "LoRA"),
    "embedding": ({"emb_params": (1, 768)}, "embedding"),
    "bare unet": ({"conv_in.weight": (320, 4, 3, 3), "time_embedding.linear_1.weight": (4, 4)}, "UNet"),
    "sdxl": ({"conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (4,)}, "SDXL|XL"),
    "sd2": ({"cond_stage_model.model.transformer.resblocks.0.ln_1.weight": (4,)}, "2"),
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_other_models_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    shapes, said = OTHER_MODELS[kind]
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ImmaError, match=said):
        open_checkpoint(tmp_path / "x.safetensors")


def test_an_inpainting_model_is_refused(tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path) -> None:
    def nine_channels(tensors: dict[str, torch.Tensor]) -> None:
        key = "model.diffusion_model.input_blocks.0.0.weight"
        tensors[key] = torch.zeros(tensors[key].shape[0], 9, 3, 3, dtype=torch.float16)

    with pytest.raises(ImmaError, match="inpainting"):
        open_checkpoint(edited(tiny_checkpoint, tmp_path / "x.safetensors", nine_channels), tiny_config)


def test_missing_extra_and_misshapen_tensors_are_named_at_once(
    tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.diffusion_model.out.2.bias"]
        tensors["something.else"] = torch.zeros(1)
        tensors["model.diffusion_model.out.0.bias"] = torch.zeros(3)

    with pytest.raises(ImmaError) as caught:
        open_checkpoint(edited(tiny_checkpoint, tmp_path / "x.safetensors", spoil), tiny_config)
    for part in ("out.2.bias", "something.else", "out.0.bias is [3]"):
        assert part in str(caught.value)


def test_unknown_widths_ask_for_a_configuration(tiny_checkpoint: Path) -> None:
    with pytest.raises(ImmaError, match="--config"):
        open_checkpoint(tiny_checkpoint)


def test_an_incomplete_configuration_folder_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ImmaError) as caught:
        open_checkpoint(tiny_checkpoint, tmp_path)
    assert "model_index.json" in str(caught.value)
    assert "tokenizer" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    value: float, tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[FILE_KEY][0, 0] = value

    path = edited(tiny_checkpoint, tmp_path / "x.safetensors", spoil)
    with pytest.raises(ImmaError, match=KEY.replace(".", r"\.")):
        open_checkpoint(path, tiny_config).load()


@pytest.mark.parametrize("value", [float("nan"), 1e9])
def test_values_the_file_cannot_hold_are_not_written(
    value: float, tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path
) -> None:
    opened = open_checkpoint(tiny_checkpoint, tiny_config)
    weights = moved(opened.load())
    weights[f"unet.{KEY}"][0, 0] = value
    with pytest.raises(ImmaError):
        opened.write(tmp_path / "out.safetensors", weights, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, OSError])
def test_a_write_that_fails_leaves_nothing(
    failure: type[BaseException],
    tiny_checkpoint: Path,
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = open_checkpoint(tiny_checkpoint, tiny_config)
    weights = moved(opened.load())
    monkeypatch.setattr(writing_module, "atomic_file", atomic_file)
    monkeypatch.setattr("imma_cli.checkpoints.atomic.flush", lambda path: (_ for _ in ()).throw(failure("stop")))
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"mine")
    with pytest.raises((failure, ImmaError)):
        opened.write(output, weights, {}, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]
    assert output.read_bytes() == b"mine"


def test_a_full_disk_leaves_nothing(tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: the write fails in the middle in the same way."""
    opened = open_checkpoint(tiny_checkpoint, tiny_config)
    weights = moved(opened.load())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (opened.size // 2, limits[1]))
    try:
        with pytest.raises(ImmaError, match=r"Nothing was written|disk is full"):
            opened.write(tmp_path / "out.safetensors", weights, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_cannot_be_are_refused_before_the_work(
    tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path
) -> None:
    opened = open_checkpoint(tiny_checkpoint, tiny_config)
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    for output in (
        tiny_checkpoint,
        tmp_path / "there.safetensors",
        tmp_path / "no" / "out.safetensors",
        tmp_path / "out.ckpt",
    ):
        with pytest.raises(ImmaError):
            opened.check_output(output)
    opened.check_output(tmp_path / "there.safetensors", force=True)
    with pytest.raises(ImmaError):
        opened.check_output(tiny_checkpoint, force=True)


def test_the_same_input_gives_the_same_bytes(tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(tiny_checkpoint, tiny_config)
    weights = moved(opened.load())
    written = [
        opened.write(tmp_path / f"{i}.safetensors", weights, {"b": 1, "a": [2]}).path.read_bytes() for i in range(2)
    ]
    assert written[0] == written[1]


def test_a_folder_of_pickles_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "folder"
    shutil.copytree(tiny_folder, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ImmaError, match="unet"):
        open_checkpoint(folder)
