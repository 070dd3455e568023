"""Custom Diffusion (arXiv 2212.04488): keys and values of cross-attention, and one new word."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization, remove_parametrizations

from imma_attacks._dreambooth import DREAMBOOTH_SEARCH, DreamBoothLoss, DreamBoothSettings
from imma_attacks._exports import save_custom_diffusion, save_words
from imma_attacks._words import new_words
from imma_cli.attacks import Attack, Choice, Preset, hookimpl
from imma_cli.concepts.concept import Concept
from imma_cli.families.model import Model

WORD = "<imma-0>"
TRAINED = (".attn2.to_k", ".attn2.to_v")


class Sum(nn.Module):
    """A weight and the change of it that is trained."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros_like(weight), requires_grad=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.change


@contextmanager
def changed(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Parameter]]:
    """The changes of *layers*' weights, by the layer's name, which begin as zero; gone after the context."""
    changes = {name: Sum(cast(Tensor, layer.weight)) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            register_parametrization(layer, "weight", changes[name])
        yield {name: change.change for name, change in changes.items()}
    finally:
        for layer in layers.values():
            if is_parametrized(layer, "weight"):
                remove_parametrizations(layer, "weight", leave_parametrized=False)


@dataclass(frozen=True)
class CustomDiffusionSettings(DreamBoothSettings):
    """Settings of Custom Diffusion."""

    token: str = "ktn"
    """The rare word whose embedding the new word starts from. Defender and attacker should use different ones."""
    prior_weight: float = 1.0
    """Weight of the loss on pictures of the class; 0 leaves it out."""


class CustomDiffusion(DreamBoothLoss):
    """A change of the text's projections in cross-attention, and the embedding of a new word before the class noun.

    The change has the size of the weights and is added to them: the attacker gets what it would get by training them in
    place, and hardening keeps none of its steps.
    """

    name = "custom-diffusion"
    summary = "keys and values of cross-attention and a new word, with pictures of the class"
    trains = "K and V of cross-attention, and the embedding of a new word"
    paper = "arXiv 2212.04488"
    Settings = CustomDiffusionSettings
    settings: CustomDiffusionSettings
    trains_text = True
    search: ClassVar = {**DREAMBOOTH_SEARCH, "token": Choice(("ktn", "sks", "the"))}
    presets: ClassVar = {
        "paper": Preset(learning_rate=1e-5, outer_learning_rate=1e-5, steps=1000),
        "small": Preset(learning_rate=1e-3, outer_learning_rate=4e-5, steps=600),
    }

    def caption(self, concept: Concept, caption: str) -> str:
        return f"a {WORD} {self.settings.class_noun or concept.name}"

    @contextmanager
    def attach(self, model: Model, concept: Concept, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        self.prepare_prior(model, concept, seed)
        layers = {name: layer for name, layer in model.unet.named_modules() if name.endswith(TRAINED)}
        with new_words(model, [WORD], self.settings.token, seed) as new, changed(layers) as changes:
            yield {**changes, WORD: new}

    def save(self, model: Model, parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
        learned = {name: model.unet.get_submodule(name).weight for name in parameters if name != WORD}
        save_custom_diffusion(folder, model.unet, learned)
        save_words(folder, [WORD], parameters[WORD].detach())


@hookimpl
def imma_attacks() -> list[type[Attack]]:
    return [CustomDiffusion]
