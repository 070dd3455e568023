"""LoRA on the attention projections (arXiv 2106.09685), trained on captioned pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from imma_attacks._peft import TARGETS, Targets, lora_layers
from imma_cli.attacks import COMMON_SEARCH, Attack, AttackSettings, Choice, Preset, hookimpl
from imma_cli.concepts.concept import Concept
from imma_cli.families.model import Model


@dataclass(frozen=True)
class LoraSettings(AttackSettings):
    """Settings of LoRA."""

    rank: int = 4
    """Rank of the matrices."""
    targets: Targets = "attention"
    """Which layers get matrices."""
    captions: Literal["named", "nameless", "token"] = "named"
    """What the captions call the concept: its name, nothing, or a rare word instead."""
    token: str = "sks"
    """The rare word."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if not self.token.strip():
            raise ValueError("token must not be empty")


class Lora(Attack):
    """Low-rank matrices beside every attention projection."""

    name = "lora"
    summary = "LoRA on the UNet's attention, trained on captioned pictures"
    trains = "LoRA matrices beside layers of the UNet"
    paper = "arXiv 2106.09685"
    Settings = LoraSettings
    settings: LoraSettings
    presets: ClassVar = {
        "paper": Preset(learning_rate=1e-4, outer_learning_rate=1e-5, steps=1000),
        "small": Preset(learning_rate=1e-3, outer_learning_rate=1e-4, steps=600),
    }

    search: ClassVar = {
        **COMMON_SEARCH,
        "rank": Choice((1, 4, 16)),
        "targets": Choice(tuple(TARGETS)),
        "captions": Choice(("named", "nameless", "token")),
    }

    def caption(self, concept: Concept, caption: str) -> str:
        if self.settings.captions == "named":
            return caption
        if self.settings.captions == "token":
            return concept.renamed(caption, self.settings.token) or f"{caption}, {self.settings.token}"
        # what is left hanging before the name, as in "a frog in ...", goes with it
        nameless = concept.renamed(caption, "")
        return caption if nameless is None else re.sub(r"[\s,]+(in|of|by|with)?\s*$", "", nameless).strip()

    @contextmanager
    def attach(self, model: Model, concept: Concept, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        with lora_layers(model.unet, self.settings.rank, seed, self.settings.targets) as parameters:
            yield parameters


@hookimpl
def imma_attacks() -> list[type[Attack]]:
    return [Lora]
