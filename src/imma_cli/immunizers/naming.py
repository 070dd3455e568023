"""Prompts that name a concept, each with the neutral one that takes its place when the concept is erased."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from imma_cli.immunizers.retention import NOUNS

FORMS = (("", ""), ("an image of ", "an image"), ("a picture of ", "a picture"), ("an artwork, ", "an artwork"))
BESIDE = (("a {noun} in ", "a {noun}"), ("a {noun}, ", "a {noun}"))
"""What stands before a concept's name, and the neutral prompt without it: alone, and beside everyday nouns."""


class Naming(NamedTuple):
    """A prompt that ends with a concept's name."""

    prompt: str
    start: str
    """What stands before the name."""
    neutral: str
    """The prompt that takes its place."""


def prompts_with(names: Sequence[str], nouns: int, seed: int) -> list[Naming]:
    """The prompts that are erased for the concepts *names*: by themselves, and each after *nouns* everyday nouns."""
    rng = random.Random(seed)
    prompts = []
    for name in names:
        forms = list(FORMS)
        words = set(re.findall(r"\w+", name.lower()))
        others = [noun for noun in NOUNS if noun not in words]
        for noun in rng.sample(others, min(nouns, len(others))):
            forms += [(start.format(noun=noun), neutral.format(noun=noun)) for start, neutral in BESIDE]
        prompts += [Naming(start + name, start, neutral) for start, neutral in forms]
    return prompts


class OnStep(Protocol):
    """Called along the way; *distance* from what is aimed at, as it was before an optimizer's step, or after an edit."""

    def __call__(self, done: int, doing: str, distance: float | None) -> None: ...


def ignore(done: int, doing: str, distance: float | None) -> None:
    return
