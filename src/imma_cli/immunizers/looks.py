"""Pictures in a look that a model has not seen: other colours, inverted, outlined."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from PIL import ImageFilter, ImageOps
from PIL.Image import merge

if TYPE_CHECKING:
    from PIL.Image import Image


ORDERS = ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
"""Of the colours, other than their own."""


def with_other_look(image: Image, rng: random.Random) -> Image:
    """*image* with a look that is drawn from *rng*; it shows the same, half of the time mirrored."""
    changed = image.convert("RGB")
    if rng.random() < 0.5:
        dark, light = (tuple(rng.randrange(256) for _ in range(3)) for _ in range(2))
        changed = ImageOps.colorize(ImageOps.grayscale(changed), dark, light)
    else:
        bands = changed.split()
        changed = merge("RGB", [bands[i] for i in rng.choice(ORDERS)])
    if rng.random() < 0.5:
        changed = ImageOps.invert(changed)
    if rng.random() < 0.3:
        changed = changed.filter(ImageFilter.CONTOUR)
    return ImageOps.mirror(changed) if rng.random() < 0.5 else changed
