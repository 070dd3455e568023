"""Pictures as arrays for the metrics that compare them place by place, and therefore at one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from imma_cli.verification.metrics import PluginSettings


@dataclass(frozen=True)
class SizedSettings(PluginSettings):
    """Settings of a metric that compares pictures place by place."""

    side: int = 256
    """Side in pixels to which the middle square of every picture is scaled."""

    def __post_init__(self) -> None:
        # 32: the smallest side that AlexNet's and VGG's last layers still see something of
        if not 32 <= self.side <= 2048:
            raise ValueError(f"side must be from 32 to 2048, not {self.side}")


def squares(images: Sequence[Image.Image], side: int) -> NDArray[np.float32]:
    """The middle square of each picture at *side* pixels, [N, 3, side, side], in [0, 1].

    Cut, not squeezed, so that shapes keep their proportions; Pillow's bicubic filter smooths before it makes smaller.
    """
    size = (side, side)
    arrays = [np.asarray(ImageOps.fit(i.convert("RGB"), size, Image.Resampling.BICUBIC)) for i in images]
    if not arrays:
        return np.empty((0, 3, side, side), np.float32)
    return np.stack(arrays).transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
