"""``imma new-attack``: a package with an attack to begin from."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from imma_cli.cli.console import out


def new_attack(
    name: Annotated[str, typer.Argument(help="What will be typed after --attack, such as my-method.")],
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="Where to write it. Default: imma-attack-NAME, here.")
    ] = None,
) -> None:
    """Write a package with a working attack, its test and a README, to begin from."""
    from imma_cli.attacks.manager import discover
    from imma_cli.attacks.new import default_folder, write_package

    target = folder or default_folder(name)
    for path in write_package(name, target, discover().found):
        out.print(str(path), markup=False)
    out.print("\nNext:")
    out.print(f"  imma install -e {quote(str(target))}", markup=False)
    out.print(f"  pytest {quote(str(target))}      (pip install 'imma-cli[testing]' brings pytest)", markup=False)
    out.print(f"  imma attacks {name}", markup=False)
