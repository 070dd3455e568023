"""When a run's state is saved, and what a run that is continued begins with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

from imma_cli.errors import ImmaError
from imma_cli.families.processes import ALONE, Processes
from imma_cli.immunizers.state import SavedState, State, write_state

T = TypeVar("T")


class Keeper:
    """Keeps nothing: for runs that nobody continues."""

    @property
    def keeps(self) -> bool:
        """Whether what only a state has a use for is to be collected."""
        return False

    def once(self, name: str, make: Callable[[], T], pack: Callable[[T], State], unpack: Callable[[State], T]) -> T:
        """What *make* gives: work that is not done again by a run that is continued. *pack* makes it a part of the state."""
        return make()

    def begin(self) -> State | None:
        """The state that the loop is to go on from, or None for its beginning. From here on the loop offers its state."""
        return None

    def offer(self, state: Callable[[], State]) -> None:
        """The loop is between two cycles; what it would go on from is *state*."""


class FileKeeper(Keeper):
    """Saves into the file *path*, for *command*, whenever *seconds* have passed, or as soon as `stop` is set.

    A run that is continued begins with *saved*. *told* hears of every save, with the error where it failed.
    """

    def __init__(
        self,
        path: Path,
        command: Mapping[str, Any],
        seconds: float,
        saved: SavedState | None,
        told: Callable[[ImmaError | None], None] = lambda error: None,
        processes: Processes = ALONE,
    ) -> None:
        self.processes = processes
        self.leave_loop: Callable[[], None] = lambda: None
        """What ends the run in this process."""
        self.path, self.command, self.seconds, self.saved, self.told = path, command, seconds, saved, told
        self.due = monotonic() + seconds
        self.work: dict[str, Callable[[], State]] = {}
        self.unsaved = False
        """Whether there is finished work that the file does not hold."""
        self.in_loop = False
        self.stop = False
        """Whether the run is to end, as soon as its state is saved."""
        self.foreign = saved is None and path.exists()
        """Whether the file holds what somebody may still want to go on with: only time passing replaces it."""

    @property
    def keeps(self) -> bool:
        return self.seconds < float("inf") or self.saved is not None

    def once(self, name: str, make: Callable[[], T], pack: Callable[[T], State], unpack: Callable[[State], T]) -> T:
        saved = self.saved.read("work", name) if self.saved else None
        found = make() if saved is None else unpack(saved)
        self.work[name] = lambda: pack(found)
        self.unsaved |= saved is None
        if self.unsaved and monotonic() >= self.due:
            self._write({})
        return found

    def begin(self) -> State | None:
        self.in_loop = True
        return self.saved.read("run") if self.saved else None

    def offer(self, state: Callable[[], State]) -> None:
        stop = self.processes.told(self.stop)  # all of them after the same cycle
        if self.processes.first and (stop or monotonic() >= self.due):
            self._write({"run": state()})
        if stop:
            self.leave_loop()

    def leave(self) -> None:
        """The run ends at once: keep the work that was finished, where nothing of the run is in the file yet."""
        if self.unsaved and not self.foreign:
            self._write({})

    def remove(self) -> None:
        """There is nothing left to go on with."""
        self.path.unlink(missing_ok=True)

    def _write(self, run: State) -> None:
        failure = None
        try:
            write_state(self.path, self.command, {"work": {name: pack() for name, pack in self.work.items()}, **run})
            self.unsaved = self.foreign = False
        except ImmaError as error:  # the run itself has come to no harm
            failure = error
        self.due = monotonic() + self.seconds
        self.told(failure)
