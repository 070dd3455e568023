"""How well the metrics that need no download tell the demo's concepts apart.

    python benchmarks/metrics.py

For each concept: how often two of its pictures are more alike than one of them and a picture of another concept (the area under the
ROC curve; chance is 50 %). Beside the metrics stands what `effnet-style` could have been: the cosine of the same
statistics, raw, and standardised over all pictures.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from imma_cli.concepts.folders import read_concept
from imma_cli.verification.effnet import cosine, style_features
from imma_cli.verification.metrics import discover_metrics, parse_metrics

CONCEPTS = Path(__file__).parents[1] / "src" / "imma_cli" / "demo" / "concepts"
METRICS = ("effnet", "effnet-style", "pixel:side=64", "ssim:side=64")


def pairs_within(table: NDArray[np.float64], own: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Of two different pictures of *own*."""
    return table[np.ix_(own, own)][~np.eye(own.sum(), dtype=bool)]


def separation(table: NDArray[np.float64], own: NDArray[np.bool_]) -> float:
    """How often a pair within *own* is more alike than a pair across; ties count half."""
    within = pairs_within(table, own)
    across = np.sort(table[np.ix_(own, ~own)].ravel())
    below = np.searchsorted(across, within, "left") + np.searchsorted(across, within, "right")
    return float(below.mean() / 2 / len(across))


def means(table: NDArray[np.float64], own: NDArray[np.bool_]) -> tuple[float, float]:
    """Of pairs within *own*, and of pairs across."""
    return float(pairs_within(table, own).mean()), float(table[np.ix_(own, ~own)].mean())


def main() -> None:
    torch.set_num_threads(1)
    images: list[Image.Image] = []
    names: list[str] = []
    for folder in sorted(CONCEPTS.glob("*/*")):
        concept = read_concept(folder.parent.name, folder)
        images += concept.images
        names += [concept.name] * len(concept.images)
    labels = np.array(names)
    tables = {metric.name: metric.similarity(images, images) for metric in parse_metrics(METRICS, discover_metrics())}
    statistics = style_features(images).double()
    varied = statistics[:, statistics.std(0) > 1e-6]
    tables["raw cosine"] = cosine(statistics, statistics).numpy()
    standardised = (varied - varied.mean(0)) / varied.std(0)
    tables["standardised cosine"] = cosine(standardised, standardised).numpy()
    concepts = sorted(set(names))
    print(f"{len(images)} pictures: " + ", ".join(f"{names.count(c)} {c}" for c in concepts))
    print(" " * 20 + "".join(f"{c:>22}" for c in concepts))
    for name, table in tables.items():
        print(f"{name:20}" + "".join(f"{separation(table, labels == c):22.1%}" for c in concepts))
    print("mean similarity of two different pictures, both in it / one of them:")
    for name in METRICS:
        table = tables[name]
        print(f"{name:20}" + "".join(f"{'{:.2f} / {:.2f}'.format(*means(table, labels == c)):>22}" for c in concepts))


if __name__ == "__main__":
    main()
