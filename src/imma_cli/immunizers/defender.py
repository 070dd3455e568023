"""The defender's side of hardening in episodes: S_u, its outer step, and the price of what everybody else notices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from imma_cli.attacks.attack import Attack
from imma_cli.attacks.training import (
    Attacker,
    adamw,
    laid_out_as,
    optimizer_state,
    require_finite,
    restore_optimizer,
    trainable,
)
from imma_cli.concepts.batches import Batch, TrainingSet
from imma_cli.concepts.concept import Concept
from imma_cli.errors import ImmaError
from imma_cli.families.model import Model
from imma_cli.families.runtime import Runtime
from imma_cli.immunizers.objectives import Objective
from imma_cli.immunizers.retention import Retention
from imma_cli.immunizers.scope import protected_weights
from imma_cli.immunizers.settings import EpisodesSettings, defaults_for


@dataclass
class Episode:
    """One attacker, attached to modules of its own."""

    attack: Attack
    concept: Concept
    model: Model
    attacker: Attacker
    batches: TrainingSet
    weights: list[nn.Parameter]
    """S_u as the attacked model has it: the very same tensors, or copies where the attack trains the weights in place."""
    apart: bool

    def attacker_step(self, batch: Batch, runtime: Runtime) -> float:
        return self.attacker.step(lambda: runtime.forward(lambda: self.attack.loss(self.model, batch)))

    def state(self) -> dict[str, Any]:
        """What has changed since the attacker was attached. Of weights apart, those that he does not train move, too."""
        return {
            "attacker": self.attacker.state(),
            "batches": self.batches.state(),
            "weights": list(self.weights) if self.apart else [],
        }

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Any]) -> None:
        self.attacker.restore(saved["attacker"])
        self.batches.restore(saved["batches"])
        for weight, value in zip(self.weights, saved["weights"], strict=self.apart):
            weight.copy_(value)


class Defender:
    """S_u, its optimizer, and the multiplier λ that holds the drift at its limit."""

    def __init__(self, model: Model, settings: EpisodesSettings, retention: Retention, runtime: Runtime) -> None:
        self.model, self.settings, self.retention, self.runtime = model, settings, retention, runtime
        self.named = protected_weights(model.unet, settings.protect)
        self.weights = list(self.named.values())
        self.objective = Objective(settings.objective, settings.margin, model, self.weights, runtime)
        self.rate = settings.outer_learning_rate or defaults_for(model).outer_learning_rate
        self.optimizer = adamw(self.weights, self.rate)
        self.optimizer.param_groups[0]["weight_decay"] = 0.0  # it would pull everybody's weights towards zero
        self.limit = settings.limit
        self.multiplier = 0.05 / self.limit
        self.drift = 0.0
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.moved = [False] * len(self.weights)

    def step(self, episode: Episode, done: float) -> tuple[float, float]:
        """Push the attacked model to where the attacker has gained nothing; gives its loss, and the drift, before the step.

        *done* is the share of the run that lies behind.
        """
        self.optimizer.param_groups[0]["lr"] = self.rate * (1 - done if self.settings.anneal else 1)
        batch = _outer_batch(episode.batches, self.settings.outer_batch)
        with trainable([*episode.weights, *self.weights]):
            if self.runtime.core_to_spare(self.model):
                # two passes that have nothing to do with each other, and on one core each take half of the step
                with ThreadPoolExecutor(max_workers=1) as beside:
                    later = beside.submit(self._held)
                    loss, harmful = self._missed(episode, batch)
                drift, kept = later.result()
            else:
                loss, harmful = self._missed(episode, batch)
                drift, kept = self._held()
        for gradients in (harmful, kept):
            # a loss may be finite where its gradient is not; the weights stay as they were
            require_finite(_length(gradients))
        self._descend(_clipped(harmful), kept, episode)
        self._price(drift)
        return loss, drift

    def taken(self) -> dict[str, Tensor]:
        """A copy of S_u as it is now, by state-dict name."""
        return {name: weight.detach().clone() for name, weight in self.named.items()}

    def state(self) -> dict[str, Any]:
        """Everything that steps change."""
        return {
            "weights": list(self.weights),
            "optimizer": optimizer_state(self.optimizer),
            "multiplier": self.multiplier,
            "drift": self.drift,
            "generator": self.generator.get_state(),
            "moved": list(self.moved),
        }

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Any]) -> None:
        for weight, value in zip(self.weights, saved["weights"], strict=True):
            weight.copy_(value)
        restore_optimizer(self.optimizer, saved["optimizer"])
        self.multiplier, self.drift = saved["multiplier"], saved["drift"]
        self.generator.set_state(saved["generator"])
        self.moved = list(saved["moved"])

    def _missed(self, episode: Episode, batch: Batch) -> tuple[float, Sequence[Tensor | None]]:
        """The attacker's loss, and the gradient that takes away what he has gained."""
        missing, loss = self.objective(episode.attack, episode.model, batch)
        require_finite(loss)
        if not missing.requires_grad:
            raise ImmaError(
                f"The loss of {episode.attack.name} depends on none of the weights that may change.",
                hint="It computes with copies of them. Name another --protect, or leave this attack out.",
            )
        return float(loss.detach()), torch.autograd.grad(missing, episode.weights, allow_unused=True)

    def _held(self) -> tuple[float, Sequence[Tensor | None]]:
        """How far predictions for other prompts have moved, and the gradient that brings them back."""
        if not self.settings.keep_batch:
            return 0.0, [None] * len(self.weights)
        rows = self.retention.drawn(self.settings.keep_batch, self.generator)
        total: list[Tensor | None] = [None] * len(self.weights)
        drift = 0.0
        for part in torch.split(rows, self.model.at_once):
            held = self.runtime.forward(partial(self.retention.difference, self.model, part)) * (len(part) / len(rows))
            require_finite(held)
            drift += float(held.detach())
            added = torch.autograd.grad(held, self.weights, allow_unused=True)
            total = [b if a is None else a if b is None else a + b for a, b in zip(total, added, strict=True)]
        return drift, total

    @torch.no_grad()
    def _descend(self, harmful: Sequence[Tensor | None], kept: Sequence[Tensor | None], episode: Episode) -> None:
        before = [w.clone() for w in self.weights] if episode.apart else []
        for i, (weight, up, hold) in enumerate(zip(self.weights, harmful, kept, strict=True)):
            down = up
            if hold is not None:
                down = self.multiplier * hold if up is None else up + self.multiplier * hold
            weight.grad = None if down is None else laid_out_as(weight, down)
            self.moved[i] |= up is not None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for copied, weight, old in zip(episode.weights, self.weights, before, strict=False):
            copied.add_(weight - old)  # what the attacker has learned stays, on top of the moved weights

    def _price(self, drift: float) -> None:
        """Dual ascent: what is above its limit becomes dearer."""
        self.drift = drift if not self.drift else 0.95 * self.drift + 0.05 * drift
        excess = max(-1.0, min(1.0, self.drift / self.limit - 1))
        self.multiplier = min(1e4, max(1e-2, self.multiplier * math.exp(0.02 * excess)))


def _outer_batch(pictures: TrainingSet, size: int) -> Batch:
    rows = torch.randperm(len(pictures.latents), generator=pictures.generator)[:size]
    return pictures.batch(rows.tolist())


def _length(gradients: Sequence[Tensor | None]) -> Tensor:
    return torch.sqrt(sum((g.square().sum() for g in gradients if g is not None), torch.zeros(())))


def _clipped(gradients: Sequence[Tensor | None], norm: float = 1.0) -> list[Tensor | None]:
    """*gradients* together no longer than *norm*, as the published code clips them."""
    scale = norm / max(norm, float(_length(gradients)) + 1e-12)
    return [None if g is None else g * scale for g in gradients]
