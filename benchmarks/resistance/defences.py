"""The checkpoints of the benchmark: the demo model defended in every way, by `imma harden` in a process of its own."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cases import CASES, ROWS, UNDEFENDED, YARDSTICK
from lines import Lines

from imma_cli.checkpoints import open_checkpoint
from imma_cli.demo import write_demo
from imma_cli.families.model import Model
from imma_cli.families.runtime import choose_runtime
from imma_cli.verification.models import randomly_changed


class Defences:
    """Makes a checkpoint when it is first asked for; its cost goes to the raw lines."""

    def __init__(self, work: Path, lines: Lines, harden_options: tuple[str, ...] = ()) -> None:
        self.work, self.lines, self.options = work, lines, harden_options
        self.original = work / "demo" / "model.safetensors"
        work.mkdir(parents=True, exist_ok=True)
        with self._alone(work / "demo"):
            if not self.original.exists():
                write_demo(work / "demo", force=True)

    def model(self, case: str, row: str, seed: int) -> Model:
        runtime = choose_runtime("cpu")
        if row != "random":
            return runtime.apply(open_checkpoint(self.checkpoint(case, row, seed)).load())
        original, target = (open_checkpoint(self.original).load() for _ in range(2))
        moved = open_checkpoint(self.checkpoint(case, YARDSTICK, seed)).load()
        return runtime.apply(randomly_changed(original, moved, target))

    def checkpoint(self, case: str, row: str, seed: int) -> Path:
        if row == UNDEFENDED:
            return self.original
        output = self.work / f"{case}-{row.replace(', ', '-')}-{seed}.safetensors"
        with self._alone(output):
            self._make(case, row, seed, output)
        return output

    def _make(self, case: str, row: str, seed: int, output: Path) -> None:
        if not output.exists():
            said, seconds, peak = _run(self._command(case, row, seed, output))
            found = self.lines.find(kind="defence", case=case, row=row, defence_seed=seed)
            if not found:  # hardening is deterministic: made again on another machine, it is the same file
                line = {"kind": "defence", "case": case, "row": row, "defence_seed": seed}
                line |= {"seconds": round(seconds, 1), "peak_bytes": peak, "relative_change": said["relative_change"]}
                self.lines.add(line | {"checks": said["checks"], "options": [*ROWS[row], *self.options]})

    @contextmanager
    def _alone(self, output: Path) -> Iterator[None]:
        """Processes that share the work make a checkpoint once: the others wait for it."""
        with output.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _command(self, case: str, row: str, seed: int, output: Path) -> list[str]:
        chosen = CASES[case]
        images = self.work / "demo" / "concepts" / chosen.folder / "defend"
        command = [sys.executable, "-m", "imma_cli", "harden", self.original, "--concept", chosen.concept]
        command += ["--images", images, "--output", output, "--seed", seed, "--json", *ROWS[row], *self.options]
        return list(map(str, command))


def _run(command: list[str]) -> tuple[dict[str, Any], float, int]:
    """What the command says, its seconds, and its peak resident memory in bytes."""
    began = time.monotonic()
    reader, writer = os.pipe()
    child = os.posix_spawn(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, writer, 1)])
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    _, status, usage = os.wait4(child, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"failed: {' '.join(command)}")
    return json.loads(said), time.monotonic() - began, usage.ru_maxrss * 1024
