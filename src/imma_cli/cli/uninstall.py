"""``imma uninstall``: remove other people's attacks and metrics."""

from __future__ import annotations

from typing import Annotated

import typer

from imma_cli.cli.console import Refusals, out


def uninstall(
    name: Annotated[list[str], typer.Argument(help="A package's name, as imma attacks shows it.")],
) -> None:
    """Remove packages that brought attacks or metrics. imma itself and what it needs are never removed."""
    from imma_cli.attacks.points import normalized, plugin_points
    from imma_cli.packages import pip
    from imma_cli.packages.installed import needed_by_imma, version_of

    names = list(dict.fromkeys(map(normalized, name)))
    points = plugin_points()
    needed = needed_by_imma()
    refusals = Refusals("These packages cannot be uninstalled.")
    for each in names:
        if not each:
            refusals.add("An empty name is given.")
            continue
        brought_by = sorted({p.package.name for p in points if p.entry.name == each})
        if each in needed:
            refusals.add(f"imma needs {each}.")
        elif version_of(each) is None:
            hint = f"{each} comes in the package {brought_by[0]}." if brought_by else "imma attacks shows the packages."
            refusals.add(f"There is no package {each} here.", hint)
    refusals.raise_all()
    pip.require_pip(pip.command_without(names))
    pip.uninstall(names)
    for each in names:
        gone = sorted(p.entry.name for p in points if normalized(p.package.name) == each)
        out.print(f"Removed {each}{' with the plugins ' + ', '.join(gone) if gone else ''}.", markup=False)
