"""Figures → pictures for docs/resistance.md."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from cases import UNDEFENDED
from figures import APART, Figures, Line, curve, prevented_share
from matplotlib import rcParams
from matplotlib.figure import Figure

rcParams["svg.hashsalt"] = "imma"  # the same lines give the same file
GOAL_UNTOUCHED, GOAL_BENIGN = 0.95, 0.05
"""Untouched similarity is to stay above the one, benign SGR below the other."""


def plot(found: Sequence[Figures], lines: Iterable[Line], folder: Path) -> list[Path]:
    """For each case one picture: loss along the budget of the attack that got most, and price against resistance
    to the attackers that every row has."""
    everything = list(lines)
    written = []
    for case in dict.fromkeys(each.case for each in found):
        rows = [each for each in found if each.case == case]
        figure = Figure(figsize=(10, 4), layout="constrained")
        curves, prices = figure.subplots(1, 2)
        attack = min(
            (a for each in rows for a in each.harmful if a.found == "default" and a.works),
            key=prevented_share,
            default=rows[0].harmful[0],
        )
        for row in (UNDEFENDED, *(each.row for each in rows)):
            own = [
                line
                for line in everything
                if (line["kind"], line["case"], line["row"], line.get("attack"), line.get("budget"))
                == ("harmful", case, row, attack.attack, attack.budget)
                and line["losses"]
            ]
            if own:
                course = curve(own)
                style = {"color": "black", "linestyle": "--"} if row == UNDEFENDED else {}
                curves.plot(list(course), list(course.values()), label=row, **style)
        curves.set(xlabel="attacker's steps", ylabel="denoising loss on unseen pictures", yscale="log")
        title = "\n".join(textwrap.wrap(attack.attack.replace(",", ", "), 52))
        curves.set_title(title, fontsize=9)
        curves.legend()
        # of more attackers the least is less, so only those count that every row has
        common = set.intersection(*({(a.attack, a.budget) for a in each.harmful} for each in rows))
        points = []
        for each in rows:
            counted = [a for a in each.harmful if (a.attack, a.budget) in common and a.found not in APART]
            kept = min((e.estimate or 0.0 for e in each.untouched.values()), default=None)
            if kept is not None:
                points.append((kept, 100 * min(map(prevented_share, counted)), each.row))
        beside = {row: number for number, (_, _, row) in enumerate(sorted(points))}
        for *point, row in points:
            prices.scatter(*([value] for value in point))
            # names of neighbours above and below, or they would cover each other
            prices.annotate(row, point, xytext=(4, -12 if beside[row] % 2 else 4), textcoords="offset points")
        prices.axvline(GOAL_UNTOUCHED, color="grey", linewidth=0.8)
        prices.margins(x=0.22, y=0.12)  # room for names
        prices.set(xlabel="untouched similarity", ylabel="least gain prevented, %")
        prices.set_title("price and resistance, by the attackers that every row has", fontsize=9)
        path = folder / f"resistance-{case}.svg"
        figure.savefig(path, metadata={"Date": None})
        written.append(path)
    return written


def trade_off(groups: Mapping[str, Sequence[Figures]], named: Mapping[str, str], path: Path) -> None:
    """What every variant prevents, on average over the attacks, against both prices; *named* are labelled, by row."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for (label, found), marker in zip(groups.items(), "o^.", strict=True):
        points = [(each, _costs(each), _prevented(each)) for each in found if _shares(each)]
        for axis, panel in enumerate(panels):
            shown = [(costs[axis], prevented) for _, costs, prevented in points if costs[axis] is not None]
            panel.scatter(
                [x for x, _ in shown],
                [y for _, y in shown],
                marker=marker,
                label=label,
                color="0.6" if marker == "." else None,
            )
            for each, costs, prevented in points:
                if costs[axis] is not None and each.row in named and marker != ".":
                    at = (costs[axis], prevented)
                    panel.annotate(named[each.row], at, xytext=(5, 4), textcoords="offset points", fontsize=8)
    for panel, limit, name in zip(
        panels, (GOAL_UNTOUCHED, 100 * GOAL_BENIGN), ("untouched similarity", "benign SGR, %"), strict=True
    ):
        panel.axvline(limit, color="grey", linewidth=0.8, linestyle=":")
        panel.set(xlabel=name)
    for panel in panels:
        panel.margins(x=0.4, y=0.08)  # room for names
    panels[0].invert_xaxis()  # the price rises to the right in both
    panels[0].set(ylabel="attackers' gain prevented, %, mean over the attacks")
    panels[1].legend()
    figure.savefig(path, metadata={"Date": None})


def _costs(each: Figures) -> tuple[float | None, float | None]:
    """Untouched similarity by the metric that shows least, and benign SGR in percent."""
    price = each.price()
    untouched = min((e.estimate for e in each.untouched.values() if e.estimate is not None), default=None)
    return untouched, None if price is None or price[2].estimate is None else 100 * price[2].estimate


def _shares(each: Figures) -> list[float]:
    """The shares of their gain that attacks which work do not get."""
    shares = [a.prevented.estimate for a in each.harmful if a.found not in APART and a.works]
    return [share for share in shares if share is not None]


def _prevented(each: Figures) -> float:
    return 100 * fmean(_shares(each))
