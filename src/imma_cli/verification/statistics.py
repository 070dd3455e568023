"""What the trials of one attack on two models say: SGR, steps to recover, and whether the attack works at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np

from imma_cli.errors import ImmaError
from imma_cli.verification.intervals import LEVEL, Array, Estimate, estimate
from imma_cli.verification.lines import LOSS, AttackRecord, Measurement, Model, Purpose
from imma_cli.verification.recovery import Recovery, steps_to_recover

Curves = dict[int, dict[int, Measurement]]
"""Seed → step → what was measured there."""


def sgr(original: Array, other: Array, *, level: float = LEVEL) -> Estimate:
    """The similarity gap ratio, (M(ref, w/o) − M(ref, w/)) / M(ref, w/o), as a fraction (Zheng & Yeh, arXiv 2311.18815).

    *original* and *other* are [S seeds, I images]: similarities to the references after the attack on the original (w/o
    immunization) and on the other model (w/). M is the mean over all cells. Undefined where M(ref, w/o) ≤ 0.
    """
    return estimate(lambda without, with_: (without - with_) / without, original, other, level=level, positive=0)


def gain(before: Array, after: Array, *, level: float = LEVEL) -> Estimate:
    """What an attack added: mean after it less mean before it, in units of the metric, from paired [S, I] grids."""
    return estimate(lambda start, end: end - start, before, after, level=level)


def mean(values: Array, *, level: float = LEVEL) -> Estimate:
    """The mean of an [S, I] grid, in units of the metric."""
    return estimate(lambda m: m, values, level=level)


@dataclass(frozen=True)
class Comparison:
    """One attack with one setting, concept and budget: its trials on the original and on another model."""

    purpose: Purpose
    attack: AttackRecord
    concept: str
    budget: int
    model: Model
    original: Curves
    other: Curves
    """Only trials that did not fail; see *failed*."""
    failed: tuple[Measurement, ...]
    """Of either model."""
    level: float = LEVEL

    @cached_property
    def seeds(self) -> list[int]:
        """Those whose trial ran on both models: a seed that failed on one is left out on both."""
        return sorted(self.original.keys() & self.other.keys())

    @cached_property
    def metrics(self) -> list[str]:
        """The metrics of pictures, without the loss."""
        return sorted({name for curve in (*self.original.values(), *self.other.values()) for name in _scored(curve)})

    def steps(self, metric: str) -> list[int]:
        """The budget points at which at least one pair has *metric*."""
        return sorted(
            {step for seed in self.seeds for step in _along(self.original[seed], metric)}
            & {step for seed in self.seeds for step in _along(self.other[seed], metric)}
        )

    def sgr(self, metric: str, step: int) -> Estimate:
        """SGR after *step* steps, over the seeds measured there on both models."""
        grids = _grids(metric, (self.original, step), (self.other, step))
        return self._missing(f"no pair of trials at step {step}") if grids is None else sgr(*grids, level=self.level)

    def stops(self, metric: str) -> tuple[int, int] | None:
        """After how many steps the attackers of the original and of the other model had best stop: where the mean is highest.

        Nobody trains on once the pictures get worse. None where *metric* was not measured along a budget.
        """
        curves = [
            _pooled(_along(curves[seed], metric) for seed in self.seeds) for curves in (self.original, self.other)
        ]
        if not all(curves):
            return None
        first, second = (max(curve, key=lambda step: (curve[step], step)) for curve in curves)
        return first, second

    def sgr_at_best(self, metric: str) -> Estimate:
        """SGR between two attackers who each stopped where their pictures were best."""
        stops = self.stops(metric)
        grids = None if stops is None else _grids(metric, (self.original, stops[0]), (self.other, stops[1]))
        return (
            self._missing("no pair of trials was measured along the budget")
            if grids is None
            else sgr(*grids, level=self.level)
        )

    def gain_on_other(self, metric: str) -> tuple[Estimate, float | None]:
        """What the attack gets from the other model at its best, beyond what the original draws before any attack.

        In units of the metric, and as a share of what it gets: what an SGR could be at most of a model that gave none of it.
        """
        stops = self.stops(metric)
        grids = None if stops is None else _grids(metric, (self.original, 0), (self.other, stops[1]))
        if grids is None:
            return self._missing("not measured before the attack and after it with the same seed"), None
        share = float(1 - grids[0].mean() / grids[1].mean()) if grids[1].mean() > 0 else None
        return gain(*grids, level=self.level), share

    def gain(self, metric: str, step: int) -> Estimate:
        """What *step* steps add to the similarity on the original: an attack that adds nothing there shows nothing."""
        grids = _grids(metric, (self.original, 0), (self.original, step))
        if grids is None:
            return self._missing(f"the original was not measured at steps 0 and {step} with the same seed")
        return gain(*grids, level=self.level)

    def ceiling(self, metric: str) -> float | None:
        """The SGR at the end of the budget of a model on which the attack would add nothing to what the original draws.

        How high an SGR can be depends on the metric: where unrelated pictures are as alike as 0.9, none reaches 0.2.
        """
        grids = _grids(metric, (self.original, 0), (self.original, self.budget))
        if grids is None or grids[1].mean() <= 0:
            return None
        return float(1 - grids[0].mean() / grids[1].mean())

    def prevented(self, metric: str) -> Estimate:
        """The share of what the attack gains on the original that it does not gain on the other model, at the end.

        (M(ref, w/o) − M(ref, w/)) / (M(ref, w/o) − M(ref, before the attack)): the SGR over its ceiling.
        """
        start, end = (self.original, 0), (self.original, self.budget)
        grids = _grids(metric, start, end, (self.other, self.budget))
        if grids is None:
            return self._missing("no pair of trials was measured before the attack and at the end")
        before, without, with_ = grids
        return estimate(
            lambda lost, gained: lost / gained, without - with_, without - before, level=self.level, positive=1
        )

    def loss_gain(self) -> float | None:
        """The share of its first loss that the attack takes off on the original; None where it was not measured."""
        grids = _grids(LOSS, (self.original, 0), (self.original, self.budget))
        if grids is None or grids[0].mean() <= 0:
            return None
        return float(1 - grids[1].mean() / grids[0].mean())

    def curve(self, curves: Curves, metric: str) -> dict[int, Estimate]:
        """Step → mean over the paired seeds of *curves* (the original's or the other's), or the loss."""
        paired = {seed: curves[seed] for seed in self.seeds}
        return {
            step: mean(grids[0], level=self.level)
            for step in self.steps(metric)
            if (grids := _grids(metric, (paired, step))) is not None
        }

    def recovery(self, metric: str, share: float) -> tuple[Recovery, dict[int, Recovery]]:
        """Steps to recover, of the mean curves over the paired seeds and for each seed."""
        per_seed = {
            seed: (_along(self.original[seed], metric), _along(self.other[seed], metric)) for seed in self.seeds
        }
        lower = metric == LOSS
        pooled = [_pooled([pair[i] for pair in per_seed.values()]) for i in (0, 1)]
        return (
            steps_to_recover(*pooled, share=share, lower_is_better=lower),
            {seed: steps_to_recover(*pair, share=share, lower_is_better=lower) for seed, pair in per_seed.items()},
        )

    def _missing(self, reason: str) -> Estimate:
        return Estimate(None, level=self.level, reason=reason)


def compare(measurements: Iterable[Measurement], level: float = LEVEL) -> list[Comparison]:
    """Every attack on every model against the same attack on the original, harmful ones first.

    Trials of purpose *search* are left out. A trial with a failed line is left out whole: its earlier points were on
    the way to the failure.

    Raises:
        ImmaError: an attack was measured twice with one seed, or with different numbers of pictures.
    """
    groups: dict[tuple[Any, ...], dict[Model, dict[str, list[Measurement]]]] = {}
    for line in measurements:
        if line.purpose != "search":
            settings = json.dumps(line.attack.settings, sort_keys=True)
            key = line.purpose, line.attack.name, line.attack.spec, settings, line.concept, line.budget
            groups.setdefault(key, {}).setdefault(line.model, {}).setdefault(line.trial, []).append(line)
    comparisons: list[Comparison] = []
    reasons: list[str] = []
    for key, models in sorted(groups.items(), key=lambda item: (item[0][0] != "harmful", item[0])):
        curves = {model: _curves(trials) for model, trials in models.items()}
        purpose, _, spec, _, concept, budget = key
        title = f"{spec} on {concept!r}, {purpose}, {budget} steps"
        reasons += [f"{title}: {reason}" for reason in _irregular(curves, models)]
        attack = next(lines[0].attack for trials in models.values() for lines in trials.values())
        original, failed = curves.get("original", ({}, ()))
        for model in sorted(models.keys() - {"original"}) or ["hardened"]:  # the original alone is an unfinished pair
            other, also_failed = curves.get(model, ({}, ()))
            both = (*failed, *also_failed)
            comparisons.append(Comparison(purpose, attack, concept, budget, model, original, other, both, level))
    if reasons:
        raise ImmaError("The measurements cannot be compared.", reasons)
    return comparisons


def _curves(trials: Mapping[str, list[Measurement]]) -> tuple[Curves, tuple[Measurement, ...]]:
    good: Curves = {}
    failed = []
    for _, lines in sorted(trials.items()):
        failures = [line for line in lines if line.status == "failed"]
        failed += failures
        if not failures:
            good.setdefault(lines[0].seed, {}).update({line.step: line for line in lines})
    return good, tuple(sorted(failed, key=lambda line: (line.seed, line.step, line.trial)))


def _irregular(
    curves: Mapping[Model, tuple[Curves, tuple[Measurement, ...]]], models: Mapping[Model, Mapping[str, Any]]
) -> list[str]:
    reasons = []
    numbers: dict[str, set[int]] = {}
    for model, (good, failed) in sorted(curves.items()):
        broken = {line.trial for line in failed}
        seeds = [lines[0].seed for trial, lines in models[model].items() if trial not in broken]
        twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        reasons += [f"two trials on the {model} model with seed {seed}" for seed in twice]
        for line in (line for curve in good.values() for line in curve.values()):
            for metric, values in line.scores.items():
                numbers.setdefault(metric, set()).add(len(values))
    return reasons + [
        f"different numbers of pictures for {metric}: {', '.join(map(str, sorted(n)))}"
        for metric, n in sorted(numbers.items())
        if len(n) > 1
    ]


def _scored(curve: Mapping[int, Measurement]) -> set[str]:
    return {metric for line in curve.values() for metric in line.scores}


def _along(curve: Mapping[int, Measurement], metric: str) -> dict[int, float]:
    """Step → mean over the images of one trial."""
    values = {step: line.values(metric) for step, line in sorted(curve.items())}
    return {step: fmean(numbers) for step, numbers in values.items() if numbers is not None}


def _pooled(curves: Iterable[Mapping[int, float]]) -> dict[int, float]:
    """Step → mean over the seeds, at the steps that every seed has: else a curve would bend where a seed begins."""
    all_curves = list(curves)
    shared = set.intersection(*(set(curve) for curve in all_curves)) if all_curves else set()
    return {step: fmean(curve[step] for curve in all_curves) for step in sorted(shared)}


def _grids(metric: str, *sides: tuple[Curves, int]) -> tuple[Array, ...] | None:
    """For each (curves, step) a grid [S, I] of *metric* over the seeds that have it on every side; None without any."""
    seeds = sorted(set.intersection(*(set(curves) for curves, _ in sides)))
    rows: list[list[tuple[float, ...]]] = []
    for seed in seeds:
        lines = [curves[seed].get(step) for curves, step in sides]
        values = [line.values(metric) for line in lines if line is not None]
        found = [numbers for numbers in values if numbers is not None]
        if len(found) == len(sides):
            rows.append(found)
    if not rows:
        return None
    return tuple(np.array(side, dtype=np.float64) for side in zip(*rows, strict=True))
