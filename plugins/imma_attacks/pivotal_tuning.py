"""Pivotal tuning (arXiv 2106.05744) as trainers do it for diffusion models: new words and LoRA together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn

from imma_attacks._exports import save_lora, save_words
from imma_attacks._peft import MATRIX_SEARCH, MatrixSettings, lora_in
from imma_attacks._rates import check_multiple
from imma_attacks._words import NewWordSettings, new_words, with_words
from imma_cli.attacks import COMMON_SEARCH, Attack, Choice, Preset, hookimpl
from imma_cli.concepts.concept import Concept
from imma_cli.families.model import Model

WORDS = "new words"


@dataclass(frozen=True)
class PivotalTuningSettings(NewWordSettings, MatrixSettings):
    """Settings of pivotal tuning."""

    word_rate: float = 5.0
    """The rate of the new words, as a multiple of that of the matrices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_multiple("word_rate", self.word_rate)


class PivotalTuning(Attack):
    """The embeddings of new words are the pivot, and low-rank matrices in the UNet move the model towards it."""

    name = "pivotal-tuning"
    summary = "textual inversion and LoRA together"
    trains = "embeddings of new words, and LoRA matrices beside layers of the UNet"
    paper = "arXiv 2106.05744"
    Settings = PivotalTuningSettings
    settings: PivotalTuningSettings
    trains_text = True
    computes_with = ("text_encoder",)
    search: ClassVar = {
        **COMMON_SEARCH,
        **MATRIX_SEARCH,
        "tokens": Choice((1, 2, 4)),
        "word_rate": Choice((1.0, 5.0, 20.0)),
    }
    presets: ClassVar = {
        "paper": Preset(learning_rate=1e-4, outer_learning_rate=1e-5, steps=1000),
        "small": Preset(learning_rate=1e-3, outer_learning_rate=1e-4, steps=600),
    }

    def caption(self, concept: Concept, caption: str) -> str:
        return with_words(concept, caption, self.settings.words)

    def rate_of(self, parameter: str) -> float:
        return self.settings.word_rate if parameter == WORDS else 1.0

    @contextmanager
    def attach(self, model: Model, concept: Concept, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        words = new_words(model, self.settings.words, self.settings.start(concept), seed)
        matrices = lora_in(model.unet, self.settings, seed)
        with words as new, matrices as in_unet:
            yield {**in_unet, WORDS: new}

    def save(self, model: Model, parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
        save_lora(folder, model.unet)
        save_words(folder, self.settings.words, parameters[WORDS])


@hookimpl
def imma_attacks() -> list[type[Attack]]:
    return [PivotalTuning]
