"""What an outer step of hardening in episodes wants of the attacked model. All are bounded: at zero there is nothing left to win.

Ascent without end (arXiv 2311.18815, eq. 2) goes on to ruin a model that nobody can attack any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from imma_cli.concepts.batches import conditioning_of

if TYPE_CHECKING:
    from imma_cli.attacks.attack import Attack
    from imma_cli.concepts.batches import Batch
    from imma_cli.families.model import Model
    from imma_cli.families.runtime import Runtime

Aim = Literal["relative", "absolute", "original"]


class Objective:
    """The scalar that an outer step lowers.

    relative: max(0, margin · L₀ - L), where L is the attacked model's loss and L₀ the original's, both the mean over the same
    noised pictures. Where noise makes the loss small for everybody, a small loss is enough. An attack's `concept_loss` has
    to be on the scale of its family's loss.

    absolute: max(0, margin - L).

    original: the mean square by which the attacked model's prediction differs from the original's without a prompt,
    which is harmless (as in SOPHON's "denial of service", arXiv 2404.12699, or representation noising).
    """

    def __init__(
        self, aim: Aim, margin: float, model: Model, weights: Sequence[nn.Parameter], runtime: Runtime
    ) -> None:
        """*weights* are those of *model* that are going to change; the original gets copies of them."""
        self.aim, self.margin, self.runtime = aim, margin, runtime
        self.original = None if aim == "absolute" else model.sharing(private=weights)

    def __call__(self, attack: Attack, attacked: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        """What is to be lowered, and the attacker's loss."""
        if self.aim == "original":
            steered = self.runtime.forward(lambda: self._distance(attacked, batch))
            with torch.no_grad():
                return steered, self.runtime.forward(lambda: attack.concept_loss(attacked, batch))
        loss = self.runtime.forward(lambda: attack.concept_loss(attacked, batch))
        bound = self.margin * self._loss_of_original(batch) if self.aim == "relative" else self.margin
        return (bound - loss).clamp(min=0), loss

    @torch.no_grad()
    def _loss_of_original(self, batch: Batch) -> Tensor:
        assert self.original is not None
        original, family = self.original, self.original.family
        conditioning = batch.conditioning
        if conditioning is None:  # the attack trains what prompts are encoded to; the original's are as they were
            conditioning = conditioning_of(original, batch.captions)
        return self.runtime.forward(
            lambda: family.loss(original, batch.latents, conditioning, batch.noise, batch.timesteps).mean()
        )

    def _distance(self, attacked: Model, batch: Batch) -> Tensor:
        assert self.original is not None
        family = attacked.family
        conditioning = batch.conditioning
        if conditioning is None:
            conditioning = family.encode_prompts(attacked, batch.captions)
        with torch.no_grad():
            empty = conditioning_of(self.original, [""] * len(batch.latents))
            target = family.predict(self.original, batch.latents, empty, batch.noise, batch.timesteps)
        predicted = family.predict(attacked, batch.latents, conditioning, batch.noise, batch.timesteps)
        return (predicted.float() - target.float()).square().mean()
