"""How `imma harden --erase` goes about it: its course, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imma_cli.cli.console import out
from imma_cli.cli.progress import course

if TYPE_CHECKING:
    from torch import Tensor

    from imma_cli.cli.hardening import Task
    from imma_cli.concepts.concept import Concept
    from imma_cli.immunizers.erasing import Settings
    from imma_cli.immunizers.keeper import Keeper


@dataclass(frozen=True)
class Erased:
    """What erasing did: by state-dict name of the UNet, the changed weights as they were and as they are."""

    settings: Settings
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    distances: list[float]
    """How far the model was from what erasing aims at, along the way."""


def carry_out(task: Task, settings: Settings, keeper: Keeper, *, quiet: bool) -> Erased:
    """Erase the task's concepts from its model, in memory, with a bar."""
    from imma_cli.immunizers.erasing import erase, steps_of

    model, names = task.model, task.names

    def make() -> tuple[dict[str, Tensor], list[float]]:
        distances: list[float] = []
        with course("Erasing", steps_of(model, names, settings), quiet=quiet) as advance:

            def show(done: int, doing: str, distance: float | None) -> None:
                if distance is not None:
                    distances.append(distance)
                advance(done, doing=doing, distance=distance)

            return erase(model, names, settings, task.runtime, task.keep, show), distances

    def unpack(saved: dict[str, Any]) -> tuple[dict[str, Tensor], list[float]]:
        return {name: weight.to(model.device) for name, weight in saved["after"].items()}, saved["distances"]

    after, distances = keeper.once("erased", make, lambda done: {"after": done[0], "distances": done[1]}, unpack)
    before = {name: weight.detach().clone() for name, weight in model.unet.named_parameters() if name in after}
    model.unet.load_state_dict(after, strict=False)
    return Erased(settings, before, after, distances)


def named_only(names: Sequence[str]) -> list[Concept]:
    """Concepts without pictures, for where nothing is learned from any."""
    from imma_cli.concepts.concept import Concept

    return [Concept(name, (), (), "none") for name in names]


def say(erased: Erased) -> None:
    if erased.settings.method == "esd":
        tenth = max(1, len(erased.distances) // 10)
        first, last = (sum(part) / tenth for part in (erased.distances[:tenth], erased.distances[-tenth:]))
        out.print(
            f"  erased with ESD-x: distance to the steered-away prediction {first:.4f} at first, {last:.4f} at last"
        )
    else:
        out.print(f"  erased with UCE: keys and values of {len(erased.after)} projections edited in closed form")
