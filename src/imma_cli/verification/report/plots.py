"""Budget curves as SVG that takes its colours from the page, so that one drawing serves light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

from matplotlib import rc_context, rcdefaults, rcParams
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK: Final = "#050505"
FAINT: Final = "#060606"
STYLES: Final[Mapping[str, dict[str, Any]]] = {
    "original": {"color": "#010101", "marker": "o"},
    "hardened": {"color": "#020202", "marker": "s"},
    "maximize": {"color": "#030303", "marker": "^", "linestyle": "--"},
    "random": {"color": "#040404", "marker": "v", "linestyle": ":"},
}
CSS: Final[Mapping[str, str]] = {
    **{style["color"]: f"var(--{model})" for model, style in STYLES.items()},
    INK: "currentColor",
    FAINT: "var(--rule)",
}
"""Colours that matplotlib draws with → what stands in their place on the page."""

SETTINGS: Final[dict[Any, Any]] = {
    "svg.hashsalt": "imma",  # the same plot has the same bytes
    "svg.fonttype": "none",
    "font.size": 9.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "path.simplify": False,
}


@dataclass(frozen=True)
class Curve:
    """How one model's numbers go along the budget."""

    model: str
    points: Sequence[Mapping[str, Any]]
    """Estimates with their step, as in a summary."""


def draw(curves: Sequence[Curve], *, label: str, ident: str, target: float | None, horizon: int | None) -> str:
    """An ``<svg>`` element for a page that defines the variables in `CSS`.

    *label* describes it for those who cannot see it; *ident* keeps its ids apart from those of other plots; *target* is
    where an attacker has recovered the concept, *horizon* how many steps hardening simulated.
    """
    with rc_context():
        rcdefaults()  # a matplotlibrc must not change the page
        rcParams.update(SETTINGS)
        figure = Figure(figsize=(4.2, 2.6), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("attack steps")
        if horizon:
            axes.axvline(horizon, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
        if target is not None:
            axes.axhline(target, color=INK, linewidth=0.7, linestyle=(0, (1, 2)))
        for curve in curves:
            _add(axes, curve)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(buffer.getvalue(), label, ident)


def _add(axes: Any, curve: Curve) -> None:
    style = STYLES[curve.model]
    known = [point for point in curve.points if point["estimate"] is not None]
    axes.plot(
        [p["step"] for p in known], [p["estimate"] for p in known], **{"linestyle": "-", **style}, ms=3.5, linewidth=1.5
    )
    sure = [point for point in known if point["low"] is not None]
    if sure:
        bounds = [p["low"] for p in sure], [p["high"] for p in sure]
        axes.fill_between([p["step"] for p in sure], *bounds, color=style["color"], alpha=0.16, linewidth=0)


def _inline(text: str, label: str, ident: str) -> str:
    """The drawing without what only a file of its own needs, ids made unique, colours left to the page."""
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|font-family: [^;\"]*;? ?", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{ident}-", body)
    for drawn, meant in CSS.items():
        body = body.replace(drawn, meant)
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(label)}">{body.strip()}'
