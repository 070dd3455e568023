"""Hardening in episodes: simulated attackers, a bounded objective, and a bound on what everybody else notices.

    min over θ   E[ max(0, m · L(x_u, c; θ₀) − L(x_u, c; θ, φ)) ]   subject to   drift(θ) ≤ limit

where L is the mean over the pictures of an outer step, θ₀ is the original and φ follows an attacker through its episode: one
of several, side by side from beginning to end, or one at a time, each drawn anew and starting afresh from the weights as
they then are (ResAlign, arXiv 2507.16302). Against the published loop (arXiv 2311.18815) this differs: the loss is raised
to a margin instead of without end (SOPHON, arXiv 2404.12699, has bounded losses too), and the original's predictions on
other prompts are distilled under a Lagrange multiplier.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from imma_cli.attacks.attack import Attack
from imma_cli.attacks.gradients import NotFiniteError
from imma_cli.attacks.training import Attacker
from imma_cli.concepts.batches import Latents, TrainingSet, encode
from imma_cli.concepts.concept import Concept
from imma_cli.families.model import Model
from imma_cli.families.processes import ALONE, Processes
from imma_cli.families.runtime import Runtime
from imma_cli.immunizers.checking import Check, QuickCheck
from imma_cli.immunizers.defender import Defender, Episode
from imma_cli.immunizers.imma import Immunized, Step
from imma_cli.immunizers.keeper import Keeper
from imma_cli.immunizers.originals import put_back
from imma_cli.immunizers.retention import Retention
from imma_cli.immunizers.settings import EpisodesSettings, defaults_for
from imma_cli.immunizers.simulated import draw_attacker
from imma_cli.immunizers.state import State, random_state, restore_random_state

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
    keeper: Keeper | None = None,
    on_encoded: Callable[[], None] = lambda: None,
    processes: Processes = ALONE,
) -> Immunized:
    """Immunize *model* against every attack on every concept. *model* itself stays as it was.

    *keeper* may hold the state of a run that was interrupted: it is continued, to the same weights. *on_encoded* is called
    when all pictures are encoded; captions are until the end, as every attacker writes other ones. *processes* share the
    batches of every step, and all end with the same weights.

    Raises:
        NotFiniteError: a loss or a gradient became NaN or infinite, whoever attacked.
        ImmaError: an attack cannot be attached, its loss depends on none of the weights, or there are too few steps.
    """
    pairs = len(attacks) * len(concepts)
    settings.require_enough(defaults_for(model).steps, pairs)
    cycles = settings.cycles(model)
    keeper = keeper or Keeper()
    defender = Defender(model, settings, retention, runtime, processes)
    result = Immunized({}, simulated_steps=settings.simulated_steps(cycles, pairs))
    with put_back(defender.weights):
        run = Run(model, attacks, concepts, settings, runtime, defender, collected=keeper.keeps)
        checks = settings.checks_in(cycles)
        saved = keeper.begin()
        its = saved["check"] if saved else None
        check = None
        if checks and processes.first:
            check = QuickCheck(model, attacks, concepts, retention, runtime, settings.seed, saved=its)
        every = math.ceil(cycles / checks) if checks else cycles
        on_encoded()
        if saved:
            result.restore(saved["result"], model.device)

        def state() -> State:
            return {"run": run.state(), "result": result.state(), "check": check.state() if check else None}

        # popped: it is large, and not needed any more once it is restored
        for step in run.steps(saved.pop("run") if saved else None):
            result.steps.append(step)
            on_step(step)
            if checks and (step.cycle % every == 0 or step.cycle == cycles):
                seen = check.run(step.cycle, defender.limit) if check else None
                # one process looks; that the run ends, or which state is taken, is not left to the others' last digits
                found, best, exhausted = processes.told(
                    (seen, seen is check.best, check.exhausted) if check else (None, False, False)
                )
                assert found is not None
                result.checks.append(found)
                on_check(found)
                if best:
                    result.taken, result.weights = found, defender.taken()
                if exhausted:
                    break
            keeper.offer(state)
        result.unreached = tuple(n for n, moved in zip(defender.named, defender.moved, strict=True) if not moved)
        result.weights = result.weights or defender.taken()
    return result


class Run:
    """The course of episodes: who is attacking, whose turn it is, and where they are.

    An attacker that is attached anew must find the weights that it found then. So a state holds how things stood when
    the episodes began, and what has changed since.
    """

    def __init__(
        self,
        model: Model,
        attacks: Sequence[Attack],
        concepts: Sequence[Concept],
        settings: EpisodesSettings,
        runtime: Runtime,
        defender: Defender,
        *,
        collected: bool,
    ) -> None:
        """*collected*: whether `state` is going to be asked for."""
        self.model, self.settings, self.runtime, self.defender = model, settings, runtime, defender
        self.collected = collected
        self.pairs = [(a, c) for a in attacks for c in concepts]
        self.latents = {concept.name: encode(model, concept.images) for concept in concepts}
        self.cycles = settings.cycles(model)
        self.cycle = self.blown_up = 0
        self.rng = random.Random(settings.seed)
        self.turns: list[int] = []
        """The pairs whose turn is still to come before everyone's comes again."""
        self.began: State = {}
        self.episodes: list[Episode] = []
        """Those that are going on; they take turns in every cycle."""

    def steps(self, saved: State | None = None) -> Iterator[Step]:
        """The loop itself: steps down of the attacker's, a defender's step, until the episodes end."""
        if saved:
            self._back_to_beginning(saved["began"])
        while self.cycle < self.cycles:
            self.began = self._beginning()
            pairs, length = self._next()
            with ExitStack() as stack:
                steps = math.ceil(length / len(pairs)) * self.settings.inner_steps
                self.episodes = [stack.enter_context(self._episode(*pair, steps)) for pair in pairs]
                done = self._go_on(saved) if saved else 0
                saved = None
                try:
                    for cycle in range(done, length):
                        yield self._cycle(cycle % len(self.episodes))
                except NotFiniteError:
                    # a drawn rate may be too high for the drawn optimizer; the next attackers begin anew anyway
                    self.blown_up += 1
                    if not self.settings.vary or self.blown_up == BLOWN_UP:
                        raise
                else:
                    self.blown_up = 0

    def _next(self) -> tuple[list[tuple[Attack, Concept]], int]:
        """Who attacks next, and for how many cycles."""
        if self.settings.side_by_side:
            return self.pairs, self.cycles - self.cycle
        # every attack on every concept once, in another order each time
        self.turns = self.turns or self.rng.sample(range(len(self.pairs)), len(self.pairs))
        shortest, longest = self.settings.cycles_of_episode(self.cycles, len(self.pairs))
        length = round(math.exp(self.rng.uniform(math.log(shortest), math.log(longest))))
        return [self.pairs[self.turns.pop(0)]], min(length, self.cycles - self.cycle)

    def _cycle(self, turn: int) -> Step:
        episode, beside = self.episodes[turn], self.episodes[:turn] + self.episodes[turn + 1 :]
        for _ in range(self.settings.inner_steps):
            inner = episode.attacker_step(self.runtime)
        loss, drift = self.defender.step(episode, self.cycle / self.cycles, beside)
        self.cycle += 1
        return Step(self.cycle, self.cycles, episode.attack.name, episode.concept.name, inner, loss, drift)

    def _episode(self, attack: Attack, concept: Concept, steps: int) -> AbstractContextManager[Episode]:
        latents = self.latents[concept.name]
        return episode_of(self.model, attack, concept, latents, steps, self.settings, self.defender, self.rng)

    def state(self) -> State:
        """Where the run is between two cycles, for `steps`."""
        return {
            "began": self.began,
            "cycle": self.cycle,
            "blown_up": self.blown_up,
            "defender": self.defender.state(),
            "episodes": [episode.state() for episode in self.episodes],
            "random": random_state(self.model.device),
        }

    def _beginning(self) -> State:
        if not self.collected:
            return {}
        return {
            "cycle": self.cycle,
            "rng": self.rng.getstate(),
            "turns": list(self.turns),
            # a run that goes on finds the first ones where it starts; later ones wait where the model is not: a GPU
            # has no room to spare
            "weights": [weight.detach().to("cpu", copy=True) for weight in self.defender.weights] if self.cycle else [],
        }

    @torch.no_grad()
    def _back_to_beginning(self, began: State) -> None:
        self.cycle = began["cycle"]
        version, numbers, gauss = began["rng"]
        self.rng.setstate((version, tuple(numbers), gauss))
        self.turns = list(began["turns"])
        for weight, value in zip(self.defender.weights, began["weights"], strict=self.cycle > 0):
            weight.copy_(value)

    def _go_on(self, saved: Mapping[str, Any]) -> int:
        """Both players as they were; gives how many cycles of the episodes lie behind."""
        self.cycle, self.blown_up = saved["cycle"], saved["blown_up"]
        self.defender.restore(saved["defender"])
        for episode, its in zip(self.episodes, saved["episodes"], strict=True):
            episode.restore(its)
        restore_random_state(saved["random"], self.model.device)
        return self.cycle - int(self.began["cycle"])


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
            Attacker(parameters, attack.rates(attacked), attack.settings, steps, attack.rate_of, defender.how),
            TrainingSet(
                attacked,
                attack,
                chosen,
                Latents(latents.mean[rows], latents.std[rows]),
                seed=seed,
                batch_size=settings.batch_size,
            ),
            settings.accumulate,
            weights,
            apart,
        )
