"""The plugin contract: what an attack is, how it is registered, found, set and named."""

from imma_cli.attacks.attack import COMMON_SEARCH, Attack, AttackSettings, Choice, Preset, Range, Space
from imma_cli.attacks.hookspecs import hookimpl

__all__ = ["COMMON_SEARCH", "Attack", "AttackSettings", "Choice", "Preset", "Range", "Space", "hookimpl"]
