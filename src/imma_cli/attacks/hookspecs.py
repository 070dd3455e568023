"""The hooks through which attacks and metrics reach imma. A plugin implements one of them, or both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from imma_cli.attacks.attack import Attack
    from imma_cli.verification.metrics import Metric

PROJECT = "imma"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def imma_attacks() -> list[type[Attack]]:  # type: ignore[empty-body]
    """The attack classes this plugin brings."""


@hookspec
def imma_metrics() -> list[type[Metric]]:  # type: ignore[empty-body]
    """The metric classes this plugin brings."""
