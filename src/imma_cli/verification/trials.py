"""Trials: one attack with one setting and one seed on one model, measured along its budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from imma_cli.attacks.settings import record
from imma_cli.attacks.training import Attacker
from imma_cli.concepts.batches import TrainingSet, encode

if TYPE_CHECKING:
    from imma_cli.attacks.attack import Attack
    from imma_cli.concepts.batches import Batch
    from imma_cli.concepts.concept import Concept
    from imma_cli.families.model import Model
    from imma_cli.families.runtime import Runtime

BUDGET_POINTS = (0.0, 0.1, 0.25, 0.5, 1.0)
DRAWS = 4
"""How often every judging picture is noised: at as many stretches of the noise schedule, with fixed noise."""

ATTACKER_SEEDS = 3_000_000_000
"""Added to a trial's seed, so that no attacker starts from the parameters and the noise that hardening simulated.

Hardening's seeds stay below (imma harden allows 0 to 1,000,000, times 1,000), and the sum below 2³²: torch's CPU generator
takes no more than 32 bits of a seed.
"""

Which = Literal["original", "hardened"]


@dataclass(frozen=True)
class Point:
    """The attacker's denoising loss on pictures it never saw, after *step* of its steps."""

    step: int
    loss: float


@dataclass(frozen=True)
class Trial:
    """One attack on one model as it was measured."""

    model: Which
    attack: dict[str, Any]
    concept: str
    seed: int
    steps: int
    learning_rate: float
    points: tuple[Point, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def points_of(steps: int) -> list[int]:
    """The steps at which a budget of *steps* is looked at."""
    return sorted({round(share * steps) for share in BUDGET_POINTS})


def run_trial(
    model: Model,
    which: Which,
    attack: Attack,
    concept: Concept,
    judge: Concept,
    *,
    steps: int,
    seed: int,
    runtime: Runtime,
    points: Sequence[int] | None = None,
    batch_size: int = 1,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    on_point: Callable[[int, Model], None] = lambda step, model: None,
) -> Trial:
    """Attack *model* with the pictures of *concept*; measure on those of *judge*. The model is left as it was.

    Pictures, captions, their order and all noise follow from *seed*, so that trials on two models are paired.
    """
    attack = type(attack)(attack.settings)
    concept = concept.sample(attack.settings.pictures, seed)
    looks = set(points_of(steps) if points is None else points)
    measured: list[Point] = []
    latents, judged = encode(model, concept.images), encode(model, judge.images)
    own = ATTACKER_SEEDS + seed
    with attack.attach(model, concept, own) as parameters:
        rates = attack.rates(model)
        attacker = Attacker(parameters, rates, attack.settings, steps)
        batches = iter(TrainingSet(model, attack, concept, latents, seed=own, batch_size=batch_size))
        # the judging noise is the same for every seed: it is the yardstick, not a part of the trial
        probes = _probes(TrainingSet(model, attack, judge, judged, seed=12345))
        for step in range(steps + 1):
            if step in looks:
                measured.append(Point(step, _judge(attack, model, probes, runtime)))
                on_point(step, model)
            if step < steps:
                loss = attacker.step(lambda: runtime.forward(lambda: attack.loss(model, next(batches))))
                on_step(step + 1, loss)
    return Trial(which, record(attack), concept.name, seed, steps, rates.learning_rate, tuple(measured))


def _probes(pictures: TrainingSet) -> list[Batch]:
    """Every picture at DRAWS noise levels, one from each equal stretch of the schedule."""
    probes = []
    rows = list(range(len(pictures.latents)))
    for draw in range(DRAWS):
        batch = pictures.batch(rows)
        stretch = pictures.timesteps // DRAWS
        probes.append(
            type(batch)(
                batch.latents,
                batch.noise,
                batch.timesteps % stretch + draw * stretch,
                batch.captions,
                batch.conditioning,
            )
        )
    return probes


@torch.no_grad()
def _judge(attack: Attack, model: Model, probes: Sequence[Batch], runtime: Runtime) -> float:
    # the family's loss, not the attack's: terms such as prior preservation are the attacker's own business
    losses = []
    with runtime.autocast():
        for batch in probes:
            conditioning = batch.conditioning
            if conditioning is None:
                conditioning = model.family.encode_prompts(model, batch.captions)
            losses.append(model.family.loss(model, batch.latents, conditioning, batch.noise, batch.timesteps).mean())
    return float(torch.stack(losses).mean())


def steps_to_reach(points: Sequence[Point], loss: float) -> float | None:
    """The steps an attack needed to come down to *loss*, interpolated between the points; None if it never did."""
    for before, after in itertools.pairwise(points):
        if before.loss <= loss:
            return float(before.step)
        if after.loss <= loss:
            share = (before.loss - loss) / (before.loss - after.loss)
            return before.step + share * (after.step - before.step)
    return None
