"""DreamBooth through LoRA matrices: a rare token, learned beside the attention projections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn

from imma_attacks._dreambooth import DREAMBOOTH_SEARCH, DreamBoothLoss, DreamBoothSettings
from imma_attacks._exports import save_lora
from imma_attacks._peft import TARGETS, Targets, adapter, check_rank, lora
from imma_cli.attacks import Attack, Choice, Preset, hookimpl
from imma_cli.concepts.concept import Concept
from imma_cli.families.model import Model


@dataclass(frozen=True)
class DreamBoothLoraSettings(DreamBoothSettings):
    """Settings of DreamBooth through LoRA."""

    rank: int = 4
    """Rank of the matrices."""
    targets: Targets = "attention"
    """Which layers get matrices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.rank)


class DreamBoothLora(DreamBoothLoss):
    """DreamBooth's prompts and loss, LoRA's parameters."""

    name = "dreambooth-lora"
    summary = "LoRA on the UNet's attention learns a rare token, optionally with prior preservation"
    trains = "LoRA matrices beside layers of the UNet"
    Settings = DreamBoothLoraSettings
    settings: DreamBoothLoraSettings
    search: ClassVar = {**DREAMBOOTH_SEARCH, "rank": Choice((1, 4, 16)), "targets": Choice(tuple(TARGETS))}
    presets: ClassVar = {
        "paper": Preset(learning_rate=5e-6, outer_learning_rate=2e-5, steps=1000),
        "small": Preset(learning_rate=1e-3, outer_learning_rate=1e-4, steps=600),
    }

    @contextmanager
    def attach(self, model: Model, concept: Concept, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        self.prepare_prior(model, concept, seed)
        with adapter(model.unet, lora(self.settings.rank, TARGETS[self.settings.targets]), seed) as parameters:
            yield parameters

    def save(self, model: Model, parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
        save_lora(folder, model.unet)


@hookimpl
def imma_attacks() -> list[type[Attack]]:
    return [DreamBoothLora]
