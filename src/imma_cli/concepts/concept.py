"""What is protected, or attacked: a name, pictures, and what is written below them."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
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

    def sample(self, count: int, seed: int) -> Concept:
        """*count* of the pictures, picked by *seed*, in their order here; all of them where *count* is 0 or too many."""
        if not 0 < count < len(self.images):
            return self
        rows = sorted(random.Random(seed).sample(range(len(self.images)), count))
        return replace(
            self,
            images=tuple(self.images[row] for row in rows),
            captions=tuple(self.captions[row] for row in rows),
        )

    def renamed(self, caption: str, name: str) -> str | None:
        """*caption* with *name* in place of the concept's, in whatever case it stands; None where it is not there."""
        pattern = rf"(?<!\w){re.escape(self.name)}(?!\w)"
        text, count = re.subn(pattern, lambda found: name, caption, flags=re.IGNORECASE)
        return text if count else None


def hashed(captions: Sequence[str]) -> list[str]:
    """SHA-256 of each caption: enough to tell later whether it was used, without giving it away."""
    return [hashlib.sha256(caption.encode()).hexdigest() for caption in captions]
