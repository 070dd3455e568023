"""What every test may use: a tiny Stable Diffusion 1.x from the real classes, as a file, as a folder and loaded."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import copy
import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from imma_cli.checkpoints import compose_single_file, open_checkpoint
from imma_cli.cli import main
from imma_cli.families import CONFIGS
from imma_cli.families.model import Model

torch.set_num_threads(1)

CHANGES: dict[str, dict[str, Any]] = {
    "unet": {
        "_diffusers_version": "0.42.1",  # below 0.9, a pipeline takes every sample_size under 64 for a mistake and sets 64
        "block_out_channels": [8, 16, 24, 24],
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "sample_size": 8,
    },
    "vae": {"block_out_channels": [4, 8, 12, 12], "norm_num_groups": 4, "sample_size": 64},
    "text_encoder": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "projection_dim": 16,
    },
}
"""How the tiny model differs from the demo: widths only, so that its topology is Stable Diffusion 1.x's."""


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration folder of the tiny model, with the demo's tokenizer (2858 tokens)."""
    folder = tmp_path_factory.mktemp("tiny") / "config"
    shutil.copytree(CONFIGS / "demo", folder)
    for part, changes in CHANGES.items():
        path = folder / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2))
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_config: Path) -> Any:
    """The tiny model as a diffusers pipeline, fp16, with seeded random weights."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)

    def described(part: str) -> dict[str, Any]:
        return json.loads((tiny_config / part / "config.json").read_text())

    return StableDiffusionPipeline(
        unet=UNet2DConditionModel.from_config(described("unet")),
        vae=AutoencoderKL.from_config(described("vae")),
        text_encoder=CLIPTextModel(CLIPTextConfig(**described("text_encoder"))).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(tiny_config / "tokenizer"),
        scheduler=PNDMScheduler.from_pretrained(tiny_config / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(dtype=torch.float16)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_pipeline: Any, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as one ``.safetensors`` file in SD 1.x's layout. Never write to it: copy it first."""
    from safetensors.torch import save_file

    from imma_cli.families.stable_diffusion_1 import StableDiffusion1

    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    save_file(compose_single_file(StableDiffusion1().assemble(tiny_pipeline), tiny_config), path, {"format": "pt"})
    return path


@pytest.fixture(scope="session")
def tiny_folder(tiny_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a diffusers folder. Never write to it: copy it first."""
    path = tmp_path_factory.mktemp("folder") / "tiny"
    tiny_pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def loaded_once(tiny_checkpoint: Path, tiny_config: Path) -> Model:
    return open_checkpoint(tiny_checkpoint, tiny_config).load()


@pytest.fixture
def tiny_model(loaded_once: Model) -> Model:
    """The tiny model, loaded, float32, frozen; a fresh copy for each test."""
    return copy.deepcopy(loaded_once)


@pytest.fixture
def imma(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs ``imma`` with arguments in this process; gives exit code, output and messages."""

    def run(*arguments: object) -> tuple[int, str, str]:
        handler = signal.getsignal(signal.SIGINT)
        monkeypatch.setattr(sys, "argv", ["imma", *map(str, arguments)])
        try:
            with pytest.raises(SystemExit) as left:
                main()
        finally:
            signal.signal(signal.SIGINT, handler)
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return run


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(6):
        Image.effect_mandelbrot((64, 64), (-2 + i / 4, -1, 1, 1.2), 15 + 4 * i).convert("RGB").save(folder / f"{i}.png")
    return folder
