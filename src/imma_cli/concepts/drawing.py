"""Concepts without pictures: the model draws them itself, as in IMMA's re-learning setting (arXiv 2311.18815)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image

from imma_cli.concepts.concept import Concept
from imma_cli.families.family import DRAWING_STEPS
from imma_cli.families.processes import ALONE, Processes

if TYPE_CHECKING:
    from imma_cli.families.model import Model

ROLES = ("defend", "attack", "judge")
Role = Literal["defend", "attack", "judge"]
PROMPTS = ("{}", "an image of {}", "a picture of {}", "an artwork, {}")


def drawing_seeds(role: Role, seed: int, count: int) -> list[int]:
    """Seeds of one role. Roles never share one, whatever their *seed* and *count*: each owns a residue modulo 3.

    Up to a *seed* of 1,000,000 and a *count* of 1,000 they stay below 2³², more than which torch's CPU generator cuts off.
    """
    start = seed * 1000
    return [3 * (start + i) + ROLES.index(role) for i in range(count)]


def draw_concept(
    model: Model,
    name: str,
    *,
    role: Role,
    seed: int,
    count: int = 20,
    batch: int | None = None,
    on_picture: Callable[[int], None] = lambda done: None,
    processes: Processes = ALONE,
) -> Concept:
    """*count* pictures of the concept *name* by the model itself, with plain prompts that name it."""
    captions = [PROMPTS[i % len(PROMPTS)].format(name) for i in range(count)]
    seeds = drawing_seeds(role, seed, count)
    images = draw(model, captions, seeds, batch or min(4, model.at_once), on_picture, processes)
    return Concept(name, tuple(images), tuple(captions), "drawn by the model")


def draw(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch: int,
    on_picture: Callable[[int], None] = lambda done: None,
    processes: Processes = ALONE,
    *,
    steps: int = DRAWING_STEPS,
) -> list[Image.Image]:
    """A picture for each of *prompts*, so many at once. Each of *processes* draws its share, and gets all."""
    parts = [slice(i, i + batch) for i in range(0, len(prompts), batch)]
    own, done = [], 0
    for part in processes.share(parts):
        own.append(model.family.draw(model, prompts[part], seeds[part], steps=steps))
        done += len(own[-1]) * processes.count
        on_picture(min(done, len(prompts)))
    return [image for images in processes.gathered(own, len(parts)) for image in images]


def packed(concept: Concept) -> dict[str, Any]:
    """*concept* as texts and uint8 tensors [height, width, 3]; :func:`unpacked` makes it a concept again."""
    own = {"name": concept.name, "captions": concept.captions, "origin": concept.origin}
    return own | {"images": [torch.from_numpy(np.array(image)) for image in concept.images]}


def unpacked(saved: Mapping[str, Any]) -> Concept:
    images = tuple(Image.fromarray(pixels.numpy()) for pixels in saved["images"])
    return Concept(saved["name"], images, tuple(saved["captions"]), saved["origin"])
