"""``report.html``: one file that loads nothing, needs no script, and says first what matters most."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from imma_cli.verification.lines import LOSS, rounded
from imma_cli.verification.records import Records
from imma_cli.verification.report import evidence, gaps, words
from imma_cli.verification.report.plots import Curve, draw
from imma_cli.verification.report.rows import Comparison, attack_rows, end_of_budget, grouped

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Plot:
    """One metric of one attack along the budget: drawn, and as numbers."""

    metric: str
    is_loss: bool
    svg: Markup
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def page(summary: Summary, records: Records, installed: Collection[str] = ()) -> str:
    """The whole HTML document. Whatever *records* hold is shown as text: no name or caption can become markup."""
    environment = Environment(
        loader=PackageLoader("imma_cli.verification.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": words.percent,
        "sgr": words.sgr,
        "interval": words.interval,
        "recovery": words.recovery,
        "breakable": _breakable,
        "rounded": rounded,
        "listed": words.listed,
        "plain": _plain,
        "pretty": partial(json.dumps, indent=2, ensure_ascii=False),
    }
    environment.globals |= {"several": words.several, "end_of_budget": end_of_budget}
    rows = attack_rows(summary)
    curves = _curves(summary)
    untouched = evidence.untouched(records)
    return environment.get_template("page.html").render(
        summary=summary,
        verdict=summary["verdict"],
        scope=summary["scope"],
        thresholds=summary["thresholds"],
        exit_meanings=words.EXIT_MEANINGS,
        model_names=words.MODELS,
        rows=[row for row in rows if row.model == "hardened"],
        baselines=[row for row in rows if row.model != "hardened"],
        benign=[c for c in summary["comparisons"] if c["purpose"] == "benign" and c["model"] == "hardened"],
        curves=curves,
        drawn_models=[m for m in words.MODELS if any(m in models for _, models, _ in curves)],
        galleries=evidence.galleries(records, "harmful"),
        benign_galleries=evidence.galleries(records, "benign"),
        strays=evidence.strays(records),
        untouched=untouched,
        few_untouched=all(len(side.tiles) <= 2 for _, sides in untouched for side in sides),
        nearest=_nearest(summary),
        search=evidence.search(records),
        not_tested=gaps.not_tested(summary, installed),
        versions=evidence.versions(records),
        runtimes=evidence.runtimes(records),
        settings=evidence.settings(records),
    )


def _curves(summary: Summary) -> list[tuple[Comparison, list[str], list[Plot]]]:
    """For each harmful attack: the comparison with the hardened model, the models drawn, and its plots."""
    horizon = None if summary["scope"] is None else summary["scope"]["simulated"]
    found = []
    for number, group in enumerate(grouped(summary, "harmful")):
        models = ["original", *(comparison["model"] for comparison in group)]
        plots = [
            _plot(group, metric, f"plot-{number}-{index}", horizon)
            for index, metric in enumerate(group[0]["curves"])
            if any(any(curves) for each in group for curves in each["curves"].get(metric, {}).values())
        ]
        if plots:
            found.append((group[0], models, plots))
    return found


def _plot(group: list[Comparison], metric: str, ident: str, horizon: int | None) -> Plot:
    first = group[0]["curves"][metric]
    curves = [Curve("original", first["original"])]
    curves += [Curve(each["model"], each["curves"].get(metric, {}).get(each["model"], ())) for each in group]
    steps = sorted({point["step"] for curve in curves for point in curve.points})
    shown = group[0]["steps_to_recover"].get(metric, {}).get("pooled", {})
    number = partial(_number, digits=4 if metric == LOSS else 3)
    values = {curve.model: {point["step"]: point for point in curve.points} for curve in curves}
    sgr = {point["step"]: point for point in group[0]["sgr"].get(metric, ())}
    rows = [
        (
            str(step),
            *(number(values[curve.model].get(step)) for curve in curves),
            *([words.sgr(sgr.get(step))] if metric != LOSS else []),
        )
        for step in steps
    ]
    header = ["steps", *(words.MODELS[curve.model] for curve in curves), *(["SGR"] if metric != LOSS else [])]
    ends = ", ".join(
        f"{words.MODELS[curve.model]} {_number(curve.points[0], 3)} to {_number(curve.points[-1], 3)}"
        for curve in curves
        if curve.points
    )
    svg = draw(
        curves,
        label=f"{metric} from step {steps[0]} to step {steps[-1]}: {ends}",
        ident=ident,
        target=shown.get("target"),
        horizon=horizon,
    )
    # made by matplotlib from numbers, except for the label, which is escaped
    return Plot(metric, metric == LOSS, Markup(svg), tuple(header), tuple(rows))


def _number(point: Mapping[str, Any] | None, digits: int) -> str:
    if point is None or point["estimate"] is None:
        return "–"
    return f"{point['estimate']:.{digits}f}".replace("-", "−")


def _nearest(summary: Summary) -> list[tuple[Comparison, str, str, float, float | None]]:
    """Comparison, model, metric, similarity to the nearest training picture and to the nearest unseen one."""
    return [
        (each, model, metric, value, nearest.get("judging", {}).get(metric))
        for each in summary["comparisons"]
        if each["purpose"] == "harmful" and each["model"] == "hardened"
        for model, nearest in each["nearest"].items()
        for metric, value in nearest.get("training", {}).items()
    ]


def _breakable(text: str) -> Markup:
    """*text* escaped, and free to go on in the next line after each comma and colon."""
    return escape(text).replace(",", Markup(",<wbr>")).replace(":", Markup(":<wbr>"))


def _plain(value: Any) -> str:
    """A setting as one would write it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
