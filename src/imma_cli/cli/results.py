"""How a verification ends in the terminal: one table, one sentence, and what they leave out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from imma_cli.cli.console import out

COLOURS = {"resistant": "green", "not resistant": "red", "broken": "red", "no verdict": "yellow"}


def say(summary: Mapping[str, Any]) -> None:
    """Print what *summary* (see docs/verification-schema.md) says: the attacks, the verdict, and its caveats."""
    from imma_cli.verification.report import words
    from imma_cli.verification.report.rows import AttackRow, attack_rows

    def add(row: AttackRow) -> None:
        decided = row.deciding
        colour = COLOURS.get(row.verdict, "default") if row.model == "hardened" else "dim"
        setting = row.setting.replace(",", ",\n") or "defaults"
        below = setting if row.model == "hardened" else f"on {words.MODELS[row.model]}"
        table.add_row(
            f"{escape(row.name)}\n[dim]{escape(below)}[/]",
            "no pictures"
            if decided is None
            else f"{_sgr(decided.sgr)}\n[dim]{escape(decided.metric)}{_stopped(decided.stopped)}[/]",
            "–" if decided is None else escape(decided.recovery),
            _sgr(row.benign),
            f"[{colour}]{row.verdict}[/]",
        )

    rows = attack_rows(summary)
    if rows:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        # fixed, because rich would rather break the names in two than give the numbers another line
        table.add_column("attack,\nbest setting", overflow="fold", width=out.width // 3 - 6)
        table.add_column(f"SGR,\n{summary['thresholds']['level']:.0%} interval", overflow="fold")
        table.add_column("steps to\nrecover")
        table.add_column("benign\nSGR")
        table.add_column("verdict")
        for row in rows:
            add(row)
            table.add_section()
        out.print(table, soft_wrap=False)
    verdict = summary["verdict"]
    out.print(f"[bold {COLOURS[verdict['verdict']]}]{escape(verdict['sentence'])}[/]", soft_wrap=False)
    scope = summary["scope"] or {}
    notes = [*scope.get("warnings", ()), *(f"{c[:1].upper()}{c[1:]}." for c in verdict["caveats"])]
    for note in notes:
        out.print(f"  - {escape(note)}", soft_wrap=False)


def _stopped(steps: int | None) -> str:
    return "" if steps is None else f"\nbest after {steps}"


def _sgr(estimate: Mapping[str, Any] | None) -> str:
    """The number, and below it its interval."""
    from imma_cli.verification.report import words

    if estimate is None:
        return "–"
    if estimate["estimate"] is None:
        return "not judged"
    bounds = "no interval" if estimate["low"] is None else words.interval(estimate)
    shown = "" if estimate["low"] is None or estimate["difference_shown"] else "\n[yellow]no difference shown[/]"
    return f"[bold]{words.percent(estimate['estimate'])}[/]\n{bounds}{shown}"
