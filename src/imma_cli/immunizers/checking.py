"""A short real attack on a copy, now and then while hardening: to stop where it no longer gets harder."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from imma_cli.attacks.gradients import NotFiniteError
from imma_cli.concepts.batches import Latents, encode
from imma_cli.verification.materials import split
from imma_cli.verification.trials import run_trial

if TYPE_CHECKING:
    from imma_cli.attacks.attack import Attack
    from imma_cli.concepts.concept import Concept
    from imma_cli.families.model import Model
    from imma_cli.families.runtime import Runtime
    from imma_cli.immunizers.retention import Retention

STEPS = 40
"""Enough for an attacker to have most of its gain on a small undefended model, and little beside the rest of the run."""
PAIRS = 3
TOO_FAR = 1.25
"""A state whose drift is so many times the limit is not taken, however well it resists."""
PATIENCE = 1
"""So many checks without a better state, among those that are within the limit, end the run. Of the runs in
benchmarks/resistance/results/trials.jsonl none would have taken another state with more."""
SEED = 1_000_000
"""Above every seed of the command's, so that no simulated attacker had the check's noise."""

SPLIT = 3
"""Pictures of a concept from which on every third judges; fewer are learned from and judge alike."""
NOT_LEARNED = 2.0
"""The loss that is put down for an attack under which training blows up: far above any that draws something."""
LEAST_GAIN = 0.01
"""Share of the loss that the attack must gain on the original for its gain to be a measure of anything."""


@dataclass(frozen=True)
class Check:
    """What short attacks got after *cycle* cycles, on average over the attacks on concepts that are tried."""

    cycle: int
    loss: float
    """The denoising loss at the end, on every third picture, which the attackers did not have where there are three."""
    undefended: float
    """What the same attacks on the original come to."""
    prevented: float | None
    """The share of the gain on the original that the attackers did not get: 0 nothing, 1 all, more: worse than before.
    None: they gain nothing to speak of on the original, as where it draws the concept already."""
    drift: float
    within: bool
    """Whether predictions for other prompts have stayed (nearly) within the limit."""


def judged_of(pictures: int) -> int:
    """By how many of so many *pictures* of a concept a short attack is judged."""
    return (pictures + 1) // 3 if pictures >= SPLIT else pictures


class QuickCheck:
    """Runs the same short attacks again and again; the first time on the original.

    Where there are more attacks on concepts than `PAIRS`, so many of them: checking is to stay cheap.
    """

    def __init__(
        self,
        model: Model,
        attacks: Sequence[Attack],
        concepts: Sequence[Concept],
        retention: Retention,
        runtime: Runtime,
        seed: int,
        steps: int = STEPS,
        saved: Mapping[str, Any] | None = None,
    ) -> None:
        """*saved* is the state of an earlier one, which has attacked the original already."""
        self.steps = steps
        self.model, self.retention, self.runtime, self.seed = model, retention, runtime, SEED + seed
        pairs = [(attack, concept) for attack in attacks for concept in concepts]
        self.pairs = random.Random(seed).sample(pairs, PAIRS) if len(pairs) > PAIRS else pairs
        # encoded now: later, the autoencoder is given back
        self.latents = {
            id(image): (mean, std)
            for concept in concepts
            for coded in [encode(model, concept.images)]
            for image, mean, std in zip(concept.images, coded.mean, coded.std, strict=True)
        }
        measured: tuple[float, float] = (saved["start"], saved["reached"]) if saved else self._attack()
        self.start, self.reached = measured
        self.best = Check(**saved["best"]) if saved and saved["best"] else None
        self.since_best: int = saved["since_best"] if saved else 0

    def state(self) -> dict[str, Any]:
        return {
            "start": self.start,
            "reached": self.reached,
            "best": asdict(self.best) if self.best else None,
            "since_best": self.since_best,
        }

    def run(self, cycle: int, limit: float) -> Check:
        """Attack the model as it is now; `best` is this check where it is the best so far.

        Best is the highest loss within the *limit* of drift; as long as none is within, the least drift.
        """
        _, loss = self._attack()
        gain = self.start - self.reached
        prevented = (loss - self.reached) / gain if gain > LEAST_GAIN * self.start else None
        with self.runtime.autocast():
            drift = self.retention.measured_drift(self.model)
        found = Check(cycle, loss, self.reached, prevented, drift, within=drift <= TOO_FAR * limit)
        if self.best is None or _rank(found) > _rank(self.best):
            self.best, self.since_best = found, 0
        elif found.within:  # one that went too far is on its way back: the price of drift rises, and the rate falls
            self.since_best += 1
        return found

    @property
    def exhausted(self) -> bool:
        return self.since_best >= PATIENCE

    def _attack(self) -> tuple[float, float]:
        """Mean loss before and after the short attacks."""
        losses = [self._trial(attack, concept) for attack, concept in self.pairs]
        return fmean(before for before, _ in losses), fmean(after for _, after in losses)

    def _coded(self, model: Model, concept: Concept) -> Latents:
        found = [self.latents[id(image)] for image in concept.images]
        return Latents(torch.stack([mean for mean, _ in found]), torch.stack([std for _, std in found]))

    def _trial(self, attack: Attack, concept: Concept) -> tuple[float, float]:
        pictures, judge = split(concept) if len(concept.images) >= SPLIT else (concept, concept)
        try:
            trial = run_trial(
                self.model,
                "check",
                attack,
                pictures,
                judge,
                steps=self.steps,
                seed=self.seed,
                runtime=self.runtime,
                points=[0, self.steps],
                coded=self._coded,
            )
        except NotFiniteError:  # for whoever defends, training that blows up is no reason to stop
            return NOT_LEARNED, NOT_LEARNED
        return trial.points[0].loss, trial.points[-1].loss


def _rank(check: Check) -> tuple[bool, float]:
    return check.within, check.loss if check.within else -check.drift
