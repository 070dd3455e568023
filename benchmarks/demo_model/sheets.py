"""Contact sheets: rows of labelled pictures, to be looked at."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP, LABEL = 6, 14


def contact_sheet(
    cells: Sequence[tuple[str, Sequence[Image.Image]]], columns: int, *, side: int = 64, heading: str = ""
) -> Image.Image:
    """Cells of one label over its pictures side by side, *columns* cells to a row, as RGB on white.

    A label that is wider than its pictures is cut short.
    """
    font = ImageFont.load_default(size=11)
    inside = max(len(pictures) for _, pictures in cells) * side
    width, height = inside + 2 * GAP, side + LABEL + GAP
    top = 22 if heading else GAP
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * width, top + rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, 4), heading, fill="#444444", font=font)
    for i, (label, pictures) in enumerate(cells):
        x, y = i % columns * width + GAP, top + i // columns * height
        while font.getlength(label) > inside + GAP:
            label = label.removesuffix("…")[:-1] + "…"
        pen.text((x, y), label, fill="black", font=font)
        for j, picture in enumerate(pictures):
            resized = picture.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(resized, (x + j * side, y + LABEL))
    return sheet
