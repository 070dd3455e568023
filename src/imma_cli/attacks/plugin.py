"""What every kind of plugin has in common: a name, a summary, and settings that people type."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class PluginSettings:
    """No settings. Whatever has some derives a frozen dataclass from this one."""


class Plugin(ABC):
    """What a plugin module brings, by name. *settings* is an object of its class's `Settings`."""

    name: ClassVar[str]
    summary: ClassVar[str]
    Settings: ClassVar[type[PluginSettings]] = PluginSettings
    given: frozenset[str] = frozenset()
    """The settings that the user typed, whether or not to their defaults: nothing is to vary these."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings
