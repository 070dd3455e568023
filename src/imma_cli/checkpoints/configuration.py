"""A configuration folder in diffusers' layout: is everything there that loading would otherwise make up silently?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}


def configuration_faults(folder: Path) -> Iterator[str]:
    """Every reason why *folder* cannot describe a Stable Diffusion 1.x model. Reads JSON only."""
    if not folder.is_dir():
        yield f"{folder} is not a folder" if folder.exists() else f"{folder} does not exist"
        return
    described: dict[str, dict[str, Any]] = {}
    for name in (
        "model_index.json",
        "scheduler/scheduler_config.json",
        *(f"{part}/config.json" for part in (*CLASSES, "text_encoder")),
    ):
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            yield f"{name} cannot be read: {error}"
            continue
        if isinstance(content, dict):
            described[name] = content
        else:
            yield f"{name} is not a JSON object"
    yield from _tokenizer_faults(folder / "tokenizer")
    yield from _class_faults(described)


def _tokenizer_faults(tokenizer: Path) -> Iterator[str]:
    if not (tokenizer / "tokenizer.json").is_file():
        missing = [name for name in ("vocab.json", "merges.txt") if not (tokenizer / name).is_file()]
        if missing:
            yield f"tokenizer/{' and tokenizer/'.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    if not (tokenizer / "tokenizer_config.json").is_file():
        yield "tokenizer/tokenizer_config.json is missing"


def _class_faults(described: dict[str, dict[str, Any]]) -> Iterator[str]:
    pipeline = described.get("model_index.json", {}).get("_class_name", "StableDiffusionPipeline")
    if pipeline != "StableDiffusionPipeline":
        yield f"it describes a {pipeline}; imma reads StableDiffusionPipeline (Stable Diffusion 1.x) so far"
    for part, name in CLASSES.items():
        found = described.get(f"{part}/config.json", {}).get("_class_name", name)
        if found != name:
            yield f"its {part} is a {found} instead of a {name}"
    kind = described.get("text_encoder/config.json", {}).get("model_type", "clip_text_model")
    if kind != "clip_text_model":
        yield f"its text encoder is a {kind} instead of a clip_text_model"
    channels = described.get("unet/config.json", {}).get("in_channels", 4)
    if channels != 4:
        yield f"its UNet takes {channels} input channels instead of 4{', as inpainting models do' if channels == 9 else ''}"
