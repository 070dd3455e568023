"""Finds the attacks of all installed packages. One broken plugin is reported and skipped, never fatal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points

import pluggy

from imma_cli.attacks import hookspecs
from imma_cli.attacks.attack import Attack, AttackSettings
from imma_cli.errors import ImmaError


@dataclass(frozen=True)
class Found:
    """An attack class and the distribution that brought it."""

    attack: type[Attack]
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
class Registry:
    """Every attack by name, and the plugins that are broken."""

    found: dict[str, Found]
    broken: tuple[Broken, ...]

    def get(self, name: str) -> type[Attack]:
        """The attack called *name*.

        Raises:
            ImmaError: there is none; says which names are near.
        """
        if name in self.found:
            return self.found[name].attack
        near = get_close_matches(name, self.found, n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(sorted(self.found))}."
        raise ImmaError(
            f"There is no attack called {name!r}.",
            [f"the plugin {b.plugin} of {b.distribution} could not be used: {b.reason}" for b in self.broken],
            hint,
        )


def discover(plugins: Iterable[EntryPoint] | None = None) -> Registry:
    """The attacks of every entry point in the group ``imma`` (or of *plugins*)."""
    found: dict[str, Found] = {}
    broken: list[Broken] = []
    points = entry_points(group=hookspecs.PROJECT) if plugins is None else plugins
    for point in sorted(points, key=lambda p: p.name):
        distribution = point.dist.name if point.dist else "unknown"
        version = point.dist.version if point.dist else "unknown"
        try:
            for attack in _attacks_of(point):
                if attack.name in found:
                    other = found[attack.name].distribution
                    raise ValueError(f"the attack {attack.name} is already registered by {other}")
                found[attack.name] = Found(attack, distribution, version)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - somebody else's code may raise anything at import
            broken.append(Broken(point.name, distribution, version, f"{type(error).__name__}: {error}"))
    return Registry(found, tuple(broken))


def _attacks_of(point: EntryPoint) -> list[type[Attack]]:
    # A manager for each plugin, so that a hook with a wrong name or signature spoils only the plugin it stands in.
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(point.load(), name=point.name)
    manager.check_pending()
    attacks = [attack for many in manager.hook.imma_attacks() for attack in many]
    if not attacks:
        raise ValueError("it registers no attack")
    for attack in attacks:
        _check(attack)
    return attacks


def _check(attack: type[Attack]) -> None:
    if not (isinstance(attack, type) and issubclass(attack, Attack)):
        raise TypeError(f"{attack!r} is no subclass of imma_cli.attacks.Attack")
    missing = [field for field in ("name", "summary", "paper", "presets") if not hasattr(attack, field)]
    if missing:
        raise TypeError(f"{attack.__name__} does not state its {', '.join(missing)}")
    lacking = sorted({"paper", "small"} - set(attack.presets))
    if lacking:
        raise TypeError(f"{attack.__name__}.presets lacks {' and '.join(lacking)}")
    settings = attack.Settings
    if not (is_dataclass(settings) and issubclass(settings, AttackSettings)):
        raise TypeError(f"{attack.__name__}.Settings is no dataclass derived from AttackSettings")
    if not settings.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise TypeError(f"{attack.__name__}.Settings is not frozen")
    unknown = sorted(set(attack.search) - {field.name for field in fields(settings)})
    if unknown:
        raise TypeError(f"{attack.__name__}.search names {', '.join(unknown)}, which {settings.__name__} does not have")
    abstract = sorted(getattr(attack, "__abstractmethods__", ()))
    if abstract:
        raise TypeError(f"{attack.__name__} does not implement {', '.join(abstract)}")
