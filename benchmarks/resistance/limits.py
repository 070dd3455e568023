"""Where the resistance sits: how much a defence raises the loss, by noise level and by what the attacker calls the concept.

    python benchmarks/resistance/limits.py       # raw lines to benchmarks/resistance/results/limits.jsonl; the table to docs/resistance.md

Nobody has attacked yet. The same pictures, noise and timesteps for every model, in the style case.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from cases import CASES, ROWS, UNDEFENDED, pictures
from defences import Defences
from lines import RESULTS, Lines, put_on_page

from imma_cli.attacks.manager import discover
from imma_cli.attacks.settings import parse_attacks
from imma_cli.concepts.batches import conditioning_of, encode
from imma_cli.concepts.concept import Concept
from imma_cli.families.model import Model

CASE = "style"
BANDS = ((0, 250), (250, 500), (500, 750), (750, 1000))
"""Timesteps, from little noise to much."""
CAPTIONS = {
    "with the concept's name": "lora",
    "without it": "lora:captions=nameless",
    "with a rare token": "lora:captions=token,token=zwx",
}
NOISINGS = 4
"""Of each picture in each band."""


def losses(model: Model, concept: Concept, captions: list[str]) -> list[float]:
    """Mean denoising loss of *model* on the pictures of *concept*, for each band of timesteps."""
    latents, conditioning = encode(model, concept.images).mean, conditioning_of(model, captions)
    generator = torch.Generator().manual_seed(0)
    found = []
    for low, high in BANDS:
        values = []
        for _ in range(NOISINGS):
            noise = torch.randn(latents.shape, generator=generator)
            timesteps = torch.randint(low, high, (len(latents),), generator=generator)
            with torch.no_grad():
                values.append(float(model.family.loss(model, latents, conditioning, noise, timesteps).mean()))
        found.append(round(fmean(values), 5))
    return found


def materials(home: Path) -> Iterator[tuple[str, Concept, list[str]]]:
    """What is looked at: a name, pictures, and their captions."""
    concept = pictures(home, CASES[CASE], "attack")
    for name, attack in zip(CAPTIONS, parse_attacks(list(CAPTIONS.values()), discover()), strict=True):
        yield f"the concept, captions {name}", concept, [attack.caption(concept, c) for c in concept.captions]
    for folder in CASES[CASE].benign:
        (other,) = (case for case in CASES.values() if case.folder == folder)
        ordinary = pictures(home, other, "attack")
        yield f"something else: {other.concept}", ordinary, list(ordinary.captions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("resistance-work"), help="where run.py has its checkpoints")
    parser.add_argument("--rows", default="imma;imma, several;episodes;episodes, high", help="separated by semicolons")
    args = parser.parse_args()
    unknown = [row for row in args.rows.split(";") if row not in ROWS]
    if unknown:
        parser.error(f"no such defence: {'; '.join(unknown)}")
    torch.set_num_threads(1)
    lines = Lines(RESULTS / "limits.jsonl")
    defences = Defences(args.work, Lines(RESULTS / "trials.jsonl"))
    for row in (UNDEFENDED, *args.rows.split(";")):
        if lines.find(row=row):
            continue
        model = defences.model(CASE, row, 0)
        for name, concept, captions in materials(defences.home):
            lines.add(
                {"case": CASE, "row": row, "defence_seed": 0, "on": name, "losses": losses(model, concept, captions)}
            )
    put_on_page("limits", table(lines))


def table(lines: Lines) -> str:
    """Markdown: each loss as a multiple of the undefended model's."""
    before = {line["on"]: line["losses"] for line in lines.find(row=UNDEFENDED)}
    head = ["defence", "pictures", *(f"timesteps {low} to {high - 1}" for low, high in BANDS)]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for line in lines:
        if line["row"] != UNDEFENDED:
            times = (after / first for after, first in zip(line["losses"], before[line["on"]], strict=True))
            rows.append("| " + " | ".join([line["row"], line["on"], *(f"{t:.2f} ×" for t in times)]) + " |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
