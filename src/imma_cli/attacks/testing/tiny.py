"""Tiny models of every family, from the real classes with seeded random weights: nothing is downloaded."""

from __future__ import annotations

import copy
import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from imma_cli.families import CONFIGS, family_named

if TYPE_CHECKING:
    from imma_cli.families.model import Model

NARROW: dict[str, dict[str, dict[str, Any]]] = {
    "sd1": {
        "unet": {
            "_diffusers_version": "0.42.1",  # below 0.9, a pipeline takes every sample_size under 64 for a mistake
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
}
"""How a family's tiny model differs from the demo: widths only, so that its topology is the family's."""


def tiny_config(folder: Path, family: str = "sd1") -> Path:
    """Write the tiny model's configuration folder, with the demo's tokenizer, as *folder*; gives *folder*.

    Raises KeyError for a family there is no tiny model of.
    """
    widths = NARROW[family]
    shutil.copytree(CONFIGS / "demo", folder)
    for part, changes in widths.items():
        path = folder / part / "config.json"
        described = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**described, **changes}, indent=2), encoding="utf-8")
    return folder


def tiny_pipeline(config: Path) -> Any:
    """The diffusers pipeline that *config* (from `tiny_config`) describes, float16, with the same weights every time."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    def described(part: str) -> dict[str, Any]:
        read: dict[str, Any] = json.loads((config / part / "config.json").read_text(encoding="utf-8"))
        return read

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return StableDiffusionPipeline(
            unet=UNet2DConditionModel.from_config(described("unet")),
            vae=AutoencoderKL.from_config(described("vae")),
            text_encoder=CLIPTextModel(CLIPTextConfig(**described("text_encoder"))).eval(),
            tokenizer=CLIPTokenizer.from_pretrained(config / "tokenizer"),
            scheduler=PNDMScheduler.from_pretrained(config / "scheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).to(dtype=torch.float16)


def assembled(pipeline: Any, family: str = "sd1") -> Model:
    """The parts of a diffusers *pipeline* as a model."""
    return family_named(family).assemble(
        unet=pipeline.unet,
        vae=pipeline.vae,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        scheduler=pipeline.scheduler.config,
    )


def tiny_model(family: str = "sd1") -> Model:
    """The tiny model of *family*, float32 and frozen; a copy of its own for every call."""
    return copy.deepcopy(_model(family))


@cache
def _model(family: str) -> Model:
    with TemporaryDirectory() as folder:
        pipeline = tiny_pipeline(tiny_config(Path(folder) / "config", family))
        return assembled(pipeline.to(dtype=torch.float32), family)


def tiny_checkpoint(folder: Path, family: str = "sd1") -> tuple[Path, Path]:
    """Write the tiny model as one ``.safetensors`` file in *folder*, to run commands on: the file, and its ``--config``."""
    from safetensors.torch import save_file

    from imma_cli.checkpoints import compose_single_file

    config = tiny_config(folder / "config", family)
    path = folder / "tiny.safetensors"
    model = assembled(tiny_pipeline(config), family)
    save_file(compose_single_file(model, config), path, {"format": "pt"})
    return path, config
