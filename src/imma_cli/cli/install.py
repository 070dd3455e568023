"""``imma install``: other people's attacks and metrics, into the environment that imma runs in."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from imma_cli.cli.console import Refusals, err, out
from imma_cli.errors import ImmaError

if TYPE_CHECKING:
    from imma_cli.packages.pip import Planned
    from imma_cli.packages.sources import Source


def install(
    package: Annotated[
        list[str] | None, typer.Argument(help="A name on the package index, a wheel, a folder or an address.")
    ] = None,
    upgrade: Annotated[
        bool, typer.Option("--upgrade", "-U", help="Replace an installed version by the newest.")
    ] = False,
    editable: Annotated[
        list[str] | None,
        typer.Option("--editable", "-e", metavar="DIR", help="A folder to be used where it is. Repeatable."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before code is run to build a package.")] = False,
) -> None:
    """Install packages with attacks or metrics, and list what came with them.

    Wheels are unpacked. Anything else is built first, which runs its code: imma asks before.

    What imma itself is built on (torch, diffusers, ...) keeps its version.
    """
    from imma_cli.packages.pip import NoWheelError, command_for, manager, pip, require_pip
    from imma_cli.packages.sources import source_of

    refusals = Refusals("These packages cannot be installed.")
    given = [refusals.check(source_of, text) for text in package or []]
    given += [refusals.check(source_of, text, editable=True) for text in editable or []]
    if not given:
        refusals.add("Nothing is named that could be installed.", "imma install PACKAGE")
    refusals.raise_all()
    sources = [source for source in given if source is not None]
    instead = command_for(sources, upgrade=upgrade)
    require_pip(instead)
    for source in sources:
        err.print(f"{source.shown}: from {source.origin}", markup=False, soft_wrap=True)
    built = [source for source in sources if source.builds]
    if built:
        _consent(f"{' and '.join(s.shown for s in built)}: not a wheel, so its code runs while it is built.", yes=yes)
    with pip() as runner:
        wheels_only = not built
        if wheels_only:
            try:
                _say_plan(runner.plan(sources, upgrade=upgrade))
            except NoWheelError as error:
                for reason in error.reasons:
                    err.print(f"pip: {reason}", markup=False, soft_wrap=True)
                _consent(
                    "There is no wheel. If there is a source distribution, its code runs while it is built.", yes=yes
                )
                wheels_only = False
        done = runner.install(sources, upgrade=upgrade, wheels_only=wheels_only)
    if manager() in ("pipx", "uv tool"):
        err.print(
            f"{manager()} does not know of this and drops it when it reinstalls imma. It keeps: {instead}", markup=False
        )
    _say_brought(sources, done)


def _consent(what: str, *, yes: bool) -> None:
    """Raises ImmaError where nobody agrees."""
    if yes:
        return
    err.print(what, markup=False, soft_wrap=True)
    if not sys.stdin.isatty():
        raise ImmaError("Nobody is there to be asked.", hint="Read it first; then add --yes.")
    if not typer.confirm("Go on?", err=True):
        raise ImmaError("Nothing was installed.")


def _say_plan(planned: list[Planned]) -> None:
    for each in planned:
        err.print(f"{each.name} {each.version}: the wheel {each.url}", markup=False, soft_wrap=True)


def _say_brought(sources: list[Source], done: list[Planned]) -> None:
    from imma_cli.packages.installed import brought

    names = dict.fromkeys([each.name for each in done] + [s.name for s in sources if s.name])
    found = brought(list(names))
    if not any(found.values()):
        out.print(f"{', '.join(names)} brings no attack and no metric.", markup=False)
    for kind in ("attack", "metric"):
        for each in found[f"{kind}s"]:
            out.print(f"{kind} {each['name']}: {each['summary']} ({each['distribution']})", markup=False)
    if found["broken"]:
        reasons = [f"{b['plugin']} of {b['distribution']}: {b['reason']}" for b in found["broken"]]
        raise ImmaError("It is installed, but cannot be used.", reasons, "imma uninstall NAME removes it again.")
