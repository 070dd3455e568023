"""What DreamBooth and DreamBooth-LoRA have in common: a rare token, a class noun, and prior preservation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from imma_cli.attacks import COMMON_SEARCH, Attack, AttackSettings, Choice, Space
from imma_cli.concepts.batches import Batch, Latents, conditioning_of, encode
from imma_cli.concepts.concept import Concept
from imma_cli.concepts.drawing import draw_concept
from imma_cli.families.model import Model


@dataclass(frozen=True)
class DreamBoothSettings(AttackSettings):
    """Settings of DreamBooth in all its forms."""

    token: str = "sks"
    """The rare word that is bound to the subject. Defender and attacker should use different ones."""
    class_noun: str = ""
    """What kind of thing the subject is, as in "a sks DOG"; the concept's name where empty."""
    prior_weight: float = 0.0
    """Weight of the prior-preservation loss; 0 leaves it out."""
    prior_images: int = 20
    """How many pictures of the class the model draws for prior preservation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior_weight < 0:
            raise ValueError(f"prior_weight must not be negative, but is {self.prior_weight}")
        if self.prior_images < 1:
            raise ValueError(f"prior_images must be at least 1, not {self.prior_images}")
        if not self.token.strip():
            raise ValueError("token must not be empty")


DREAMBOOTH_SEARCH: Mapping[str, Space] = {
    **COMMON_SEARCH,
    "token": Choice(("sks", "zwx", "the")),
    "prior_weight": Choice((0.0, 0.3, 1.0)),
}


class DreamBoothLoss(Attack):
    """Every picture gets one prompt with the rare token; the class may be held by pictures of the model's own."""

    paper = "arXiv 2208.12242"
    settings: DreamBoothSettings
    _prior: tuple[Latents, Tensor] | None = None

    def caption(self, concept: Concept, caption: str) -> str:
        return f"a {self.settings.token} {self.settings.class_noun or concept.name}"

    def prepare_prior(self, model: Model, concept: Concept, seed: int) -> None:
        """Draw and encode the pictures of the class, before anything is attached."""
        self._prior = None
        if self.settings.prior_weight:
            noun = self.settings.class_noun or concept.name
            drawn = draw_concept(
                model, f"a {noun}", role="attack", seed=seed % 1_000_000, count=self.settings.prior_images
            )
            self._prior = encode(model, drawn.images), conditioning_of(model, [f"a {noun}"])

    def loss(self, model: Model, batch: Batch) -> Tensor:
        loss = super().loss(model, batch)
        if self._prior is None:
            return loss
        latents, conditioning = self._prior
        # the step's own noise also picks the pictures, so that the loss stays a pure function of the batch
        rows = (batch.noise.flatten(1)[:, 0].abs() * 1e6).long() % len(latents)
        held = model.family.loss(
            model,
            latents.mean[rows],
            conditioning.expand(len(rows), -1, -1),
            torch.flip(batch.noise, (-1,)),
            batch.timesteps,
        )
        return loss + self.settings.prior_weight * held.mean()

    def concept_loss(self, model: Model, batch: Batch) -> Tensor:
        # raising the loss on pictures of the class would take the class from everybody
        return super().loss(model, batch)
