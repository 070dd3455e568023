"""Pictures compared with those that they should be like, by metrics that may be somebody else's code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imma_cli.errors import ImmaError, writable
from imma_cli.verification.lines import LARGEST

if TYPE_CHECKING:
    from imma_cli.verification.materials import Material
    from imma_cli.verification.metrics import Metric

REFERENCES = 64
"""Most pictures that generated ones are compared with."""
WITHOUT_IT = "Name other metrics with --metric."


def judge(
    metrics: Sequence[Metric], material: Material, drawn: Mapping[int, Sequence[Image.Image]]
) -> tuple[dict[int, dict[str, tuple[float, ...]]], dict[int, dict[str, dict[str, tuple[float, ...]]]]]:
    """For every step: metric → the mean similarity of each picture to all references; and to the nearest pictures.

    Raises:
        ImmaError: a metric raised, or gave something else than one finite number for each pair.
    """
    steps = sorted(drawn)
    images = [image for step in steps for image in drawn[step]]
    scores: dict[int, dict[str, tuple[float, ...]]] = {step: {} for step in steps}
    nearest: dict[int, dict[str, dict[str, tuple[float, ...]]]] = {step: {} for step in steps}
    for metric in metrics if images else ():
        references = material.judge.images[:REFERENCES]
        table = similarities(metric, references, images)
        end = steps[-1]
        learned = similarities(metric, material.pictures.images[:REFERENCES], drawn[end])
        start = 0
        for step in steps:
            own = table[:, start : start + len(drawn[step])]
            start += len(drawn[step])
            scores[step][metric.name] = tuple(map(float, own.mean(axis=0)))
            if step == end:
                for whose, pairs in (("training", learned), ("judging", own)):
                    nearest[step].setdefault(whose, {})[metric.name] = tuple(map(float, pairs.max(axis=0)))
    return scores, nearest


def similarities(
    metric: Metric, references: Sequence[Image.Image], images: Sequence[Image.Image]
) -> NDArray[np.float64]:
    """What *metric* says of every pair: [references, images].

    Raises:
        ImmaError: it raised, or gave something else than one finite number for each pair.
    """
    fault = f"The metric {metric.name} failed."
    try:
        table = np.asarray(metric.similarity(references, images), dtype=np.float64)
    except (Exception, SystemExit) as error:
        raise ImmaError(fault, [named(error)], WITHOUT_IT) from error
    if table.shape != (len(references), len(images)):
        what = f"it gave numbers of the shape {table.shape} for {len(references)} x {len(images)} pairs"
        raise ImmaError(fault, [what], WITHOUT_IT)
    if not (np.abs(table) <= LARGEST).all():
        raise ImmaError(fault, ["it gave NaN, an infinite or a far too large number"], WITHOUT_IT)
    return table


def named(error: BaseException) -> str:
    """*error* with its class, as its text alone often says little; in characters that can be written to a file."""
    return writable(f"{type(error).__name__}: {error}")
