"""Means with a confidence interval, over attack seeds and pictures at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

Array = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 9999
SEED = 1987
"""Of the resampling: the same lines give the same interval, digit by digit."""

MIN_UNITS = 4
"""Fewest units (seeds or pictures) to resample. Of three, 1 resample in 27 takes one unit three times: more than the 2.5 %
that lie beyond each bound, so that the bounds would only repeat the extremes."""

ROUNDING = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A number, and how far it can be trusted. What could not be computed is None, and *reason* says why."""

    estimate: float | None
    low: float | None = None
    high: float | None = None
    level: float = LEVEL
    seeds: int = 0
    images: int = 0
    reason: str = ""

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.low is not None and self.low > 0

    @property
    def difference_shown(self) -> bool:
        """Whether the interval leaves out 0. Without an interval nothing is shown."""
        return self.above_zero or (self.high is not None and self.high < 0)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"difference_shown": self.difference_shown}


def estimate(
    statistic: Callable[..., Array],
    *samples: Array,
    level: float = LEVEL,
    positive: int | None = None,
    resamples: int = RESAMPLES,
) -> Estimate:
    """``statistic(mean of the first sample, mean of the second, …)`` with a paired BCa bootstrap interval.

    Every sample is a grid [S seeds, I images]; the same cell of each is a pair. A resample draws S seeds and,
    independently, I images with replacement, and takes from every sample the cells where they cross: neither the
    images of one seed nor the seeds of one image are independent, so both must be drawn (the pigeonhole bootstrap,
    Owen 2007, Annals of Applied Statistics 1(2), 386–411). A factor with a single unit is held fixed.

    The bounds are those of Efron 1987 (Better bootstrap confidence intervals, JASA 82, 171–185): the quantiles
    Φ(z₀ + (z₀ + z) / (1 − a (z₀ + z))) of the resampled statistic, z = Φ⁻¹((1 ∓ level) / 2), where

    - bias correction z₀ = Φ⁻¹(share of resamples below the estimate, ties counting half);
    - acceleration a = Σ_f ΣU³/n_f³ / (6 (Σ_f ΣU²/n_f²)^1.5): leaving out unit i of factor f (one seed, or one image
      from all seeds) gives θ_i, and U_i = (n_f − 1)(mean θ − θ_i). Adding up over the factors is what is done for several
      independent samples; with one factor this is Efron's formula.

    With one seed or one image it is the interval of ``scipy.stats.bootstrap(method="BCa", paired=True)``.

    Args:
        statistic: works elementwise on arrays of means.
        positive: index of a sample whose mean is a denominator; where it, or any resample of it, is not above 0, what
            depends on it is not computable.
    """
    seeds, images = samples[0].shape
    means = [np.asarray(sample.mean()) for sample in samples]
    undefined = Estimate(None, level=level, seeds=seeds, images=images)
    if positive is not None and means[positive] <= 0:
        return _but(undefined, "the mean it is divided by is not above 0")
    point = float(statistic(*means))
    if not np.isfinite(point):
        return _but(undefined, "the numbers are too large")
    alone = _but(undefined, estimate=point)
    if max(seeds, images) < MIN_UNITS:
        return _but(alone, f"no interval: fewer than {MIN_UNITS} seeds and fewer than {MIN_UNITS} images")
    by_seed, by_image = _weights(seeds, images, resamples)
    resampled = [((by_seed @ sample) * by_image).sum(axis=1) for sample in samples]
    if positive is not None and (resampled[positive] <= 0).any():
        return _but(alone, "no interval: the mean it is divided by is not safely above 0")
    values = statistic(*resampled)
    rounding = ROUNDING * max(1.0, abs(point))
    if not np.isfinite(values).all():
        return _but(alone, "no interval: the numbers are too large")
    if np.ptp(values) <= rounding:
        return _but(alone, "no interval: every resample gives the same number")
    below = ((values < point - rounding).mean() + (values <= point + rounding).mean()) / 2
    if not 0 < below < 1:
        return _but(alone, "no interval: every resample lies on the same side")
    bias = ndtri(below)
    shifted = bias + ndtri(np.array([(1 - level) / 2, (1 + level) / 2]))
    stretch = 1 - _acceleration(statistic, samples) * shifted
    if not (stretch > 0).all():
        return _but(alone, "no interval: a few seeds or images decide everything")
    low, high = np.quantile(values, ndtr(bias + shifted / stretch))
    return Estimate(point, float(low), float(high), level, seeds, images)


def _but(base: Estimate, reason: str = "", estimate: float | None = None) -> Estimate:
    point = base.estimate if estimate is None else estimate
    return Estimate(point, level=base.level, seeds=base.seeds, images=base.images, reason=reason)


@lru_cache(maxsize=4)
def _weights(seeds: int, images: int, resamples: int) -> tuple[Array, Array]:
    """How much each seed [R, S] and each image [R, I] counts in each resample; every row adds up to 1.

    Kept, because a study asks for hundreds of intervals over grids of the same shape.
    """
    rng = np.random.default_rng(SEED)
    return tuple(rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n for n in (seeds, images))  # type: ignore[return-value]


def _acceleration(statistic: Callable[..., Array], samples: tuple[Array, ...]) -> float:
    cubes = squares = 0.0
    for axis in (0, 1):
        n = samples[0].shape[axis]
        if n == 1:
            continue
        # the mean without unit i: the whole sum less that of the unit
        totals = [s.mean(axis=1 - axis) for s in samples]
        left_out = statistic(*((t.sum() - t) / (n - 1) for t in totals))
        influence = (n - 1) * (left_out.mean() - left_out)
        cubes += float((influence**3).sum()) / n**3
        squares += float((influence**2).sum()) / n**2
    # a denominator near 0 can make a left-out ratio infinite; then, as without spread, there is no skew to correct for
    if not np.isfinite(cubes) or not 0 < squares < np.inf:
        return 0.0
    return float(cubes / (6 * squares**1.5))
