"""The entry points that plugins are found through, and what switches some of them off."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import NamedTuple

from imma_cli import __version__
from imma_cli.attacks.hookspecs import PROJECT

OWN = "imma-cli"
"""The distribution that imma itself is."""
DISABLE = "IMMA_DISABLE_PLUGINS"
"""Names of entry points that are not loaded, separated by commas."""
ONLY_OWN = "IMMA_NO_PLUGINS"
"""Set, only what ships with imma is loaded; ``--no-plugins`` sets it."""
DOUBLES = "IMMA_TEST_PLUGINS"
"""Set, the stand-ins for testing pipelines are loaded, too."""


class Package(NamedTuple):
    """The distribution an entry point stands in."""

    name: str
    version: str


class Point(NamedTuple):
    """An entry point, its package, and what switched it off; empty if nothing did."""

    entry: EntryPoint
    package: Package
    switched_off: str


def plugin_points() -> list[Point]:
    """Every entry point in the group ``imma``, imma's own first, so that nobody takes the name of what ships with it."""
    entries = list(entry_points(group=PROJECT))
    if os.environ.get(DOUBLES):
        entries.append(EntryPoint("testing", "imma_cli.attacks.testing.doubles", PROJECT))
    return in_order(entries)


def in_order(entries: Iterable[EntryPoint]) -> list[Point]:
    """*entries* with their packages, in the order in which they are asked."""
    points = []
    for entry in entries:
        package = package_of(entry)
        points.append(Point(entry, package, _switched_off(entry, package)))
    return sorted(points, key=lambda point: (not is_own(point.package), point.entry.name, point.package.name))


def package_of(entry: EntryPoint) -> Package:
    """The package that *entry* stands in, as far as its metadata can be read."""
    if entry.dist is None:
        return Package(OWN, __version__) if entry.value.startswith("imma_cli.") else Package("unknown", "unknown")
    try:
        return Package(str(entry.dist.name or "unknown"), str(entry.dist.version or "unknown"))
    except Exception:  # noqa: BLE001 - what an interrupted installation left behind may be broken in any way
        return Package("unknown", "unknown")


def is_own(package: Package) -> bool:
    """Whether it ships with imma."""
    return normalized(package.name) == OWN


def normalized(name: str) -> str:
    """A distribution's name in the form in which two spellings of one name are equal."""
    return re.sub(r"[-_.]+", "-", name).lower()


def disabled_names() -> set[str]:
    """What `DISABLE` names."""
    return {name.strip() for name in os.environ.get(DISABLE, "").split(",")} - {""}


def _switched_off(entry: EntryPoint, package: Package) -> str:
    if entry.name in disabled_names():
        return DISABLE
    if os.environ.get(ONLY_OWN) and not is_own(package):
        return "--no-plugins"
    return ""
