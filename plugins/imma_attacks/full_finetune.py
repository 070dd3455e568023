"""Ordinary fine-tuning of the whole UNet on captioned pictures, as latent diffusion models are trained (arXiv 2112.10752)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar

from torch import nn

from imma_attacks._captions import CAPTION_SEARCH, CaptionedAttack, CaptionSettings
from imma_attacks._in_place import given_back
from imma_cli.attacks import Attack, Preset, hookimpl
from imma_cli.concepts.concept import Concept
from imma_cli.families.model import Model


class FullFinetune(CaptionedAttack):
    """All weights of the UNet, in place: the strongest and the most expensive attack."""

    name = "full-finetune"
    summary = "all of the UNet, trained on captioned pictures"
    trains = "all weights of the UNet"
    paper = "arXiv 2112.10752"
    Settings = CaptionSettings
    settings: CaptionSettings
    in_place = True
    simulated = True
    search: ClassVar = CAPTION_SEARCH
    presets: ClassVar = {
        "paper": Preset(learning_rate=1e-5, outer_learning_rate=1e-5, steps=1000),
        "small": Preset(learning_rate=1e-4, outer_learning_rate=2e-4, steps=600),
    }

    def attach(self, model: Model, concept: Concept, seed: int) -> AbstractContextManager[dict[str, nn.Parameter]]:
        return given_back(dict(model.unet.named_parameters()))

    def save(self, model: Model, parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
        model.unet.save_pretrained(folder / "unet")


@hookimpl
def imma_attacks() -> list[type[Attack]]:
    return [FullFinetune]
