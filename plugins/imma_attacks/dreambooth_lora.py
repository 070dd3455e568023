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
from imma_attacks._peft import MATRIX_SEARCH, MatrixSettings, lora_in
from imma_cli.attacks import Attack, Preset, hookimpl
from imma_cli.concepts.concept import Concept
from imma_cli.families.model import Model


@dataclass(frozen=True)
class DreamBoothLoraSettings(DreamBoothSettings, MatrixSettings):
    """Settings of DreamBooth through LoRA."""


class DreamBoothLora(DreamBoothLoss):
    """DreamBooth's prompts and loss, LoRA's parameters."""

    name = "dreambooth-lora"
    summary = "LoRA on the UNet's attention learns a rare token, optionally with prior preservation"
    trains = "LoRA matrices beside layers of the UNet"
    Settings = DreamBoothLoraSettings
    settings: DreamBoothLoraSettings
    search: ClassVar = {**DREAMBOOTH_SEARCH, **MATRIX_SEARCH}
    presets: ClassVar = {
        "paper": Preset(learning_rate=5e-6, outer_learning_rate=2e-5, steps=1000),
        "small": Preset(learning_rate=1e-3, outer_learning_rate=1e-4, steps=600),
    }

    @contextmanager
    def attach(self, model: Model, concept: Concept, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        self.prepare_prior(model, concept, seed)
        with lora_in(model.unet, self.settings, seed) as parameters:
            yield parameters

    def save(self, model: Model, parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
        save_lora(folder, model.unet)


@hookimpl
def imma_attacks() -> list[type[Attack]]:
    return [DreamBoothLora]
