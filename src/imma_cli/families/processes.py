"""Several processes that harden one model together, each on a GPU or a machine of its own, as `accelerate launch` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from imma_cli.errors import ImmaError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This one, and how many there are. Data-parallel: each computes its share of a step's gradient, all take the same step."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """One of them speaks, checks and writes."""
        return self.rank == 0

    def share(self, parts: Sequence[T]) -> Sequence[T]:
        """This process's of *parts*, which are the same everywhere."""
        return parts[self.rank :: self.count]

    def add_up(self, tensors: Iterable[Tensor | None]) -> None:
        """Replace each of *tensors* by its sum over all processes."""
        for tensor in tensors:
            if tensor is not None and self.count > 1:
                dist.all_reduce(tensor)

    @torch.no_grad()
    def make_same(self, tensors: Iterable[Tensor]) -> None:
        """Give *tensors* everywhere the values that they have in the first process.

        They should have them anyway; GPUs may differ in a last digit, and what differs once drifts apart.
        """
        for tensor in tensors:
            if self.count > 1:
                dist.broadcast(tensor, src=0)

    def told(self, value: T) -> T:
        """The first process's *value*, in every one."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


ALONE = Processes()


def launched() -> tuple[int, int]:
    """Rank and number of the processes that a launcher (accelerate, torchrun) started for this command; (0, 1) without one.

    Raises:
        ImmaError: RANK and WORLD_SIZE in the environment say something impossible.
    """
    rank, count = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
        raise ImmaError(
            f"RANK={rank} of WORLD_SIZE={count} processes: the environment of this command is not a launcher's.",
            hint="Start several processes with accelerate launch or torchrun, or unset both variables.",
        )
    return int(rank), int(count)


def joined(device: str) -> Processes:
    """The processes of the launcher, connected with each other; this one alone where there is none.

    Raises:
        ImmaError: they cannot be connected.
    """
    rank, count = launched()
    if count == 1:
        return ALONE
    from accelerate import PartialState

    try:
        PartialState(cpu=torch.device(device).type == "cpu")
    except (RuntimeError, ValueError) as error:
        raise ImmaError(
            f"The {count} processes of the launcher cannot be connected: {error}",
            hint="Start them with accelerate launch or torchrun, which say where the first one is.",
        ) from error
    return Processes(rank, count)
