"""LoRA on the attention projections (arXiv 2106.09685), trained on captioned pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from imma_attacks._peft import lora_layers
from imma_cli.attacks import Attack, AttackSettings, Preset, hookimpl
from imma_cli.concepts.concept import Concept
from imma_cli.families.model import Model


@dataclass(frozen=True)
class LoraSettings(AttackSettings):
    """Settings of LoRA."""

    rank: int = 4
    """Rank of the matrices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")


class Lora(Attack):
    """Low-rank matrices beside every attention projection."""

    name = "lora"
    summary = "LoRA on the UNet's attention, trained on captioned pictures"
    paper = "arXiv 2106.09685"
    Settings = LoraSettings
    settings: LoraSettings
    presets: ClassVar = {
        "paper": Preset(learning_rate=1e-4, outer_learning_rate=1e-5, steps=1000),
        "small": Preset(learning_rate=1e-3, outer_learning_rate=1e-4, steps=600),
    }

    @contextmanager
    def attach(self, model: Model, concept: Concept, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        with lora_layers(model.unet, self.settings.rank, seed) as parameters:
            yield parameters


@hookimpl
def imma_attacks() -> list[type[Attack]]:
    return [Lora]
