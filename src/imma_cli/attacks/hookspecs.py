"""The one hook through which attacks reach imma."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from imma_cli.attacks.attack import Attack

PROJECT = "imma"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def imma_attacks() -> list[type[Attack]]:  # type: ignore[empty-body]
    """The attack classes this plugin brings."""
