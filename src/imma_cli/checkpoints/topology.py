"""The keys of an SD 1.x single file, and their shapes in the architectures that the package knows. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache

from imma_cli.families import CONFIGS

Shape = tuple[int, ...]

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
"""Where each part's keys begin in a single file."""

TEXT_LAYER = re.compile(r"(cond_stage_model\.transformer\.text_model\.encoder\.layers\.)(\d+)(\..+)")
EITHER_DIMENSIONS = re.compile(r"first_stage_model\..+\.attn_1\.(q|k|v|proj_out)\.weight")
"""The VAE's attention: 1 × 1 convolutions in the original files, linear layers in some newer ones; diffusers reads both."""


@cache
def architectures() -> Mapping[str, Mapping[str, Shape]]:
    """Shape of every key, per architecture; each named after its configuration folder."""
    table = json.loads((CONFIGS / "sd1" / "keys.json").read_text())
    found: dict[str, dict[str, Shape]] = {}
    for key, shapes in table.items():
        for architecture, shape in shapes.items():
            found.setdefault(architecture, {})[key] = tuple(shape)
    return found


def dimensions(text_layers: int) -> dict[str, int]:
    """Number of dimensions of every key, in the order in which files hold them (by name), for so many text-encoder layers."""
    found: dict[str, int] = {}
    for key, shape in architectures()["sd1"].items():
        if match := TEXT_LAYER.fullmatch(key):
            if match[2] == "0":
                found.update({f"{match[1]}{layer}{match[3]}": len(shape) for layer in range(text_layers)})
        else:
            found[key] = len(shape)
    return dict(sorted(found.items()))


def same_shape(key: str, found: Shape, expected: Shape) -> bool:
    """Whether a tensor of shape *found* may stand where *expected* is the shape."""
    if found == expected:
        return True
    return bool(EITHER_DIMENSIONS.fullmatch(key)) and found[:2] == expected[:2] and {*found[2:], *expected[2:]} <= {1}


def part_of(key: str) -> str | None:
    """The part of the model whose weight *key* is, or None for any other key."""
    return next((part for part, prefix in PREFIXES.items() if key.startswith(prefix)), None)
