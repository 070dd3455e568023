"""Prompts that have nothing to do with what was protected."""

from __future__ import annotations

import re

PROMPTS = (
    "a photo of a red apple on a wooden table",
    "a sailing boat on a calm lake at sunset",
    "a portrait of an elderly fisherman, oil painting",
    "a bicycle leaning against a brick wall",
    "a bowl of noodle soup, food photography",
    "a snowy mountain under a blue sky",
    "a cat asleep on a windowsill",
    "a steam train crossing a stone bridge",
    "a watercolor of a rose garden",
    "a modern kitchen with large windows",
    "an astronaut riding a horse, digital art",
    "a street market on a rainy evening",
    "a macro photograph of a dragonfly",
    "a pencil drawing of an old oak tree",
    "a lighthouse above a stormy sea",
    "a stack of books beside a cup of coffee",
)
"""Everyday prompts for models of any subject; a model with a subject of its own is better served with --untouched."""


FEWEST = 4


def unrelated(prompts: tuple[str, ...], concept: str) -> tuple[str, ...]:
    """*prompts* without those that name *concept*; all of them where it is a word that nearly all have."""
    name = re.compile(rf"(?<!\w){re.escape(concept)}(?!\w)", re.IGNORECASE)
    left = tuple(prompt for prompt in prompts if not name.search(prompt))
    return left if len(left) >= FEWEST else prompts
