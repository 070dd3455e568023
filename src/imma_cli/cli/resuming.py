"""How `imma harden --resume` goes about it: where the state is, whose it is, and what Ctrl-C does."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from imma_cli.cli.console import err
from imma_cli.errors import ImmaError

if TYPE_CHECKING:
    from imma_cli.families.processes import Processes
    from imma_cli.immunizers.keeper import FileKeeper
    from imma_cli.immunizers.state import SavedState

LAYOUT = 3
"""Of the states themselves: one that was written in another cannot be read."""
LIBRARIES = ("torch", "diffusers", "transformers", "peft")


def state_path(output: Path) -> Path:
    """Beside the *output*, in its name. Not .safetensors: programs would list it among the models of the folder."""
    return output.with_name(f"{output.name}.imma-state")


def command_of(provenance: Mapping[str, Any], config: Path, **besides: Any) -> dict[str, Any]:
    """Everything that the result depends on: with the same, an interrupted run goes on to the same bytes.

    *provenance* is the record that is going to stand in the output; *besides* is what is not in it.
    """
    import json
    from importlib.metadata import version

    from imma_cli.attacks.manager import discover

    found = discover().found
    packages = {name: version(name) for name in LIBRARIES}
    if provenance["settings"].get("eight_bit"):
        packages["bitsandbytes"] = version("bitsandbytes")
    packages |= {found[a["name"]].distribution: found[a["name"]].version for a in provenance["attacks"]}
    command = {**provenance, **besides, "configuration": _digest(config), "packages": packages, "layout": LAYOUT}
    # which of several GPUs it is makes no difference, and another process has another one
    runtime = provenance["runtime"]
    command["runtime"] = {**runtime, "device": runtime["device"].partition(":")[0]}
    # as it is read back: tuples are lists
    return dict(json.loads(json.dumps(command)))


def existing(output: Path) -> SavedState | None:
    """The state that a run for *output* left, or None.

    Raises:
        ImmaError: it is damaged.
    """
    from imma_cli.immunizers.state import SavedState

    path = state_path(output)
    return SavedState.open(path) if path.exists() else None


def require_same(saved: SavedState | None, command: Mapping[str, Any], processes: Processes) -> None:
    """All *processes* are to do the same, from the same state.

    Raises:
        ImmaError: *saved* is the state of another command, with every difference; or a process has other files or options.
    """
    import json

    from imma_cli.immunizers.state import differences

    processes.require_same("a command", json.dumps(command, sort_keys=True))
    processes.require_same("a saved state", saved.header.metadata["checksum"] if saved else "")
    if saved and (found := list(differences(saved.command, command))):
        raise ImmaError(
            f"The saved state {saved.path} is another command's.",
            found,
            hint="Give the same options on the same checkpoint and pictures, or leave out --resume to start from the beginning.",
        )


@contextmanager
def keeping(
    output: Path,
    command: Mapping[str, Any],
    minutes: float,
    saved: SavedState | None,
    processes: Processes,
    *,
    resume: bool,
    quiet: bool,
) -> Iterator[FileKeeper]:
    """Inside, the run's state is saved every so many *minutes* (0: never), and at the first Ctrl-C before it ends the run.

    Of several *processes* one saves; all go on from what it saved.
    """
    from imma_cli.immunizers.keeper import FileKeeper

    def told(error: ImmaError | None) -> None:
        if error:
            err.print(f"[yellow]The state could not be saved:[/] {escape('; '.join(error.reasons) or error.what)}")

    seconds = 60 * minutes if minutes and processes.first else float("inf")
    keeper = FileKeeper(state_path(output), command, seconds, saved, told, processes)
    if not quiet:
        _say(keeper, resume)
    with _interrupted_between_cycles(keeper, saves=minutes > 0):
        yield keeper


def _say(keeper: FileKeeper, resume: bool) -> None:
    path = escape(str(keeper.path))
    if keeper.saved:
        done = len(keeper.saved.tree.get("run", {}).get("result", {}).get("steps", ()))
        err.print(f"Going on from {path}, after cycle {done}." if done else f"Going on from {path}.", soft_wrap=True)
    elif resume:
        err.print(f"There is no {path} to go on from: starting from the beginning.", soft_wrap=True)
    elif keeper.foreign:
        err.print(
            f"[yellow]Note:[/] an interrupted run left {path}; --resume goes on from it. This run starts from the "
            "beginning, and replaces it when it first saves its own state, or is done.",
            soft_wrap=True,
        )


@contextmanager
def _interrupted_between_cycles(keeper: FileKeeper, *, saves: bool) -> Iterator[None]:
    """Inside, a first Ctrl-C or request to end waits for the state to be saved, where there is one; a second does not."""
    asked: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        # a state that somebody may still want is not replaced by that of a run which is given up
        if saves and keeper.in_loop and not keeper.foreign and len(asked) == 1:
            if keeper.processes.first:
                err.print("Ending after this cycle, to save its state (Ctrl-C again: at once) ...")
            keeper.stop = True
        else:
            before[number](number, frame)

    def stop() -> None:
        number = asked[0] if asked else signal.SIGINT  # the first process may have been asked alone
        before[number](number, None)

    keeper.leave_loop = stop
    before: dict[int, Any] = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
        if keeper.stop:  # the loop ended before it offered its state once more
            stop()
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is handle:  # otherwise the run is ending, and nothing is to disturb that
                signal.signal(number, handler)
        speaks = keeper.processes.first
        if asked and saves and speaks:
            keeper.leave()
        if asked and speaks and keeper.path.exists() and not keeper.foreign:
            err.print(
                f"[bold]{escape(str(keeper.path))}[/] holds its state: the same command with --resume goes on.",
                soft_wrap=True,
            )


def _digest(config: Path) -> str:
    """SHA-256 of the texts of a configuration folder: prompts are read as its tokenizer says."""
    import hashlib

    texts = sorted(path for path in config.rglob("*") if path.suffix in (".json", ".txt") and path.is_file())
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(config).as_posix()}" for path in texts
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
