"""What erasing a style from the demo model does to it and to the other styles, with the same seeds before and after.

    imma demo demo
    imma harden demo/model.safetensors --concept "flat style" --method none --erase uce --output erased.safetensors
    python benchmarks/erasing.py demo/model.safetensors erased.safetensors sheet.png

Prints, as one JSON line, the root mean square difference of pixels (0 to 255) for each style: of the erased model's
pictures from the original's for the same prompt, and of both from what the original draws for the noun alone. The sheet
shows, row by row, the noun alone, then each style before and after. No noun here is in a prompt that erasing uses.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from imma_cli.checkpoints import open_checkpoint
from imma_cli.families.model import Model
from imma_cli.immunizers.retention import NOUNS

STYLES = ("flat", "noto", "fluent", "retro")
HERE = ("wolf", "goat", "pear", "cherries", "taxi", "tractor", "airplane", "balloon", "crown", "frog", "owl", "penguin")
SHOWN = (*HERE, "cat", "house")
SEED = 300


def drawn(model: Model, style: str | None) -> list[Image.Image]:
    prompts = [f"a {noun} in {style} style" if style else f"a {noun}" for noun in SHOWN]
    return model.family.draw(model, prompts, range(SEED, SEED + len(prompts)))


def difference(some: list[Image.Image], others: list[Image.Image]) -> float:
    pairs = zip(some[: len(HERE)], others[: len(HERE)], strict=True)
    squares = [np.square(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in pairs]
    return round(float(np.mean(np.sqrt(squares))), 1)


def main(original: Path, erased: Path, sheet: Path) -> None:
    assert not set(HERE) & set(NOUNS)
    models = [open_checkpoint(path).load() for path in (original, erased)]
    alone = drawn(models[0], None)
    rows, found = [alone], {}
    for style in STYLES:
        before, after = (drawn(model, style) for model in models)
        rows += [before, after]
        found[style] = {
            "moved": difference(before, after),
            "from_noun_before": difference(before, alone),
            "from_noun_after": difference(after, alone),
        }
    print(json.dumps({"erased": erased.name, "pictures": len(HERE), **found}))
    side = alone[0].width
    page = Image.new("RGB", (side * len(SHOWN), side * len(rows)))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            page.paste(picture, (x * side, y * side))
    page.save(sheet)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
