"""Hardening in episodes: ever new simulated attackers, a bounded objective, and a bound on what everybody else notices.

    min over θ   E[ max(0, margin − L(x_u, c; θ, φ)) ]   subject to   drift(θ) ≤ limit

where φ follows an attacker who was drawn for the episode and began anew from the weights as they then were. Against the
published loop (arXiv 2311.18815) this differs: the attackers vary and start afresh (ResAlign, arXiv 2507.16302),
the loss is raised to a margin instead of without end (SOPHON, arXiv 2404.12699, has bounded losses too), the original's
predictions on other prompts are distilled under a Lagrange multiplier.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from imma_cli.attacks.attack import Attack
from imma_cli.attacks.training import Attacker, adamw, require_finite, trainable
from imma_cli.concepts.batches import Batch, Latents, TrainingSet, encode
from imma_cli.concepts.concept import Concept
from imma_cli.errors import ImmaError
from imma_cli.families.model import Model
from imma_cli.families.runtime import Runtime
from imma_cli.immunizers.checking import Check, QuickCheck
from imma_cli.immunizers.imma import Immunized, Step
from imma_cli.immunizers.retention import Retention
from imma_cli.immunizers.scope import Protect, protected_weights
from imma_cli.immunizers.simulated import draw_attacker

Strength = Literal["low", "medium", "high"]
DRIFT: dict[Strength, float] = {"low": 0.0015, "medium": 0.003, "high": 0.008}
"""How far the predictions for other prompts may move, as `Retention.drift` measures it."""


@dataclass(frozen=True)
class EpisodesSettings:
    """What may be set about hardening in episodes."""

    protect: Protect = "attention"
    strength: Strength = "medium"
    steps: int | None = None
    """Inner and outer steps together, for all attacks and concepts; None: as the model's size has it."""
    outer_learning_rate: float | None = None
    batch_size: int = 1
    seed: int = 0
    vary: bool = True
    """Whether the attackers' settings are drawn; otherwise they are as given."""
    shortest: int = 200
    longest: int = 300
    """How many steps an episode's attacker makes, at least and at most; no more than lets every attack on every concept
    have its turn, and a third of the run."""
    margin: float = 2.0
    """The loss beyond which an attacker's is not raised further; about 1 is a prediction that has nothing to do with the target."""
    outer_batch: int = 2
    """Pictures of the concept in an outer step."""
    keep_batch: int = 8
    """Noised pictures of other things in an outer step; 0: nothing is held on to."""
    anneal: bool = True
    """Whether the immunizing rate falls to zero over the run: the noise of the last steps is drift that resists nobody."""
    checks: int = 5
    """How often along the way a short real attack is run on a copy, to stop where it gets no harder; 0: never."""


@dataclass(frozen=True)
class Defaults:
    """What depends on the model's size."""

    steps: int
    outer_learning_rate: float
    kept_pictures: int
    noisings: int


SMALL = Defaults(steps=1000, outer_learning_rate=3e-4, kept_pictures=96, noisings=12)
FULL_SIZE = Defaults(steps=2000, outer_learning_rate=1e-5, kept_pictures=64, noisings=16)


def defaults_for(model: Model) -> Defaults:
    return SMALL if model.is_small else FULL_SIZE


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


class Defender:
    """S_u, its optimizer, and the multiplier λ that holds the drift at its limit."""

    def __init__(self, model: Model, settings: EpisodesSettings, retention: Retention, runtime: Runtime) -> None:
        self.model, self.settings, self.retention, self.runtime = model, settings, retention, runtime
        self.named = protected_weights(model.unet, settings.protect)
        self.weights = list(self.named.values())
        self.rate = settings.outer_learning_rate or defaults_for(model).outer_learning_rate
        self.optimizer = adamw(self.weights, self.rate)
        self.optimizer.param_groups[0]["weight_decay"] = 0.0  # it would pull everybody's weights towards zero
        self.limit = DRIFT[settings.strength]
        self.multiplier = 0.05 / self.limit
        self.drift = 0.0
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.moved = [False] * len(self.weights)

    def step(self, episode: Episode, done: float) -> tuple[float, float]:
        """Push the attacked model's loss towards the margin; gives that loss, and the drift, before the step.

        *done* is the share of the run that lies behind.
        """
        self.optimizer.param_groups[0]["lr"] = self.rate * (1 - done if self.settings.anneal else 1)
        batch = _outer_batch(episode.batches, self.settings.outer_batch)
        with trainable(episode.weights):
            loss = self.runtime.forward(lambda: episode.attack.concept_loss(episode.model, batch))
            require_finite(loss)
            if not loss.requires_grad:
                raise ImmaError(
                    f"The loss of {episode.attack.name} depends on none of the weights that may change.",
                    hint="It computes with copies of them. Name another --protect, or leave this attack out.",
                )
            missing = (self.settings.margin - loss).clamp(min=0)
            harmful = torch.autograd.grad(missing, episode.weights, allow_unused=True)
        drift, kept = self._held()
        self._descend(_clipped(harmful), kept, episode)
        self._price(drift)
        return float(loss.detach()), drift

    def _held(self) -> tuple[float, Sequence[Tensor | None]]:
        """How far predictions for other prompts have moved, and the gradient that brings them back."""
        if not self.settings.keep_batch:
            return 0.0, [None] * len(self.weights)
        with trainable(self.weights):
            drift = self.runtime.forward(
                lambda: self.retention.drift(self.model, self.settings.keep_batch, self.generator)
            )
            require_finite(drift)
            return float(drift.detach()), torch.autograd.grad(drift, self.weights, allow_unused=True)

    @torch.no_grad()
    def _descend(self, harmful: Sequence[Tensor | None], kept: Sequence[Tensor | None], episode: Episode) -> None:
        before = [w.clone() for w in self.weights] if episode.apart else []
        for i, (weight, up, hold) in enumerate(zip(self.weights, harmful, kept, strict=True)):
            weight.grad = up
            if hold is not None:
                weight.grad = self.multiplier * hold if up is None else up + self.multiplier * hold
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


def immunize_in_episodes(
    model: Model,
    attacks: Sequence[Attack],
    concepts: Sequence[Concept],
    settings: EpisodesSettings,
    runtime: Runtime,
    retention: Retention,
    on_step: Callable[[Step], None] = lambda step: None,
    on_check: Callable[[Check], None] = lambda check: None,
) -> Immunized:
    """Immunize *model* against every attack on every concept. *model* itself stays as it was.

    Raises:
        NotFiniteError: a loss became NaN or infinite.
        ImmaError: an attack cannot be attached, its loss depends on none of the weights, or there are too few steps.
    """
    cycles = max(1, (settings.steps or defaults_for(model).steps) // 2)
    if cycles < len(attacks) * len(concepts):
        raise ImmaError(
            f"{len(attacks) * len(concepts)} attacks on concepts cannot all be simulated in {2 * cycles} steps.",
            hint=f"Give --steps {2 * len(attacks) * len(concepts)} at least, and for any effect hundreds.",
        )
    defender = Defender(model, settings, retention, runtime)
    before = [weight.detach().clone() for weight in defender.weights]
    result = Immunized({})
    best: list[Tensor] | None = None
    try:
        check = QuickCheck(model, attacks, concepts, retention, runtime, settings.seed) if settings.checks else None
        every = max(1, math.ceil(cycles / settings.checks)) if settings.checks else cycles
        for step in _run(model, attacks, concepts, settings, runtime, defender, cycles):
            result.steps.append(step)
            on_step(step)
            if check and (step.cycle % every == 0 or step.cycle == cycles):
                found = check.run(step.cycle, defender.limit)
                result.checks.append(found)
                on_check(found)
                if found is check.best:
                    best = [weight.detach().clone() for weight in defender.weights]
                    result.taken = found
                if check.exhausted:
                    break
        result.unreached = tuple(n for n, moved in zip(defender.named, defender.moved, strict=True) if not moved)
        final = best or [weight.detach().clone() for weight in defender.weights]
        result.weights = dict(zip(defender.named, final, strict=True))
    finally:
        with torch.no_grad():
            for weight, old in zip(defender.weights, before, strict=True):
                weight.copy_(old)
    return result


def _run(
    model: Model,
    attacks: Sequence[Attack],
    concepts: Sequence[Concept],
    settings: EpisodesSettings,
    runtime: Runtime,
    defender: Defender,
    cycles: int,
) -> Iterator[Step]:
    """The loop itself: an attacker's step down, a defender's step, until the attacker's episode ends."""
    rng = random.Random(settings.seed)
    pairs = [(a, c) for a in attacks for c in concepts]
    latents = {concept.name: encode(model, concept.images) for concept in concepts}
    cycle = 0
    while cycle < cycles:
        # every attack on every concept once, in another order each time
        for attack, concept in rng.sample(pairs, len(pairs)):
            length = min(_length(settings, cycles, len(pairs), rng), cycles - cycle)
            if not length:
                return
            with _episode(model, attack, concept, latents[concept.name], length, settings, defender, rng) as episode:
                batches = iter(episode.batches)
                for _ in range(length):
                    cycle += 1
                    inner = episode.attacker_step(next(batches), runtime)
                    loss, drift = defender.step(episode, (cycle - 1) / cycles)
                    yield Step(cycle, cycles, attack.name, concept.name, inner, loss, drift)


@contextmanager
def _episode(
    model: Model,
    prototype: Attack,
    concept: Concept,
    latents: Latents,
    length: int,
    settings: EpisodesSettings,
    defender: Defender,
    rng: random.Random,
) -> Iterator[Episode]:
    attack = draw_attacker(prototype, model, rng) if settings.vary else type(prototype)(prototype.settings)
    seed = rng.randrange(2**31)
    chosen = concept.sample(attack.settings.pictures, seed)
    rows = [i for i, image in enumerate(concept.images) if any(image is other for other in chosen.images)]
    apart = attack.in_place
    own = [p for network in model.networks.values() for p in network.parameters()] if apart else []
    attacked = model.sharing(private=own)
    of_copy = dict(attacked.unet.named_parameters())
    weights = [of_copy[name] for name in defender.named]
    with attack.attach(attacked, chosen, seed) as parameters:
        yield Episode(
            attack,
            chosen,
            attacked,
            Attacker(parameters, attack.rates(attacked), attack.settings, length, attack.rate_of),
            TrainingSet(
                attacked,
                attack,
                chosen,
                Latents(latents.mean[rows], latents.std[rows]),
                seed=seed,
                batch_size=settings.batch_size,
            ),
            weights,
            apart,
        )


def _length(settings: EpisodesSettings, cycles: int, pairs: int, rng: random.Random) -> int:
    longest = min(settings.longest, max(1, cycles // max(3, pairs)))
    shortest = min(settings.shortest, longest)
    return round(math.exp(rng.uniform(math.log(shortest), math.log(longest))))


def _outer_batch(pictures: TrainingSet, size: int) -> Batch:
    rows = torch.randperm(len(pictures.latents), generator=pictures.generator)[:size]
    return pictures.batch(rows.tolist())


def _clipped(gradients: Sequence[Tensor | None], norm: float = 1.0) -> list[Tensor | None]:
    """*gradients* together no longer than *norm*, as the published code clips them."""
    length = torch.sqrt(sum((g.square().sum() for g in gradients if g is not None), torch.zeros(())))
    scale = norm / max(norm, float(length) + 1e-12)
    return [None if g is None else g * scale for g in gradients]
