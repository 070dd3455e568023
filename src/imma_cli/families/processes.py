"""Several processes that harden one model together, each on a GPU or a machine of its own, as `accelerate launch` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
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
        with _as_one():
            for tensor in tensors:
                if tensor is not None and self.count > 1:
                    dist.all_reduce(tensor)

    @torch.no_grad()
    def make_same(self, tensors: Iterable[Tensor]) -> None:
        """Give *tensors* everywhere the values that they have in the first process.

        They should have them anyway; GPUs may differ in a last digit, and what differs once drifts apart.
        """
        with _as_one():
            for tensor in tensors:
                if self.count > 1:
                    dist.broadcast(tensor, src=0)

    def told(self, value: T) -> T:
        """The first process's *value*, in every one."""
        if self.count == 1:
            return value
        values = [value]
        with _as_one():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def gathered(self, own: Sequence[T], count: int) -> list[T]:
        """All *count* parts in their order, of which this process made its *own*: those that `share` gave it."""
        if self.count == 1:
            return list(own)
        made: list[Sequence[T]] = [()] * self.count
        with _as_one():
            dist.all_gather_object(made, own)
        return [made[i % self.count][i // self.count] for i in range(count)]

    def require_same(self, what: str, value: str) -> None:
        """Raises ImmaError, in a process whose *value* is not the first one's."""
        if self.told(value) != value:
            raise ImmaError(
                f"Process {self.rank} of {self.count} has {what} of its own.",
                hint="All processes need the same options, files and saved state: a folder that all machines see.",
            )


ALONE = Processes()
PATIENCE = timedelta(days=1)
"""How long processes wait for each other: the first one's checks may take an hour on processors."""


@contextmanager
def _as_one() -> Iterator[None]:
    """Raises ImmaError where another process is gone: what happened to it, it has said itself."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ImmaError(
            "Another process of this command has ended, so this one ends too.",
            hint="What happened is in the other one's messages. --resume goes on from the last saved state, if there is one.",
        ) from error


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
        PartialState(cpu=torch.device(device).type == "cpu", timeout=PATIENCE)
        rank, count = dist.get_rank(), dist.get_world_size()
    except (RuntimeError, ValueError) as error:
        raise ImmaError(
            f"The {count} processes of the launcher cannot be connected: {error}",
            hint="Start them with accelerate launch or torchrun, which say where the first one is.",
        ) from error
    return Processes(rank, count)
