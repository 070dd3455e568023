"""``imma attacks``: the attack plugins that were found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from imma_cli.cli.console import out
from imma_cli.cli.listing import show_all, show_one

if TYPE_CHECKING:
    from imma_cli.attacks.attack import Attack


def attacks(
    name: Annotated[str | None, typer.Argument(help="Show this attack's settings.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """List the attacks that plugins bring, or show the settings of one."""
    from dataclasses import asdict

    from imma_cli.attacks.manager import discover

    registry = discover()
    if name is None:
        show_all(
            registry,
            {"summary": "what it does, what it trains", "families": "families"},
            lambda attack: _facts(attack, shown=not json),
            json=json,
        )
        return
    attack = registry.get(name)
    presets = {key: asdict(preset) for key, preset in attack.presets.items()}
    remark = f"{attack.paper}; trains {attack.trains or 'what it does not say'}; families: {_families(attack)}"
    show_one(registry, name, _facts(attack), remark, {"presets": presets}, attack.search, json=json)
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


def _facts(attack: type[Attack], *, shown: bool = False) -> dict[str, Any]:
    """What the listing says of an attack; *shown* to people, or as JSON, where no families means every family."""
    if shown:
        small = " on small models" if attack.in_place else ""
        default = f"; hardened against by default{small}" if attack.is_simulated() else ""
        return {"summary": f"{attack.summary}\ntrains {attack.trains or '?'}{default}", "families": _families(attack)}
    return {
        "summary": attack.summary,
        "trains": attack.trains,
        "paper": attack.paper,
        "families": attack.families,
        "simulated": attack.is_simulated(),
    }


def _families(attack: type[Attack]) -> str:
    return "all" if attack.families is None else ", ".join(attack.families)
