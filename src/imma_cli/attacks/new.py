"""A package with an attack to begin from."""

from __future__ import annotations

import re
from collections.abc import Collection
from importlib.resources import files
from pathlib import Path
from string import Template

from imma_cli import __version__
from imma_cli.attacks.points import OWN
from imma_cli.checkpoints.atomic import atomic_folder
from imma_cli.errors import ImmaError

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
PREFIX = "imma-attack-"


def default_folder(name: str) -> Path:
    """Where the package goes if nobody says where."""
    return Path(f"{PREFIX}{name}")


def write_package(name: str, folder: Path, taken: Collection[str]) -> list[Path]:
    """Write a package with a working attack called *name* as *folder*; the files that were written.

    Raises:
        ImmaError: lists what is wrong: *name* is none that a package can have or is among *taken*, or *folder* exists.
    """
    reasons = []
    if not NAME.fullmatch(name):
        reasons.append(f"{name!r} is no name for it: small letters and digits, words joined by '-', a letter first")
    elif name in taken:
        reasons.append(f"there is an attack called {name} already: imma attacks {name}")
    if folder.exists() or folder.is_symlink():
        reasons.append(f"{folder} exists")
    if reasons:
        raise ImmaError("The package cannot be written.", reasons)
    module = f"{PREFIX}{name}".replace("-", "_")
    templates = {
        folder / "pyproject.toml": _template("pyproject.toml"),
        folder / f"{module}.py": _template("attack.py"),
        folder / "tests" / f"test_{name.replace('-', '_')}.py": _template("test_attack.py"),
        folder / "README.md": _template("README.md"),
    }
    cls = "".join(map(str.capitalize, name.split("-")))
    if any(re.search(rf"\b{cls}\b", text) for text in templates.values()):  # "model" would hide the Model it imports
        cls += "Attack"
    words = {
        "name": name,
        "cls": cls,
        "module": module,
        "distribution": f"{PREFIX}{name}",
        "requires": _compatible(),
    }
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as unfinished:
            for path, text in templates.items():
                place = unfinished / path.relative_to(folder)
                place.parent.mkdir(exist_ok=True)
                place.write_text(Template(text).substitute(words), encoding="utf-8")
    except OSError as error:
        raise ImmaError(f"{folder} cannot be written: {error.strerror}.") from error
    return list(templates)


def _template(name: str) -> str:
    return files("imma_cli.attacks").joinpath("template", f"{name}.in").read_text(encoding="utf-8")


def _compatible() -> str:
    # before 1.0 a minor version may change the contract; see docs/plugins.md
    major, minor = map(int, __version__.split(".")[:2])
    after = f"{major + 1}" if major else f"0.{minor + 1}"
    return f"{OWN}>={major}.{minor},<{after}"
