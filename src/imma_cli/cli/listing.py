"""How commands show plugins: what ``imma attacks`` and ``imma metrics`` have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Column, Table

from imma_cli.attacks.attack import Choice
from imma_cli.attacks.points import DISABLE, disabled_names
from imma_cli.cli.console import err, out, print_json

if TYPE_CHECKING:
    from imma_cli.attacks.attack import Space
    from imma_cli.attacks.manager import P, Registry


def show_all(
    registry: Registry[P], columns: Mapping[str, str], facts: Callable[[type[P]], dict[str, Any]], *, json: bool
) -> None:
    """Every plugin of *registry*: its name, what *facts* gives of it, and its package; then the broken ones.

    *columns* says which facts the table shows, and under which heading; JSON shows all.
    """
    if json:
        plugins = [
            {"name": name, **facts(f.cls), "distribution": f.distribution, "version": f.version, "plugin": f.plugin}
            for name, f in sorted(registry.found.items())
        ]
        unused = {"broken": registry.broken, "disabled": registry.disabled}
        print_json({f"{registry.kind.noun}s": plugins, **{k: [asdict(u) for u in us] for k, us in unused.items()}})
        return
    table = Table(Column(registry.kind.noun, no_wrap=True), *columns.values(), "package")
    for name, f in sorted(registry.found.items()):
        said = facts(f.cls)
        table.add_row(escape(name), *(_cell(said[fact]) for fact in columns), escape(f"{f.distribution} {f.version}"))
    out.print(table)
    for b in registry.broken:
        err.print(
            f"[yellow]The plugin {escape(f'{b.plugin} of {b.distribution} {b.version}')} cannot be used:[/] {escape(b.reason)}",
            soft_wrap=True,
        )
    for d in registry.disabled:
        err.print(f"The plugin {d.plugin} of {d.distribution} {d.version} is {d.reason}.", markup=False, soft_wrap=True)
    unknown = sorted(disabled_names() - {d.plugin for d in registry.disabled})
    if unknown:
        err.print(f"{DISABLE} names no plugin here: {', '.join(unknown)}.", markup=False, soft_wrap=True)


def show_one(
    registry: Registry[P],
    name: str,
    facts: dict[str, Any],
    remark: str = "",
    more: dict[str, Any] | None = None,
    search: Mapping[str, Space] | None = None,
    *,
    json: bool,
) -> None:
    """One plugin with its settings, and what a search may vary in them.

    *remark* stands behind its summary; JSON has *facts* and, at its end, *more*.

    Raises:
        ImmaError: there is none of this name.
    """
    from imma_cli.attacks.settings import describe

    cls, found = registry.get(name), registry.found[name]
    settings = describe(cls.Settings)
    if json:
        package = {"distribution": found.distribution, "version": found.version, "plugin": found.plugin}
        described = [asdict(s) for s in settings]
        if search is not None:
            described = [
                {**s, "search": _stated(search[s["name"]]) if s["name"] in search else None} for s in described
            ]
        print_json({"name": name, **facts, **package, "settings": described, **(more or {})})
        return
    package_name = f"{found.distribution} {found.version}"
    about = "; ".join(filter(None, (remark, package_name)))
    out.print(f"[bold]{escape(name)}[/]: {escape(f'{cls.summary} ({about})')}")
    if not settings:
        out.print("It has no settings.")
        return
    # a value that somebody is to type is never shortened, however narrow the terminal
    table = Table(
        Column("setting", no_wrap=True),
        *(Column(head, overflow="fold") for head in ("value", "default", "meaning")),
        *([Column("searched over", overflow="fold")] if search is not None else []),
        title=f"settings: {escape(name)}:key=value,...",
        title_justify="left",
    )
    for s in settings:
        row = [s.name, s.accepts, "" if s.default is None else str(s.default), s.meaning]
        if search is not None:
            row.append(_space(search[s.name]) if s.name in search else "")
        table.add_row(*map(escape, row))
    out.print(table)


def _stated(space: Space) -> dict[str, Any]:
    return {key: value for key, value in asdict(space).items() if value != ()}


def _space(space: Space) -> str:
    if isinstance(space, Choice):
        return ", ".join(map(str, (*space.options, *space.held_out)))
    by = " times the preset's" if space.of_preset else ""
    return f"{space.low:g} to {space.high:g}{by}{', log' if space.log else ''}"


def _cell(value: object) -> str:
    return "yes" if value is True else "no" if value is False else escape(str(value))
