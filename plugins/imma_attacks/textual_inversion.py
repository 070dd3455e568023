"""Textual Inversion (arXiv 2208.01618): only the embeddings of new words are learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from torch import nn

from imma_attacks._exports import save_words
from imma_attacks._words import NewWordSettings, new_words, with_words
from imma_cli.attacks import COMMON_SEARCH, Attack, Choice, Preset, hookimpl
from imma_cli.concepts.concept import Concept
from imma_cli.families.model import Model


class TextualInversion(Attack):
    """The concept's name is replaced by new words, whose embeddings alone are trained."""

    name = "textual-inversion"
    summary = "only the embeddings of new words are learned"
    trains = "embeddings of new words"
    paper = "arXiv 2208.01618"
    Settings = NewWordSettings
    settings: NewWordSettings
    trains_text = True
    computes_with = ("text_encoder",)
    search: ClassVar = {**COMMON_SEARCH, "tokens": Choice((1, 2, 4))}
    presets: ClassVar = {
        "paper": Preset(learning_rate=5e-4, outer_learning_rate=1e-6, steps=1000, max_grad_norm=None),
        "small": Preset(learning_rate=5e-3, outer_learning_rate=2e-5, steps=600, max_grad_norm=None),
    }

    def caption(self, concept: Concept, caption: str) -> str:
        return with_words(concept, caption, self.settings.words)

    @contextmanager
    def attach(self, model: Model, concept: Concept, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        with new_words(model, self.settings.words, self.settings.start(concept), seed) as new:
            yield {"new": new}

    def save(self, model: Model, parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
        save_words(folder, self.settings.words, parameters["new"])


@hookimpl
def imma_attacks() -> list[type[Attack]]:
    return [TextualInversion]
