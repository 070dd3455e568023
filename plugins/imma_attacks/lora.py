"""LoRA on the attention projections (arXiv 2106.09685), trained on captioned pictures."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from imma_attacks._captions import CAPTION_SEARCH, CaptionedAttack, CaptionSettings
from imma_attacks._exports import save_lora
from imma_attacks._peft import MATRIX_SEARCH, MatrixSettings, lora_in
from imma_cli.attacks import Attack, Preset, hookimpl
from imma_cli.concepts.concept import Concept
from imma_cli.families.model import Model


@dataclass(frozen=True)
class LoraSettings(CaptionSettings, MatrixSettings):
    """Settings of LoRA."""


class Lora(CaptionedAttack):
    """Low-rank matrices A [rank, in] and B [out, rank] beside every targeted layer."""

    name = "lora"
    summary = "LoRA on the UNet's attention, trained on captioned pictures"
    trains = "LoRA matrices beside layers of the UNet"
    paper = "arXiv 2106.09685"
    Settings = LoraSettings
    simulated = True
    settings: LoraSettings
    search: ClassVar = {**CAPTION_SEARCH, **MATRIX_SEARCH}
    presets: ClassVar = {
        "paper": Preset(learning_rate=1e-4, outer_learning_rate=1e-5, steps=1000),
        "small": Preset(learning_rate=1e-3, outer_learning_rate=1e-4, steps=600),
    }
    variant: ClassVar[Mapping[str, Any]] = {}
    """What PEFT's configuration of a variant of LoRA says besides."""

    def attach(self, model: Model, concept: Concept, seed: int) -> AbstractContextManager[dict[str, nn.Parameter]]:
        return lora_in(model.unet, self.settings, seed, **self.variant)

    def save(self, model: Model, parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
        save_lora(folder, model.unet)


@hookimpl
def imma_attacks() -> list[type[Attack]]:
    return [Lora]
