"""``imma report``: draw the page, the summary and the model card again from the raw lines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from imma_cli.cli.console import out, print_json


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that imma verify --report wrote.")],
    min_sgr: Annotated[
        float | None, typer.Option(min=0, max=1, help="Least SGR of a resistant model. Default: as in DIR.")
    ] = None,
    max_benign_sgr: Annotated[
        float | None, typer.Option(min=0, max=1, help="Most SGR of ordinary fine-tuning. Default: as in DIR.")
    ] = None,
    min_untouched: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Least similarity for unrelated prompts. Default: as in DIR."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON only.")] = False,
) -> None:
    """Draw report.html, summary.json and model-card.md again, from the raw lines in DIR alone.

    The exit code says whether that could be done, whatever the verdict is.
    """
    from dataclasses import replace

    from imma_cli.attacks.manager import discover
    from imma_cli.cli.results import say
    from imma_cli.verification.report import read_report, read_thresholds, write_report

    records = read_report(folder)
    asked = {"min_sgr": min_sgr, "max_benign_sgr": max_benign_sgr, "min_untouched": min_untouched}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    thresholds = replace(read_thresholds(folder), **given)
    summary = write_report(folder, records, thresholds, discover().found)
    if json:
        print_json(summary)
        return
    say(summary)
    out.print(f"Report: {folder / 'report.html'}", markup=False)
