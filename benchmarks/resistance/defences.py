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

from cases import CASES, DRAWN, ROWS, UNDEFENDED, YARDSTICK, Case, keeps
from lines import Lines

from imma_cli.checkpoints import open_checkpoint
from imma_cli.concepts.drawing import Role, drawing_seeds
from imma_cli.demo import write_demo
from imma_cli.families.model import Model
from imma_cli.families.runtime import choose_runtime
from imma_cli.verification.models import randomly_changed


class Defences:
    """Makes a checkpoint when it is first asked for; its cost goes to the raw lines."""

    def __init__(self, work: Path, lines: Lines, harden_options: tuple[str, ...] = ()) -> None:
        self.work, self.lines, self.options = work, lines, harden_options
        self.home = work / "demo"
        work.mkdir(parents=True, exist_ok=True)
        with self._alone(self.home):
            if not (self.home / "model.safetensors").exists():
                write_demo(self.home, force=True)
            for case in CASES.values():
                if case.known and not (self.home / "concepts" / case.folder).exists():
                    draw_known(self.home, case)

    def undefended(self, case: str) -> Path:
        """What is to be defended: the demo model, without the concept where it knew it."""
        original = self.home / "model.safetensors"
        if not CASES[case].known:
            return original
        erased = self.work / f"{case}-erased.safetensors"
        with self._alone(erased):
            if not erased.exists():
                _run([*_harden(original, CASES[case], erased), "--method", "none", "--erase", "uce"])
        return erased

    def model(self, case: str, row: str, seed: int) -> Model:
        runtime = choose_runtime("cpu")
        if row != "random":
            return runtime.apply(open_checkpoint(self.checkpoint(case, row, seed)).load())
        original, target = (open_checkpoint(self.undefended(case)).load() for _ in range(2))
        moved = open_checkpoint(self.checkpoint(case, YARDSTICK, seed)).load()
        return runtime.apply(randomly_changed(original, moved, target))

    def checkpoint(self, case: str, row: str, seed: int) -> Path:
        if row == UNDEFENDED:
            return self.undefended(case)
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
        command = [*_harden(self.undefended(case), chosen, output), "--seed", str(seed), *ROWS[row], *self.options]
        command += ["--images", str(self.home / "concepts" / chosen.folder / "defend")]
        return command + [part for prompt in keeps(chosen) * row.startswith("episodes") for part in ("--keep", prompt)]


def draw_known(home: Path, case: Case) -> None:
    """Pictures of a concept that the model knows, by itself, other things for every role; the folder appears whole."""
    model = choose_runtime("cpu").apply(open_checkpoint(home / "model.safetensors").load())
    partial = home / "concepts" / f".{case.folder}"
    roles: tuple[Role, ...] = ("defend", "attack", "judge")
    for role in roles:
        captions = [f"{thing} in {case.concept}" for thing in DRAWN[role] for _ in range(2)]
        images = model.family.draw(model, captions, drawing_seeds(role, 0, len(captions)))
        folder = partial / role
        folder.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images):
            image.save(folder / f"{i:02}.png")
        rows = [f"{i:02}.png,{caption}" for i, caption in enumerate(captions)]
        (folder / "metadata.csv").write_text("\n".join(["file_name,text", *rows, ""]))
    partial.rename(home / "concepts" / case.folder)


def _harden(checkpoint: Path, case: Case, output: Path) -> list[str]:
    command = [sys.executable, "-m", "imma_cli", "harden", str(checkpoint), "--concept", case.concept]
    return [*command, "--output", str(output), "--json"]


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
