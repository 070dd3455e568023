"""The plugin contract: what an attack is, how it is registered, found, set and named."""

from imma_cli.attacks.attack import Attack, AttackSettings, Preset
from imma_cli.attacks.hookspecs import hookimpl

__all__ = ["Attack", "AttackSettings", "Preset", "hookimpl"]
