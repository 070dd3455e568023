"""What is protected, or attacked: a name, pictures, and what is written below them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Concept:
    """A concept with its pictures (RGB, any size) and one caption for each."""

    name: str
    images: tuple[Image, ...]
    captions: tuple[str, ...]
    origin: str
    """Where the pictures come from: a folder's name, or ``drawn by the model``."""

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """sha256 of each picture's pixels: tells later whether an evaluation used pictures that hardening saw."""
        return tuple(
            hashlib.sha256(f"{image.size}".encode() + image.convert("RGB").tobytes()).hexdigest()
            for image in self.images
        )
