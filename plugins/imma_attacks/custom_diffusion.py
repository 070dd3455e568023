"""Custom Diffusion (arXiv 2212.04488): keys and values of cross-attention, and one new word."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn

from imma_attacks._dreambooth import DREAMBOOTH_SEARCH, DreamBoothLoss, DreamBoothSettings
from imma_attacks._exports import save_custom_diffusion, save_words
from imma_attacks._in_place import given_back
from imma_attacks._words import new_words
from imma_cli.attacks import Attack, Choice, Preset, hookimpl
from imma_cli.concepts.concept import Concept
from imma_cli.families.model import Model

WORD = "<imma-0>"
TRAINED = (".attn2.to_k.weight", ".attn2.to_v.weight")


@dataclass(frozen=True)
class CustomDiffusionSettings(DreamBoothSettings):
    """Settings of Custom Diffusion."""

    token: str = "ktn"
    """The rare word whose embedding the new word starts from. Defender and attacker should use different ones."""
    prior_weight: float = 1.0
    """Weight of the loss on pictures of the class; 0 leaves it out."""


class CustomDiffusion(DreamBoothLoss):
    """The projections of the text in cross-attention, in place, and the embedding of a new word before the class noun."""

    name = "custom-diffusion"
    summary = "keys and values of cross-attention and a new word, with pictures of the class"
    trains = "K and V of cross-attention, and the embedding of a new word"
    paper = "arXiv 2212.04488"
    Settings = CustomDiffusionSettings
    settings: CustomDiffusionSettings
    in_place = True
    trains_text = True
    search: ClassVar = {**DREAMBOOTH_SEARCH, "token": Choice(("ktn", "sks", "the"))}
    presets: ClassVar = {
        "paper": Preset(learning_rate=1e-5, outer_learning_rate=1e-5, steps=1000),
        "small": Preset(learning_rate=1e-3, outer_learning_rate=2e-4, steps=600),
    }

    def caption(self, concept: Concept, caption: str) -> str:
        return f"a {WORD} {self.settings.class_noun or concept.name}"

    @contextmanager
    def attach(self, model: Model, concept: Concept, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        self.prepare_prior(model, concept, seed)
        projections = {name: p for name, p in model.unet.named_parameters() if name.endswith(TRAINED)}
        with given_back(projections) as parameters, new_words(model, [WORD], self.settings.token, seed) as new:
            yield {**parameters, WORD: new}

    def save(self, model: Model, parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
        save_custom_diffusion(folder, model.unet, {n: p for n, p in parameters.items() if n != WORD})
        save_words(folder, [WORD], parameters[WORD].detach())


@hookimpl
def imma_attacks() -> list[type[Attack]]:
    return [CustomDiffusion]
