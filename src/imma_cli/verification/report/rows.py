"""The results table, row by row, from a summary alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from imma_cli.verification.lines import rounded
from imma_cli.verification.report import words

NOT_JUDGED = "it adds too little on the original to be judged"
Summary = Mapping[str, Any]
Comparison = Mapping[str, Any]


@dataclass(frozen=True)
class MetricRow:
    """One metric of one attack on one model."""

    metric: str
    sgr: Mapping[str, Any] | None
    """Estimate at the end of the budget, or where the attackers had best stop if that decides; None where it was not measured."""
    stopped: int | None
    """After how many steps the hardened model's attacker then stops."""
    judged: bool
    """False for a metric that the thresholds leave out, or in which the attack does not show on the original."""
    decides: bool
    prevented: Mapping[str, Any] | None
    """Estimate: the share of the attack's gain on the original that it does not make on this model."""
    ceiling: float | None
    """The SGR that preventing all of that gain would be."""
    recovery: str
    benign: Mapping[str, Any] | None
    """Estimate: the largest SGR of ordinary fine-tuning in the same way; None where there is none."""


@dataclass(frozen=True)
class AttackRow:
    """One attack, with the setting that it was judged in, on one changed model."""

    model: str
    name: str
    spec: str
    concept: str
    budget: int
    seeds: tuple[int, ...]
    metrics: tuple[MetricRow, ...]
    """The one that decides comes first."""
    verdict: str
    reason: str

    @property
    def setting(self) -> str:
        """What was set, as typed; empty where every setting had its default."""
        return rounded(self.spec).partition(":")[2]

    @property
    def deciding(self) -> MetricRow | None:
        """The metric that decided, else the first."""
        return self.metrics[0] if self.metrics else None

    @property
    def benign(self) -> Mapping[str, Any] | None:
        """The largest benign SGR by any metric: a price is not less for another metric's not seeing it."""
        return largest(row.benign for row in self.metrics)


def attack_rows(summary: Summary) -> list[AttackRow]:
    """The harmful attacks on the hardened model, then those on the baselines."""
    harmful = [c for c in summary["comparisons"] if c["purpose"] == "harmful"]
    ordered = sorted(harmful, key=lambda c: c["model"] != "hardened")
    return [_row(each, summary) for each in ordered]


def end_of_budget(comparison: Comparison, metric: str) -> Mapping[str, Any] | None:
    """The estimate of the SGR at the last step of the budget."""
    points = comparison["sgr"].get(metric, ())
    return next((point for point in points if point["step"] == comparison["budget"]), None)


def largest(estimates: Iterable[Mapping[str, Any] | None]) -> Mapping[str, Any] | None:
    """The largest of the estimates that could be computed; if none could, one that says why."""
    there = [e for e in estimates if e is not None]
    known = [e for e in there if e["estimate"] is not None]
    return max(known, key=lambda e: float(e["estimate"])) if known else next(iter(there), None)


def setting_of(comparison: Comparison) -> tuple[str, ...]:
    """What two comparisons share that show the same attack on different models."""
    attack = comparison["attack"]
    settings = json.dumps(attack["settings"], sort_keys=True)
    return attack["name"], attack["spec"], settings, comparison["concept"], str(comparison["budget"])


def grouped(summary: Summary, purpose: str) -> Iterator[list[Comparison]]:
    """The comparisons of one attack setting each, the hardened model first."""
    groups: dict[tuple[str, ...], list[Comparison]] = {}
    for each in summary["comparisons"]:
        if each["purpose"] == purpose:
            groups.setdefault(setting_of(each), []).append(each)
    for group in groups.values():
        yield sorted(group, key=lambda c: (c["model"] != "hardened", c["model"]))


def _row(comparison: Comparison, summary: Summary) -> AttackRow:
    judgement = comparison["judgement"]
    judging = comparison["validity"]["metrics"]
    stopped = judgement["stopped"] if judgement["sgr"] else None
    metrics = [
        MetricRow(
            metric,
            judgement["sgr"] if metric == judgement["metric"] and stopped else end_of_budget(comparison, metric),
            stopped if metric == judgement["metric"] else None,
            metric in judging,
            metric == judgement["metric"],
            comparison["prevented"].get(metric),
            comparison["validity"]["sgr_ceiling"].get(metric),
            words.recovery(comparison["steps_to_recover"][metric]["pooled"]),
            _benign(comparison, metric, summary),
        )
        for metric in comparison["sgr"]
    ]
    return AttackRow(
        comparison["model"],
        comparison["attack"]["name"],
        comparison["attack"]["spec"],
        comparison["concept"],
        comparison["budget"],
        tuple(comparison["seeds"]["paired"]),
        tuple(sorted(metrics, key=lambda row: (not row.decides, not row.judged, row.metric))),
        "does not count" if not judgement["counts"] else judgement["verdict"],
        judgement["reason"],
    )


def _benign(comparison: Comparison, metric: str, summary: Summary) -> Mapping[str, Any] | None:
    """In the same setting if it was measured so, else with the same attack."""
    benign = [c for c in summary["comparisons"] if c["purpose"] == "benign" and c["model"] == comparison["model"]]
    attack = comparison["attack"]
    same = [c for c in benign if c["attack"] == attack] or [c for c in benign if c["attack"]["name"] == attack["name"]]
    judged = [c for c in same if metric in c["validity"]["metrics"]]
    if same and not judged:
        return {"estimate": None, "low": None, "high": None, "difference_shown": False, "reason": NOT_JUDGED}
    return largest(end_of_budget(c, metric) for c in judged)
