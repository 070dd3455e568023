"""``imma attacks``: the attack plugins that were found."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from imma_cli.cli.console import err, out, print_json


def attacks(
    name: Annotated[str | None, typer.Argument(help="Show this attack's settings.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """List the attacks that plugins bring, or show the settings of one."""
    from dataclasses import asdict

    from imma_cli.attacks.manager import discover
    from imma_cli.attacks.settings import describe

    registry = discover()
    if name is not None:
        attack = registry.get(name)
        found = registry.found[name]
        settings = describe(attack.Settings)
        presets = {key: asdict(preset) for key, preset in attack.presets.items()}
        if json:
            print_json(
                {
                    "name": name,
                    "summary": attack.summary,
                    "paper": attack.paper,
                    "distribution": found.distribution,
                    "version": found.version,
                    "settings": [asdict(s) for s in settings],
                    "presets": presets,
                }
            )
            return
        out.print(f"[bold]{name}[/]: {attack.summary} ({attack.paper}; {found.distribution} {found.version})")
        table = Table(
            "setting", "type", "default", "meaning", title=f"--attack {name}:key=value,...", title_justify="left"
        )
        for s in settings:
            table.add_row(s.name, s.type, str(s.default), s.meaning)
        out.print(table)
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
        return
    if json:
        print_json(
            {
                "attacks": [
                    {
                        "name": key,
                        "summary": f.attack.summary,
                        "paper": f.attack.paper,
                        "distribution": f.distribution,
                        "version": f.version,
                    }
                    for key, f in registry.found.items()
                ],
                "broken": [asdict(b) for b in registry.broken],
            }
        )
        return
    table = Table("attack", "what it trains", "paper", "package", "version")
    for key, f in registry.found.items():
        table.add_row(key, f.attack.summary, f.attack.paper, f.distribution, f.version)
    out.print(table)
    for b in registry.broken:
        err.print(
            f"[yellow]The plugin {b.plugin} of {b.distribution} {b.version} cannot be used:[/] {escape(b.reason)}",
            soft_wrap=True,
        )
