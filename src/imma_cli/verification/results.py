"""``summary.json``: everything a report needs, computed from the raw lines alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from statistics import fmean
from typing import Any

from imma_cli.verification.judgement import Judgement, Thresholds, judge, validity
from imma_cli.verification.lines import LOSS, Line, Measurement
from imma_cli.verification.records import Records
from imma_cli.verification.recovery import Recovery
from imma_cli.verification.statistics import Comparison, Curves, compare
from imma_cli.verification.verdict import overall, untouched_similarity

SUMMARY_SCHEMA = 1


def summarize(measurements: Records | Iterable[Line], thresholds: Thresholds | None = None) -> dict[str, Any]:
    """What ``summary.json`` holds; see docs/verification-schema.md. The order of the lines does not matter.

    Raises:
        ImmaError: the lines contradict each other or cannot be compared.
    """
    thresholds = thresholds or Thresholds()
    records = measurements if isinstance(measurements, Records) else Records.of(measurements)
    comparisons = compare(records.measurements, thresholds.level)
    judged = [(each, judge(each, thresholds) if each.purpose == "harmful" else None) for each in comparisons]
    attacks = [(c, j) for c, j in judged if j is not None and c.model == "hardened"]
    benign = [each for each in comparisons if each.purpose == "benign" and each.model == "hardened"]
    untouched = {line.model: untouched_similarity(line, thresholds) for line in records.untouched}
    verdict = overall(attacks, benign, untouched.get("hardened", {}), thresholds, records.notes)
    lines = (*records.measurements, *records.untouched, *records.weights)
    study = next((line.study for line in lines), None)
    return {
        "schema": SUMMARY_SCHEMA,
        "study": study,
        "scope": None if records.study is None else records.study.as_json(),
        "thresholds": asdict(thresholds) | {"metrics": list(thresholds.metrics)},
        "verdict": verdict.as_json(),
        "worst_case": {
            "end_of_budget": _worst(comparisons, thresholds, ends_only=True),
            "any_point": _worst(comparisons, thresholds, ends_only=False),
            "best_points": _worst_at_best(comparisons, thresholds),
        },
        "comparisons": [_comparison(each, judgement, thresholds) for each, judgement in judged],
        "failed": [_failure(line) for line in records.measurements if line.status == "failed"],
        "search_trials": len({line.trial for line in records.measurements if line.purpose == "search"}),
        "untouched": [
            {
                "model": line.model,
                "similarity": {metric: found.as_json() for metric, found in untouched[line.model].items()},
                "yardsticks": {
                    name: {metric: fmean(values) for metric, values in sorted(scores.items())}
                    for name, scores in sorted(line.yardsticks.items())
                },
            }
            for line in records.untouched
        ],
        "weight_distances": {line.model: line.distances for line in records.weights},
        "notes": list(records.notes),
    }


def _worst(comparisons: Iterable[Comparison], thresholds: Thresholds, *, ends_only: bool) -> dict[str, Any] | None:
    """The lowest SGR among harmful attacks on the hardened model, at points where the attack works on the original.

    Where it does not work yet, both models draw what they drew before, and the SGR is near 0 for no reason of the defence.
    """
    found = []
    for each in comparisons:
        if each.purpose != "harmful" or each.model != "hardened":
            continue
        for metric in thresholds.judged(each.metrics):
            for step in [each.budget] if ends_only else each.steps(metric):
                sgr = each.sgr(metric, step)
                if step > 0 and sgr.estimate is not None and each.gain(metric, step).above_zero:
                    where = {"attack": asdict(each.attack), "concept": each.concept, "budget": each.budget}
                    found.append((sgr.estimate, {**where, "metric": metric, "step": step, "sgr": sgr.as_json()}))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _worst_at_best(comparisons: Iterable[Comparison], thresholds: Thresholds) -> dict[str, Any] | None:
    """The lowest SGR between attackers who stop where their pictures are best, among attacks that work on the original."""
    found = []
    for each in comparisons:
        for metric in thresholds.judged(each.metrics) if (each.purpose, each.model) == ("harmful", "hardened") else ():
            sgr, stops = each.sgr_at_best(metric), each.stops(metric)
            if sgr.estimate is not None and stops is not None and each.gain(metric, stops[0]).above_zero:
                where = {"attack": asdict(each.attack), "concept": each.concept, "budget": each.budget}
                found.append((sgr.estimate, {**where, "metric": metric, "step": stops[1], "sgr": sgr.as_json()}))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _comparison(each: Comparison, judgement: Judgement | None, thresholds: Thresholds) -> dict[str, Any]:
    with_loss = [*each.metrics, LOSS]
    valid = validity(each, thresholds)
    return {
        "purpose": each.purpose,
        "model": each.model,
        "attack": asdict(each.attack),
        "concept": each.concept,
        "budget": each.budget,
        "seeds": {"original": sorted(each.original), each.model: sorted(each.other), "paired": each.seeds},
        "failed_seeds": sorted({line.seed for line in each.failed}),
        "validity": asdict(valid)
        | {
            "metrics": list(valid.metrics),
            "gain": {metric: each.gain(metric, each.budget).as_json() for metric in each.metrics},
            "loss_gain": each.loss_gain(),
            "sgr_ceiling": {metric: each.ceiling(metric) for metric in each.metrics},
        },
        "prevented": {metric: each.prevented(metric).as_json() for metric in each.metrics},
        "sgr": {
            metric: [{"step": step, **each.sgr(metric, step).as_json()} for step in each.steps(metric)]
            for metric in each.metrics
        },
        "sgr_at_best": {metric: _at_best(each, metric) for metric in each.metrics},
        "curves": {
            metric: {
                name: [{"step": step, **point.as_json()} for step, point in each.curve(curves, metric).items()]
                for name, curves in (("original", each.original), (each.model, each.other))
            }
            for metric in with_loss
        },
        "nearest": {
            name: _nearest(curves, each.budget)
            for name, curves in (("original", each.original), (each.model, each.other))
        },
        "steps_to_recover": {metric: _recovery(*each.recovery(metric, thresholds.recovered)) for metric in with_loss},
        "judgement": None if judgement is None else _judgement(judgement),
    }


def _at_best(each: Comparison, metric: str) -> dict[str, Any]:
    original, other = each.stops(metric) or (None, None)
    return {"steps": {"original": original, each.model: other}, **each.sgr_at_best(metric).as_json()}


def _nearest(curves: Curves, step: int) -> dict[str, dict[str, float]]:
    """training or judging → metric → mean similarity of the generated pictures to the nearest of these."""
    found: dict[str, dict[str, list[float]]] = {}
    for curve in curves.values():
        if step in curve:
            for whose, scores in curve[step].nearest.items():
                for metric, values in scores.items():
                    found.setdefault(whose, {}).setdefault(metric, []).extend(values)
    return {
        whose: {metric: fmean(values) for metric, values in sorted(scores.items())}
        for whose, scores in sorted(found.items())
    }


def _recovery(pooled: Recovery, per_seed: Mapping[int, Recovery]) -> dict[str, Any]:
    return {"pooled": pooled.as_json(), "per_seed": {str(seed): each.as_json() for seed, each in per_seed.items()}}


def _judgement(judgement: Judgement) -> dict[str, Any]:
    sgr = None if judgement.sgr is None else judgement.sgr.as_json()
    return {
        "verdict": judgement.verdict,
        "reason": judgement.reason,
        "counts": judgement.counts,
        "metric": judgement.metric,
        "sgr": sgr,
        "stopped": judgement.stopped,
    }


def _failure(line: Measurement) -> dict[str, Any]:
    return {
        "trial": line.trial,
        "purpose": line.purpose,
        "model": line.model,
        "attack": line.attack.spec,
        "concept": line.concept,
        "seed": line.seed,
        "step": line.step,
        "reason": line.reason,
    }
