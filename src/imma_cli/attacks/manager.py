"""Finds what the plugins of all installed packages bring. One broken plugin is reported and skipped, never fatal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

import pluggy

from imma_cli.attacks import hookspecs
from imma_cli.attacks.attack import Attack
from imma_cli.attacks.plugin import Plugin
from imma_cli.errors import ImmaError

P = TypeVar("P", bound=Plugin)


@dataclass(frozen=True)
class Kind(Generic[P]):
    """A kind of plugin: what it is called, the hook it comes through, and what its classes must be."""

    noun: str
    hook: str
    base: type[P]
    stated: tuple[str, ...] = ("name", "summary")
    """What each class has to say of itself."""
    further: Callable[[type[P]], None] = lambda cls: None
    """A check of this kind only; raises TypeError."""

    def check(self, cls: Any) -> None:
        """Raises TypeError where *cls* does not keep the contract."""
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise TypeError(f"{cls!r} is no subclass of {self.base.__module__}.{self.base.__name__}")
        missing = [field for field in self.stated if not hasattr(cls, field)]
        if missing:
            raise TypeError(f"{cls.__name__} does not state its {', '.join(missing)}")
        if not (isinstance(cls.name, str) and cls.name.strip() and ":" not in cls.name):
            raise TypeError(f"{cls.__name__}.name cannot be typed as NAME:key=value: {cls.name!r}")
        settings, root = cls.Settings, self.base.Settings
        if not (is_dataclass(settings) and isinstance(settings, type) and issubclass(settings, root)):
            raise TypeError(f"{cls.__name__}.Settings is no dataclass derived from {root.__name__}")
        if not settings.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise TypeError(f"{cls.__name__}.Settings is not frozen")
        abstract = sorted(getattr(cls, "__abstractmethods__", ()))
        if abstract:
            raise TypeError(f"{cls.__name__} does not implement {', '.join(abstract)}")
        self.further(cls)


def _facts_are_complete(attack: type[Attack]) -> None:
    families = attack.families
    if families is not None and not (
        isinstance(families, tuple) and families and all(isinstance(f, str) for f in families)
    ):
        raise TypeError(f"{attack.__name__}.families is no tuple of families' names, nor None for all: {families!r}")
    lacking = sorted({"paper", "small"} - set(attack.presets))
    if lacking:
        raise TypeError(f"{attack.__name__}.presets lacks {' and '.join(lacking)}")
    unknown = sorted(set(attack.search) - {field.name for field in fields(attack.Settings)})
    if unknown:
        raise TypeError(f"{attack.__name__}.search names {', '.join(unknown)}, no settings of the attack")


ATTACKS = Kind(
    "attack",
    "imma_attacks",
    Attack,  # type: ignore[type-abstract]
    ("name", "summary", "paper", "presets"),
    _facts_are_complete,
)


@dataclass(frozen=True)
class Found(Generic[P]):
    """A class that a plugin brought, and the distribution it came in."""

    cls: type[P]
    distribution: str
    version: str


@dataclass(frozen=True)
class Broken:
    """A plugin that could not be used, and why."""

    plugin: str
    distribution: str
    version: str
    reason: str


@dataclass(frozen=True)
class Registry(Generic[P]):
    """Everything of one kind by name, and the plugins that are broken."""

    kind: Kind[P]
    found: dict[str, Found[P]]
    broken: tuple[Broken, ...]

    def get(self, name: str) -> type[P]:
        """The class called *name*.

        Raises:
            ImmaError: there is none; says which names are near.
        """
        if name in self.found:
            return self.found[name].cls
        near = get_close_matches(name, self.found, n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(sorted(self.found))}."
        raise ImmaError(
            f"There is no {self.kind.noun} called {name!r}.",
            [f"the plugin {b.plugin} of {b.distribution} could not be used: {b.reason}" for b in self.broken],
            hint,
        )


def discover(plugins: Iterable[EntryPoint] | None = None) -> Registry[Attack]:
    """The attacks of every entry point in the group ``imma`` (or of *plugins*)."""
    return discover_kind(ATTACKS, plugins)


def discover_kind(kind: Kind[P], plugins: Iterable[EntryPoint] | None = None) -> Registry[P]:
    """Everything of *kind* that the entry points in the group ``imma`` (or *plugins*) bring."""
    found: dict[str, Found[P]] = {}
    broken: list[Broken] = []
    points = entry_points(group=hookspecs.PROJECT) if plugins is None else plugins
    for point in sorted(points, key=lambda p: p.name):
        distribution = point.dist.name if point.dist else "unknown"
        version = point.dist.version if point.dist else "unknown"
        try:
            for cls in _brought(kind, point):
                if cls.name in found:
                    other = found[cls.name].distribution
                    raise ValueError(f"the {kind.noun} {cls.name} is already registered by {other}")
                found[cls.name] = Found(cls, distribution, version)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - somebody else's code may raise anything at import
            broken.append(Broken(point.name, distribution, version, f"{type(error).__name__}: {error}"))
    return Registry(kind, found, tuple(broken))


def _brought(kind: Kind[P], point: EntryPoint) -> list[type[P]]:
    # A manager for each plugin, so that a hook with a wrong name or signature spoils only the plugin it stands in.
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(point.load(), name=point.name)
    manager.check_pending()
    classes = [cls for many in getattr(manager.hook, kind.hook)() for cls in many]
    # What a plugin brings of another kind is that kind's business; here it only has to bring something.
    if not classes and not any(many for hook in vars(manager.hook).values() for many in hook()):
        raise ValueError("it registers no attack and no metric")
    for cls in classes:
        kind.check(cls)
    return classes
