"""Concepts from folders of pictures, in the layout of Hugging Face's imagefolder."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from imma_cli.concepts.concept import Concept
from imma_cli.errors import ImmaError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
METADATA = ("metadata.csv", "metadata.jsonl")


def read_concept(name: str, folder: Path) -> Concept:
    """The pictures in *folder* with the captions of its ``metadata.csv`` or ``metadata.jsonl``, else the concept's name.

    Raises:
        ImmaError: there is no such folder, it holds no pictures, pictures cannot be read, or captions name missing ones.
    """
    if not folder.is_dir():
        raise ImmaError(
            f"{folder} is not a folder of pictures.", hint="--images takes a folder, one for each --concept."
        )
    reasons: list[str] = []
    captions = _captions(folder, reasons)
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if captions is not None:
        missing = sorted(set(captions) - {p.name for p in paths})
        reasons += [f"the captions name {m}, which is not there" for m in missing[:8]]
        if len(missing) > 8:
            reasons.append(f"... and {len(missing) - 8} more pictures that are not there")
        paths = [p for p in paths if p.name in captions]
    if not paths and not reasons:
        reasons.append(f"it holds no picture ({', '.join(sorted(s[1:] for s in SUFFIXES))})")
    images: list[Image.Image] = []
    for path in paths:
        try:
            with Image.open(path) as opened:
                images.append(_on_white(ImageOps.exif_transpose(opened)))
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError, ValueError) as error:
            reasons.append(f"{path.name} cannot be read: {error}")
    if reasons:
        raise ImmaError(f"The pictures in {folder} cannot be used.", reasons)
    texts = tuple((captions or {}).get(p.name, "") or name for p in paths)
    return Concept(name, tuple(images), texts, folder.resolve().name)


def _on_white(image: Image.Image) -> Image.Image:
    """RGB, with transparency over white, as a browser shows it."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _captions(folder: Path, reasons: list[str]) -> dict[str, str] | None:
    """Caption by file name; None where the folder has no caption file."""
    present = [folder / m for m in METADATA if (folder / m).is_file()]
    if len(present) > 1:
        reasons.append(f"it holds both {' and '.join(METADATA)}")
        return None
    if not present:
        return None
    path = present[0]
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                rows = list(csv.DictReader(file))
            else:
                rows = [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        reasons.append(f"{path.name} cannot be read: {error}")
        return None
    captions: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("file_name"), str)
            or not isinstance(row.get("text"), str)
        ):
            reasons.append(f"{path.name}: entry {number} has no file_name or no text")
        elif row["file_name"] in captions:
            reasons.append(f"{path.name}: {row['file_name']} is named twice")
        else:
            captions[row["file_name"]] = row["text"].strip()
    if not rows:
        reasons.append(f"{path.name} names no picture")
    return captions
