"""``imma attacks``: the attack plugins that were found."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from imma_cli.cli.console import out
from imma_cli.cli.listing import show_all, show_one


def attacks(
    name: Annotated[str | None, typer.Argument(help="Show this attack's settings.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """List the attacks that plugins bring, or show the settings of one."""
    from dataclasses import asdict

    from imma_cli.attacks.manager import discover

    registry = discover()
    if name is None:
        columns = {"summary": "what it trains", "paper": "paper"}
        show_all(registry, columns, lambda a: {"summary": a.summary, "paper": a.paper}, json=json)
        return
    attack = registry.get(name)
    presets = {key: asdict(preset) for key, preset in attack.presets.items()}
    facts = {"summary": attack.summary, "paper": attack.paper}
    show_one(registry, name, facts, attack.paper, {"presets": presets}, json=json)
    if json:
        return
    table = Table(
        "preset", "learning rate", "outer learning rate", "steps", "clip", title_justify="left", title="presets"
    )
    for key, preset in attack.presets.items():
        table.add_row(
            key,
            f"{preset.learning_rate:g}",
            f"{preset.outer_learning_rate:g}",
            str(preset.steps),
            "none" if preset.max_grad_norm is None else f"{preset.max_grad_norm:g}",
        )
    out.print(table)
