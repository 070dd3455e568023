"""What the trials of one attack say together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from imma_cli.verification.trials import Point, Trial, steps_to_reach

SMALLEST_GAIN = 0.01
"""Share of its first loss that an attack must gain on the original before it counts as one that works."""


@dataclass(frozen=True)
class Comparison:
    """One attack on both models: means over the seeds, and how much longer the hardened model holds out."""

    attack: str
    seeds: int
    original: tuple[Point, ...]
    hardened: tuple[Point, ...]
    halfway: float
    """The loss at which the attack on the original has made half of its whole gain."""
    original_steps: float | None
    hardened_steps: float | None
    """Steps to *halfway*; None where it was not reached within the budget."""
    worked: bool
    """Whether the attack clearly lowered the loss on the original. If not, it says nothing."""

    @property
    def delay(self) -> float | None:
        """How many times as many steps the hardened model takes to *halfway*."""
        if not self.original_steps or self.hardened_steps is None:
            return None
        return self.hardened_steps / self.original_steps

    def as_json(self) -> dict[str, Any]:
        return {
            "attack": self.attack,
            "seeds": self.seeds,
            "worked_on_original": self.worked,
            "original": [{"step": p.step, "loss": p.loss} for p in self.original],
            "hardened": [{"step": p.step, "loss": p.loss} for p in self.hardened],
            "halfway_loss": self.halfway,
            "steps_to_halfway": {"original": self.original_steps, "hardened": self.hardened_steps},
            "delay": self.delay,
        }


def compare(trials: Sequence[Trial]) -> list[Comparison]:
    """One comparison for each attack, in the order the trials name them."""
    names = list(dict.fromkeys(trial.attack["spec"] for trial in trials))
    return [_compare(name, [t for t in trials if t.attack["spec"] == name]) for name in names]


def _compare(name: str, trials: Sequence[Trial]) -> Comparison:
    original = _mean([t for t in trials if t.model == "original"])
    hardened = _mean([t for t in trials if t.model == "hardened"])
    halfway = (original[0].loss + original[-1].loss) / 2
    return Comparison(
        attack=name,
        seeds=len({t.seed for t in trials}),
        original=original,
        hardened=hardened,
        halfway=halfway,
        original_steps=steps_to_reach(original, halfway),
        hardened_steps=steps_to_reach(hardened, halfway),
        worked=original[0].loss - original[-1].loss > SMALLEST_GAIN * original[0].loss,
    )


def _mean(trials: Sequence[Trial]) -> tuple[Point, ...]:
    return tuple(
        Point(group[0].step, fmean(p.loss for p in group)) for group in zip(*(t.points for t in trials), strict=True)
    )
