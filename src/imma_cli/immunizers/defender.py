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
from imma_cli.attacks.gradients import Stepping, length, mean_gradient, require_finite, scaling_for
from imma_cli.attacks.training import Attacker, adamw, laid_out_as, optimizer_state, restore_optimizer, trainable
from imma_cli.concepts.batches import Batch, TrainingSet
from imma_cli.concepts.concept import Concept
from imma_cli.errors import ImmaError
from imma_cli.families.model import Model
from imma_cli.families.processes import ALONE, Processes
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
    accumulate: int
    weights: list[nn.Parameter]
    """S_u as the attacked model has it: the very same tensors, or copies where the attack trains the weights in place."""
    apart: bool

    def attacker_step(self, runtime: Runtime) -> float:
        """One step down on the next batches."""
        batches = [next(self.batches) for _ in range(self.accumulate)]
        losses = [partial(self.attack.loss, self.model, batch) for batch in batches]
        return self.attacker.step(*(partial(runtime.forward, loss) for loss in losses))

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

    def __init__(
        self,
        model: Model,
        settings: EpisodesSettings,
        retention: Retention,
        runtime: Runtime,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.settings, self.retention, self.runtime = model, settings, retention, runtime
        self.how = Stepping(processes, runtime.precision, settings.eight_bit)
        self.processes, self.scaling = processes, scaling_for(runtime.precision)
        self.named = protected_weights(model.unet, settings.protect)
        self.weights = list(self.named.values())
        processes.make_same(self.weights)
        self.objective = Objective(settings.objective, settings.margin, model, self.weights, runtime)
        self.rate = settings.outer_learning_rate or defaults_for(model).outer_learning_rate
        self.optimizer = adamw(self.weights, self.rate, eight_bit=settings.eight_bit)
        self.optimizer.param_groups[0]["weight_decay"] = 0.0  # it would pull everybody's weights towards zero
        self.limit = settings.limit
        self.multiplier = 0.05 / self.limit
        self.drift = 0.0
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.moved = [False] * len(self.weights)

    def step(self, episode: Episode, done: float, beside: Sequence[Episode] = ()) -> tuple[float, float]:
        """Push the attacked model to where the attacker has gained nothing; gives its loss, and the drift, before the step.

        *done* is the share of the run that lies behind; *beside*, whose turn it is not: their copies of S_u move, too.
        """
        self.optimizer.param_groups[0]["lr"] = self.rate * (1 - done if self.settings.anneal else 1)
        batches = [_outer_batch(episode.batches, self.settings.outer_batch) for _ in range(self.settings.accumulate)]
        with trainable([*episode.weights, *self.weights]):
            if self.processes.count == 1 and self.runtime.core_to_spare(self.model):
                # two passes that have nothing to do with each other, and on one core each take half of the step
                with ThreadPoolExecutor(max_workers=1) as other_core:
                    later = other_core.submit(self._held)
                    loss, harmful = self._missed(episode, batches)
                drift, kept = later.result()
            else:
                loss, harmful = self._missed(episode, batches)
                drift, kept = self._held()
        if self.scaling:
            if not self.scaling.fits([*harmful, *kept]):
                return loss, drift
        else:
            for gradients in (harmful, kept):
                # a loss may be finite where its gradient is not; the weights stay as they were
                require_finite(length(gradients), "gradient")
        self._descend(_clipped(harmful), kept, [each for each in (episode, *beside) if each.apart])
        self._price(drift)
        return loss, drift

    def taken(self) -> dict[str, Tensor]:
        """A copy of S_u as it is now, by state-dict name."""
        return {name: weight.detach().clone() for name, weight in self.named.items()}

    def state(self) -> dict[str, Any]:
        """Everything that steps change."""
        return {
            "weights": list(self.weights),
            "optimizer": optimizer_state(self.optimizer, self.scaling),
            "multiplier": self.multiplier,
            "drift": self.drift,
            "generator": self.generator.get_state(),
            "moved": list(self.moved),
        }

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Any]) -> None:
        for weight, value in zip(self.weights, saved["weights"], strict=True):
            weight.copy_(value)
        restore_optimizer(self.optimizer, saved["optimizer"], self.scaling)
        self.multiplier, self.drift = saved["multiplier"], saved["drift"]
        self.generator.set_state(saved["generator"])
        self.moved = list(saved["moved"])

    def _missed(self, episode: Episode, batches: Sequence[Batch]) -> tuple[float, Sequence[Tensor | None]]:
        """The attacker's loss, and the gradient that takes away what he has gained."""
        losses: list[Tensor] = []

        def missing(batch: Batch) -> Tensor:
            missed, loss = self.objective(episode.attack, episode.model, batch)
            if self.processes.count == 1:  # else all have to hear of it
                require_finite(loss)
            losses.append(loss.detach())
            if not missed.requires_grad:
                raise ImmaError(
                    f"The loss of {episode.attack.name} depends on none of the weights that may change.",
                    hint="It computes with copies of them. Name another --protect, or leave this attack out.",
                )
            return missed

        parts = [partial(missing, batch) for batch in batches]
        _, gradients = mean_gradient(parts, episode.weights, self.processes, self.scaling)
        mean = torch.stack(losses).sum() / len(batches)
        self.processes.add_up([mean])
        require_finite(mean)
        return float(mean), gradients

    def _held(self) -> tuple[float, Sequence[Tensor | None]]:
        """How far predictions for other prompts have moved, and the gradient that brings them back."""
        if not self.settings.keep_batch:
            return 0.0, [None] * len(self.weights)
        rows = self.retention.drawn(self.settings.keep_batch * self.settings.accumulate, self.generator)
        shares = torch.split(rows, self.settings.keep_batch)
        parts = [part for share in shares for part in torch.split(share, self.model.at_once)]

        def difference(part: Tensor) -> Tensor:
            held = self.runtime.forward(partial(self.retention.difference, self.model, part))
            return held * (len(part) * len(parts) / len(rows))

        drift, gradients = mean_gradient(
            [partial(difference, part) for part in parts], self.weights, self.processes, self.scaling
        )
        return float(drift), gradients

    @torch.no_grad()
    def _descend(
        self, harmful: Sequence[Tensor | None], kept: Sequence[Tensor | None], apart: Sequence[Episode]
    ) -> None:
        before = [w.clone() for w in self.weights] if apart else []
        for i, (weight, up, hold) in enumerate(zip(self.weights, harmful, kept, strict=True)):
            down = up
            if hold is not None:
                down = self.multiplier * hold if up is None else up + self.multiplier * hold
            weight.grad = None if down is None else laid_out_as(weight, down)
            self.moved[i] |= up is not None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for i, old in enumerate(before):
            change = self.weights[i] - old
            for episode in apart:
                episode.weights[i].add_(change)  # what the attacker has learned stays, on top of the moved weights

    def _price(self, drift: float) -> None:
        """Dual ascent: what is above its limit becomes dearer."""
        self.drift = drift if not self.drift else 0.95 * self.drift + 0.05 * drift
        excess = max(-1.0, min(1.0, self.drift / self.limit - 1))
        self.multiplier = min(1e4, max(1e-2, self.multiplier * math.exp(0.02 * excess)))


def _outer_batch(pictures: TrainingSet, size: int) -> Batch:
    rows = torch.randperm(len(pictures.latents), generator=pictures.generator)[:size]
    return pictures.batch(rows.tolist())


def _clipped(gradients: Sequence[Tensor | None], norm: float = 1.0) -> list[Tensor | None]:
    """*gradients* together no longer than *norm*, as the published code clips them."""
    scale = norm / max(norm, float(length(gradients)) + 1e-12)
    return [None if g is None else g * scale for g in gradients]
