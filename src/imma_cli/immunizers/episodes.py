"""Hardening in episodes: ever new simulated attackers, a bounded objective, and a bound on what everybody else notices.

    min over θ   E[ max(0, m · L(x_u, c; θ₀) − L(x_u, c; θ, φ)) ]   subject to   drift(θ) ≤ limit

where L is the mean over the pictures of an outer step, θ₀ is the original and φ follows an attacker who was drawn for the episode and began anew from the weights as they
then were. Against the published loop (arXiv 2311.18815) this differs: the attackers vary and start afresh (ResAlign,
arXiv 2507.16302), the loss is raised to a margin instead of without end (SOPHON, arXiv 2404.12699, has bounded losses
too), and the original's predictions on other prompts are distilled under a Lagrange multiplier.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from imma_cli.attacks.attack import Attack
from imma_cli.attacks.training import Attacker, NotFiniteError
from imma_cli.concepts.batches import Latents, TrainingSet, encode
from imma_cli.concepts.concept import Concept
from imma_cli.families.model import Model
from imma_cli.families.runtime import Runtime
from imma_cli.immunizers.checking import Check, QuickCheck
from imma_cli.immunizers.defender import Defender, Episode
from imma_cli.immunizers.imma import Immunized, Step
from imma_cli.immunizers.retention import Retention
from imma_cli.immunizers.settings import EpisodesSettings
from imma_cli.immunizers.simulated import draw_attacker

BLOWN_UP = 5
"""So many attackers in a row whose training blows up end the run: then it is not their settings."""


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
        NotFiniteError: a loss became NaN or infinite, whoever attacked.
        ImmaError: an attack cannot be attached, its loss depends on none of the weights, or there are too few steps.
    """
    pairs = len(attacks) * len(concepts)
    settings.require_enough(model, pairs)
    cycles = settings.cycles(model)
    defender = Defender(model, settings, retention, runtime)
    before = [weight.detach().clone() for weight in defender.weights]
    result = Immunized({}, simulated_steps=settings.cycles_of_episode(cycles, pairs)[1] * settings.inner_steps)
    best: list[Tensor] | None = None
    try:
        checks = settings.checks_in(cycles)
        check = QuickCheck(model, attacks, concepts, retention, runtime, settings.seed) if checks else None
        every = math.ceil(cycles / checks) if checks else cycles
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
    """The loop itself: steps down of the attacker's, a defender's step, until the attacker's episode ends."""
    rng = random.Random(settings.seed)
    pairs = [(a, c) for a in attacks for c in concepts]
    latents = {concept.name: encode(model, concept.images) for concept in concepts}
    shortest, longest = settings.cycles_of_episode(cycles, len(pairs))
    cycle = blown_up = 0
    while cycle < cycles:
        # every attack on every concept once, in another order each time
        for attack, concept in rng.sample(pairs, len(pairs)):
            length = round(math.exp(rng.uniform(math.log(shortest), math.log(longest))))
            length = min(length, cycles - cycle)
            if not length:
                return
            steps = length * settings.inner_steps
            with episode_of(model, attack, concept, latents[concept.name], steps, settings, defender, rng) as episode:
                batches = iter(episode.batches)
                try:
                    for _ in range(length):
                        for _ in range(settings.inner_steps):
                            inner = episode.attacker_step(next(batches), runtime)
                        loss, drift = defender.step(episode, cycle / cycles)
                        cycle += 1
                        yield Step(cycle, cycles, attack.name, concept.name, inner, loss, drift)
                except NotFiniteError:
                    # a drawn rate may be too high for the drawn optimizer; the next attacker begins anew anyway
                    blown_up += 1
                    if not settings.vary or blown_up == BLOWN_UP:
                        raise
                else:
                    blown_up = 0


@contextmanager
def episode_of(
    model: Model,
    prototype: Attack,
    concept: Concept,
    latents: Latents,
    steps: int,
    settings: EpisodesSettings,
    defender: Defender,
    rng: random.Random,
) -> Iterator[Episode]:
    """An attacker of the kind of *prototype*, attached, for *steps* steps of its own; *latents* are the concept's pictures."""
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
            Attacker(parameters, attack.rates(attacked), attack.settings, steps, attack.rate_of),
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
