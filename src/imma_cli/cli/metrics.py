"""``imma metrics``: the metric plugins that were found, and whether they are ready to be used here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from imma_cli.cli.console import out
from imma_cli.cli.listing import show_all, show_one

if TYPE_CHECKING:
    from imma_cli.verification.metrics import Metric


def metrics(
    name: Annotated[str | None, typer.Argument(help="Show this metric's settings.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """List the metrics that plugins bring, or show the settings of one and what it still needs here."""
    from imma_cli.verification.metrics import discover_metrics

    registry = discover_metrics()
    if name is None:
        show_all(registry, {"summary": "what it compares", "ready": "ready here"}, _facts, json=json)
        return
    facts = _facts(registry.get(name))
    show_one(registry, name, facts, json=json)
    if not json and facts["missing"]:
        out.print("Not ready here with its default settings:")
        for reason in facts["missing"]:
            out.print(f"  - {escape(reason)}")


def _facts(metric: type[Metric]) -> dict[str, Any]:
    """What the listing says of a metric, with its default settings."""
    try:
        missing = metric(metric.Settings()).missing()
    except Exception as error:  # noqa: BLE001 - somebody else's code; the list must still appear
        missing = [f"{type(error).__name__}: {error}"]
    return {"summary": metric.summary, "ready": not missing, "missing": missing}
