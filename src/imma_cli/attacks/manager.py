"""Finds what the plugins of all installed packages bring. One broken plugin is reported and skipped, never fatal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from importlib.metadata import EntryPoint
from typing import Any, Generic, TypeVar

import pluggy

from imma_cli.attacks import hookspecs
from imma_cli.attacks.attack import Attack, Choice, Preset, Range
from imma_cli.attacks.plugin import Plugin
from imma_cli.attacks.points import in_order, plugin_points
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
    if not all(isinstance(preset, Preset) for preset in attack.presets.values()):
        raise TypeError(f"{attack.__name__}.presets holds something that is no Preset")
    if not isinstance(attack.search, Mapping) or not all(isinstance(s, Range | Choice) for s in attack.search.values()):
        raise TypeError(f"{attack.__name__}.search holds something that is no Range and no Choice")
    if not isinstance(attack.trains, str):
        raise TypeError(f"{attack.__name__}.trains is no text: {attack.trains!r}")
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
    plugin: str = ""
    """The entry point's name, as ``IMMA_DISABLE_PLUGINS`` takes it."""


@dataclass(frozen=True)
class Unused:
    """A plugin that is not used, and why: it is broken, or switched off."""

    plugin: str
    distribution: str
    version: str
    reason: str


@dataclass(frozen=True)
class Registry(Generic[P]):
    """Everything of one kind by name, and the plugins that are broken or switched off."""

    kind: Kind[P]
    found: dict[str, Found[P]]
    broken: tuple[Unused, ...]
    disabled: tuple[Unused, ...] = ()

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
            [f"the plugin {b.plugin} of {b.distribution} could not be used: {b.reason}" for b in self.broken]
            + [f"the plugin {d.plugin} of {d.distribution} is {d.reason}" for d in self.disabled],
            hint,
        )


def simulated(registry: Registry[Attack]) -> list[str]:
    """The names of the attacks that hardening simulates where the user names none."""
    return sorted(name for name, found in registry.found.items() if found.cls.is_simulated())


def discover(plugins: Iterable[EntryPoint] | None = None) -> Registry[Attack]:
    """The attacks of every entry point in the group ``imma`` (or of *plugins*)."""
    return discover_kind(ATTACKS, plugins)


def discover_kind(kind: Kind[P], plugins: Iterable[EntryPoint] | None = None) -> Registry[P]:
    """Everything of *kind* that the entry points in the group ``imma`` (or *plugins*) bring."""
    found: dict[str, Found[P]] = {}
    broken: list[Unused] = []
    disabled: list[Unused] = []
    for entry, package, switched_off in plugin_points() if plugins is None else in_order(plugins):
        if switched_off:
            disabled.append(Unused(entry.name, *package, f"switched off by {switched_off}"))
            continue
        try:
            # a plugin is used whole or not at all
            classes = _brought(kind, entry)
            for cls in classes:
                if cls.name in found:
                    other = found[cls.name].distribution
                    raise ValueError(f"the {kind.noun} {cls.name} is already registered by {other}")
        except (Exception, SystemExit) as error:  # noqa: BLE001 - somebody else's code may raise anything at import
            broken.append(Unused(entry.name, *package, f"{type(error).__name__}: {error}"))
        else:
            found |= {cls.name: Found(cls, *package, entry.name) for cls in classes}
    return Registry(kind, found, tuple(broken), tuple(disabled))


def _brought(kind: Kind[P], entry: EntryPoint) -> list[type[P]]:
    # A manager for each plugin, so that a hook with a wrong name or signature spoils only the plugin it stands in.
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    with redirect_stdout(sys.stderr):  # what a plugin prints when it is loaded must not end up in JSON
        manager.register(entry.load(), name=entry.name)
        manager.check_pending()
        classes = _given(kind.hook, getattr(manager.hook, kind.hook)())
        # What a plugin brings of another kind is that kind's business; here it only has to bring something.
        if not classes and not any(many for hook in vars(manager.hook).values() for many in hook()):
            raise ValueError("it registers no attack and no metric")
    for cls in classes:
        kind.check(cls)
    names = [cls.name for cls in classes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"it registers the {kind.noun} {twice[0]} twice")
    return classes


def _given(hook: str, results: list[Any]) -> list[Any]:
    for many in results:
        if not isinstance(many, list | tuple):
            raise TypeError(f"{hook} gives {many!r}, no list of classes")
    return [cls for many in results for cls in many]
