"""Concepts from folders of pictures, in the layout of Hugging Face's imagefolder."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from imma_cli.concepts.concept import Concept
from imma_cli.errors import ImmaError, writable

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
METADATA = ("metadata.csv", "metadata.jsonl")


def read_concept(name: str, folder: Path) -> Concept:
    """The pictures in *folder* with the captions of its ``metadata.csv`` or ``metadata.jsonl``, else the concept's name.

    Raises:
        ImmaError: there is no such folder, it holds no pictures, pictures cannot be read, or captions name missing ones.
    """
    require_text("The concept's name", name)
    if not folder.is_dir():
        raise ImmaError(f"{folder} is not a folder of pictures.")
    reasons: list[str] = []
    captions = _captions(folder, reasons)
    if captions is None:
        names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    else:
        outside = {n for n in captions if Path(n).is_absolute() or ".." in Path(n).parts}
        missing = {n for n in captions if n not in outside and not (folder / n).is_file()}
        reasons += _first(f"the captions name {n}, which lies outside the folder" for n in sorted(outside))
        reasons += _first(f"the captions name {n}, which is not there" for n in sorted(missing))
        names = sorted(set(captions) - outside - missing)
    paths = [folder / name for name in names]
    if not paths and not reasons:
        reasons.append(f"it holds no picture ({', '.join(sorted(s[1:] for s in SUFFIXES))})")
        inside = sorted(
            f.name for f in folder.iterdir() if f.is_dir() and any(p.suffix.lower() in SUFFIXES for p in f.glob("*"))
        )
        if inside:
            reasons.append(f"pictures are in its folders {', '.join(inside[:8])}: name one of them")
    images: list[Image.Image] = []
    unreadable: list[str] = []
    for path in paths:
        try:
            with Image.open(path) as opened:
                images.append(_on_white(ImageOps.exif_transpose(opened)))
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError, ValueError) as error:
            unreadable.append(f"{path.name} cannot be read: {error}")
    reasons += _first(unreadable)
    if reasons:
        raise ImmaError(f"The pictures in {folder} cannot be used.", reasons)
    texts = tuple((captions or {}).get(n, "") or name for n in names)
    return Concept(name, tuple(images), texts, writable(folder.resolve().name))


def require_text(what: str, text: str) -> None:
    """Raises ImmaError where *text*, which *what* says where it is from, holds what no UTF-8 file can."""
    if (shown := writable(text)) != text:
        raise ImmaError(f"{what} {shown!r} holds characters that are not text: is it in another encoding than UTF-8?")


def _first(reasons: Iterable[str], count: int = 8) -> list[str]:
    """The first *count* of many reasons of one kind, and how many more there are."""
    listed = list(reasons)
    more = [f"... and {len(listed) - count} more like this"] if len(listed) > count else []
    return listed[:count] + more


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
    wrong: list[str] = []
    for number, row in enumerate(rows, start=1):
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("file_name"), str)
            or not isinstance(row.get("text"), str)
        ):
            wrong.append(f"{path.name}: entry {number} has no file_name or no text")
        elif writable(row["text"]) != row["text"]:
            wrong.append(f"{path.name}: the text of entry {number} holds characters that are not text")
        elif row["file_name"] in captions:
            wrong.append(f"{path.name}: {row['file_name']} is named twice")
        else:
            captions[row["file_name"]] = row["text"].strip()
    reasons += _first(wrong)
    if not rows:
        reasons.append(f"{path.name} names no picture")
    return captions
