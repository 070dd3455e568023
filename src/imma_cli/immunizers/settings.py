"""What may be set about hardening in episodes: who attacks × what the outer step wants × what is held on to × where."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from imma_cli.errors import ImmaError
from imma_cli.immunizers.checking import STEPS
from imma_cli.immunizers.objectives import Aim
from imma_cli.immunizers.scope import Protect

if TYPE_CHECKING:
    from imma_cli.families.model import Model

Strength = Literal["low", "medium", "high"]
DRIFT: dict[Strength, float] = {"low": 0.002, "medium": 0.0045, "high": 0.008}
"""How far the predictions for other prompts may move, as `Retention.drift` measures it."""


@dataclass(frozen=True)
class EpisodesSettings:
    """One composition. The defaults are what came out best in benchmarks/resistance of those that cost about 5 % at most."""

    protect: Protect = "attention"
    strength: Strength = "medium"
    steps: int | None = None
    """Inner and outer steps together, for all attacks and concepts; None: as the model's size has it."""
    outer_learning_rate: float | None = None
    batch_size: int = 1
    seed: int = 0
    accumulate: int = 1
    """Batches whose gradients make one step, the attackers' and the outer ones."""
    eight_bit: bool = False
    """Whether AdamW's moments are held in 8 bits, both players'."""
    drift: float | None = None
    """How far the predictions for other prompts may move; None: as the strength has it."""
    side_by_side: bool = False
    """Whether every attack on every concept has one attacker from beginning to end, and they take turns in every cycle;
    otherwise there is one at a time, and each begins anew from the weights as they then are."""
    vary: bool = True
    """Whether the attackers' settings are drawn; otherwise they are as given."""
    shortest: int = 200
    longest: int = 300
    """How many steps an attacker makes, at least and at most, where there is one at a time; no more than lets every attack
    on every concept have its turn, and a third of the run."""
    inner_steps: int = 2
    """How many of them it makes before each outer step."""
    objective: Aim = "relative"
    margin: float = 1.5
    """Of the objective: times the original's loss, or the loss itself, beyond which an attacker's is not raised further."""
    outer_batch: int = 2
    """Pictures of the concept in an outer step."""
    keep_batch: int = 4
    """Noised pictures of other things in an outer step, each predicted with and without its prompt; 0: nothing is held on to."""
    anneal: bool = True
    """Whether the outer rate falls to zero over the run: the last steps would otherwise be mostly noise, which resists nobody."""
    checks: int = 3
    """How often along the way a short real attack is run on a copy, to stop where it gets no harder; 0: never. No more often
    than once in as many outer steps as the attack has."""

    def __post_init__(self) -> None:
        if self.inner_steps < 1 or not 1 <= self.shortest <= self.longest:
            raise ValueError("inner_steps is at least 1, and so is shortest, which is at most longest")
        if self.limit <= 0:
            raise ValueError("drift is above 0: to change nothing is no hardening")

    @property
    def limit(self) -> float:
        return DRIFT[self.strength] if self.drift is None else self.drift

    def cycles(self, model: Model) -> int:
        """How many outer steps there are."""
        return max(1, (self.steps or defaults_for(model).steps) // (1 + self.inner_steps))

    def require_enough(self, usual: int, pairs: int) -> None:
        """Raises ImmaError where not each of *pairs* attacks on concepts can be simulated; *usual* steps, where none are set."""
        if not pairs:
            raise ImmaError("There is no attack to immunize against.", hint="imma attacks lists the names.")
        steps, fewest = self.steps or usual, (1 + self.inner_steps) * pairs
        if steps < fewest:
            raise ImmaError(
                f"{pairs} attacks on concepts cannot all be simulated in {steps} steps.",
                hint=f"Give --steps {fewest} at least, and for any effect hundreds.",
            )

    def resolved(self, model: Model) -> EpisodesSettings:
        """With the numbers that depend on the model's size."""
        sizes = defaults_for(model)
        return replace(
            self,
            steps=self.steps or sizes.steps,
            outer_learning_rate=self.outer_learning_rate or sizes.outer_learning_rate,
        )

    def checks_in(self, cycles: int) -> int:
        """How many short attacks a run of *cycles* outer steps is worth."""
        return min(self.checks, cycles // STEPS)

    def simulated_steps(self, cycles: int, pairs: int) -> int:
        """How many steps an attacker makes at most, in a run of *cycles* against *pairs* attacks on concepts."""
        longest = math.ceil(cycles / pairs) if self.side_by_side else self.cycles_of_episode(cycles, pairs)[1]
        return longest * self.inner_steps

    def cycles_of_episode(self, cycles: int, pairs: int) -> tuple[int, int]:
        """The fewest and the most outer steps while one attacker is there, in a run of *cycles* against *pairs* attacks on
        concepts, one at a time."""
        longest = min(max(1, self.longest // self.inner_steps), max(1, cycles // max(3, pairs)))
        return min(max(1, self.shortest // self.inner_steps), longest), longest


@dataclass(frozen=True)
class Defaults:
    """What depends on the model's size."""

    steps: int
    outer_learning_rate: float
    kept_pictures: int
    noisings: int


SMALL = Defaults(steps=1500, outer_learning_rate=3e-4, kept_pictures=240, noisings=4)
FULL_SIZE = Defaults(steps=2000, outer_learning_rate=1e-5, kept_pictures=64, noisings=8)


def defaults_for(model: Model) -> Defaults:
    return SMALL if model.is_small else FULL_SIZE
