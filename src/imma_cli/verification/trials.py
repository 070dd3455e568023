"""Trials: one attack with one setting and one seed on one model, measured along its budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from imma_cli.attacks.gradients import NotFiniteError, Stepping
from imma_cli.attacks.settings import record
from imma_cli.attacks.training import Attacker
from imma_cli.concepts.batches import TrainingSet, encode

if TYPE_CHECKING:
    from torch import nn

    from imma_cli.attacks.attack import Attack
    from imma_cli.concepts.batches import Batch, Latents
    from imma_cli.concepts.concept import Concept
    from imma_cli.families.model import Model
    from imma_cli.families.runtime import Runtime

POINTS = (0.1, 0.25, 0.5, 1.0)
"""Shares of the budget at which an attack is looked at, besides its beginning."""

DRAWS = 4
"""How often every judging picture is noised: at as many stretches of the noise schedule, with fixed noise."""

JUDGED_AT_ONCE = 8
"""Judging pictures that go through a large model together; somebody may judge by hundreds."""

ATTACKER_SEEDS = 3_000_000_000
"""Added to a trial's seed, so that no attacker starts from the parameters and the noise that hardening simulated.

Hardening's seeds stay below (imma harden allows 0 to 1,000,000, times 1,000), and the sum below 2³²: torch's CPU generator
takes no more than 32 bits of a seed.
"""


@dataclass(frozen=True)
class Point:
    """The attacker's denoising loss on pictures it never saw, after *step* of its steps."""

    step: int
    loss: float


@dataclass(frozen=True)
class Trial:
    """One attack on one model as it was measured."""

    model: str
    attack: dict[str, Any]
    concept: str
    seed: int
    steps: int
    learning_rate: float
    points: tuple[Point, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def points_of(steps: int, shares: Sequence[float] = POINTS) -> list[int]:
    """The steps at which a budget of *steps* is looked at: before the first, and at *shares* of it."""
    return sorted({0, *(max(1, round(share * steps)) for share in shares)})


def run_trial(
    model: Model,
    which: str,
    attack: Attack,
    concept: Concept,
    judge: Concept,
    *,
    steps: int,
    seed: int,
    runtime: Runtime,
    points: Sequence[int] | None = None,
    batch_size: int = 1,
    coded: Callable[[Model, Concept], Latents] = lambda model, concept: encode(model, concept.images),
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    on_point: Callable[[int, Model, Attack], None] = lambda step, model, attack: None,
    on_end: Callable[[Attack, Model, Mapping[str, nn.Parameter]], None] = lambda attack, model, parameters: None,
) -> Trial:
    """Attack *model* with the pictures of *concept*; measure on those of *judge*. The model is left as it was.

    Pictures, captions, their order and all noise follow from *seed*, so that trials on two models are paired.
    *coded* gives the latents of a concept's pictures; *on_point* sees the attacked model, and the attack as it is attached, at every point,
    and *on_end* both with what was learned, after the last step.

    Raises:
        NotFiniteError: a loss became NaN or infinite.
    """
    attack = type(attack)(attack.settings)
    concept = concept.sample(attack.settings.pictures, seed)
    looks = set(points_of(steps) if points is None else points)
    measured: list[Point] = []
    latents, judged = coded(model, concept), coded(model, judge)
    own = ATTACKER_SEEDS + seed
    with attack.attach(model, concept, own) as parameters:
        rates = attack.rates(model)
        how = Stepping(precision=runtime.precision)
        attacker = Attacker(parameters, rates, attack.settings, steps, attack.rate_of, how)
        batches = iter(TrainingSet(model, attack, concept, latents, seed=own, batch_size=batch_size))
        # the judging noise is the same for every seed: it is the yardstick, not a part of the trial
        probes = _probes(TrainingSet(model, attack, judge, judged, seed=12345))
        for step in range(steps + 1):
            if step in looks:
                found = _judge(attack, model, probes, runtime)
                if not math.isfinite(found):
                    raise NotFiniteError(f"The loss on unseen pictures became {found}.")
                measured.append(Point(step, found))
                on_point(step, model, attack)
            if step < steps:
                loss = attacker.step(lambda: runtime.forward(lambda: attack.loss(model, next(batches))))
                on_step(step + 1, loss)
        on_end(attack, model, parameters)
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
    def loss(batch: Batch) -> Tensor:
        conditioning = batch.conditioning
        if conditioning is None:
            conditioning = model.family.encode_prompts(model, batch.captions)
        return model.family.loss(model, batch.latents, conditioning, batch.noise, batch.timesteps)

    with runtime.autocast():
        losses = [torch.cat([loss(part) for part in _parts(batch, model)]).mean() for batch in probes]
    return float(torch.stack(losses).mean())


def _parts(batch: Batch, model: Model) -> Iterator[Batch]:
    size = len(batch.latents) if model.is_small else JUDGED_AT_ONCE
    for start in range(0, len(batch.latents), size):
        rows = slice(start, start + size)
        conditioning = None if batch.conditioning is None else batch.conditioning[rows]
        yield type(batch)(
            batch.latents[rows], batch.noise[rows], batch.timesteps[rows], batch.captions[rows], conditioning
        )
