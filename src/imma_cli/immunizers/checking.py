"""A short real attack on a copy, now and then while hardening: to stop where it no longer gets harder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
TOO_FAR = 1.25
"""A state whose drift is so many times the limit is not taken, however well it resists."""
PATIENCE = 2
"""So many checks in a row without a better state end the run."""
SEED = 1_000_000
"""Above every seed of the command's, so that no simulated attacker had the check's noise."""


@dataclass(frozen=True)
class Check:
    """What short attacks got after *cycle* cycles, on average over the attacks and concepts."""

    cycle: int
    loss: float
    """The denoising loss on pictures that the attackers did not have, at the end."""
    prevented: float
    """The share of the gain on the original that the attackers did not get: 0 nothing, 1 all, more: worse than before."""
    drift: float


class QuickCheck:
    """Runs the same short attacks again and again; the first time on the original."""

    def __init__(
        self,
        model: Model,
        attacks: Sequence[Attack],
        concepts: Sequence[Concept],
        retention: Retention,
        runtime: Runtime,
        seed: int,
    ) -> None:
        self.model, self.retention, self.runtime, self.seed = model, retention, runtime, SEED + seed
        self.pairs = [(attack, concept) for attack in attacks for concept in concepts]
        self.start, self.reached = self._attack()
        self.best: Check | None = None
        self.since_best = 0

    def run(self, cycle: int, limit: float) -> Check:
        """Attack the model as it is now; `best` is this check where it is the best so far within the *limit* of drift."""
        _, loss = self._attack()
        gain = self.start - self.reached
        prevented = (loss - self.reached) / gain if gain > 0 else 0.0
        found = Check(cycle, loss, prevented, self.retention.measured_drift(self.model))
        good = found.drift <= TOO_FAR * limit
        if good and (self.best is None or found.prevented > self.best.prevented):
            self.best, self.since_best = found, 0
        elif self.best is not None:
            self.since_best += 1
        return found

    @property
    def exhausted(self) -> bool:
        return self.since_best >= PATIENCE

    def _attack(self) -> tuple[float, float]:
        """Mean loss before and after the short attacks."""
        before, after = 0.0, 0.0
        for attack, concept in self.pairs:
            pictures, judge = split(concept) if len(concept.images) > 2 else (concept, concept)
            trial = run_trial(
                self.model,
                "check",
                attack,
                pictures,
                judge,
                steps=STEPS,
                seed=self.seed,
                runtime=self.runtime,
                points=[0, STEPS],
            )
            before += trial.points[0].loss / len(self.pairs)
            after += trial.points[-1].loss / len(self.pairs)
        return before, after
