"""DreamBooth (arXiv 2208.12242): the whole UNet learns a rare token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from torch import nn

from imma_attacks._dreambooth import DREAMBOOTH_SEARCH, DreamBoothLoss, DreamBoothSettings
from imma_attacks._in_place import given_back
from imma_cli.attacks import Attack, Preset, hookimpl
from imma_cli.concepts.concept import Concept
from imma_cli.families.model import Model


class DreamBooth(DreamBoothLoss):
    """All weights of the UNet, in place."""

    name = "dreambooth"
    summary = "all of the UNet learns a rare token, optionally with prior preservation"
    trains = "all weights of the UNet"
    Settings = DreamBoothSettings
    in_place = True
    search: ClassVar = DREAMBOOTH_SEARCH
    presets: ClassVar = {
        "paper": Preset(learning_rate=5e-6, outer_learning_rate=2e-5, steps=1000),
        "small": Preset(learning_rate=1e-4, outer_learning_rate=2e-4, steps=600),
    }

    @contextmanager
    def attach(self, model: Model, concept: Concept, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        self.prepare_prior(model, concept, seed)
        with given_back(dict(model.unet.named_parameters())) as parameters:
            yield parameters

    def save(self, model: Model, parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
        model.unet.save_pretrained(folder / "unet")


@hookimpl
def imma_attacks() -> list[type[Attack]]:
    return [DreamBooth]
