"""How many steps an attacker needs to get back what it gets from the original."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Recovery:
    """How many steps an attacker needs on the other model to get (nearly) as far as on the original."""

    steps: float | None
    """None: never within the steps measured (*censored_at*), or not defined (*reason*)."""
    censored_at: int | None = None
    original_steps: float | None = None
    """The same count on the original."""
    target: float | None = None
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def steps_to_recover(
    original: Mapping[int, float], other: Mapping[int, float], *, share: float = 0.9, lower_is_better: bool = False
) -> Recovery:
    """Steps until the attack on *other* reaches *share* of the gain that it makes on the original.

    Both curves are step → similarity (or loss, with *lower_is_better*). The gain goes from the un-attacked original
    (step 0) to the best point of its curve, so the target is the same for every model: start + share × (best − start).
    Between two budget points the curve is taken to be straight.
    """
    if 0 not in original:
        return Recovery(None, reason="the original was not measured before the attack")
    if not other:
        return Recovery(None, reason="no measurement")
    sign = -1 if lower_is_better else 1
    start, best = original[0], sign * max(sign * value for value in original.values())
    if best == start:
        return Recovery(None, target=start, reason="the attack gains nothing on the original")
    target = start + share * (best - start)
    steps = _first_at(other, target, sign)
    censored_at = max(other) if steps is None else None
    return Recovery(steps, censored_at, _first_at(original, target, sign), target)


def _first_at(curve: Mapping[int, float], target: float, sign: int) -> float | None:
    points = sorted(curve.items())
    if sign * (points[0][1] - target) >= 0:
        return float(points[0][0])
    for (step, value), (after, reached) in itertools.pairwise(points):
        if sign * (reached - target) >= 0:
            return step + (target - value) / (reached - value) * (after - step)
    return None
