"""`imma harden --profile FILE`: where the time and the memory of a few cycles go, as a trace that browsers show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from imma_cli.cli.console import err
from imma_cli.errors import ImmaError

PASSED_OVER = 2
"""Cycles before the first that is recorded: they make the optimizers' states, and warm up."""
RECORDED = 3


def check(path: Path) -> None:
    """Raises ImmaError where a trace cannot be written to *path*."""
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise ImmaError(f"--profile {path}: not a file in a folder that exists.", hint="Name one, such as trace.json.")


@contextmanager
def recording(path: Path | None, *, quiet: bool) -> Iterator[Callable[[], None]]:
    """Gives what is to be called after every cycle; the trace is written as soon as it is complete."""
    if path is None:
        yield lambda: None
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    written: list[Path] = []

    def write(done: profile) -> None:
        done.export_chrome_trace(str(path))
        if path.exists():
            written.append(path)

    import torch

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    # one cycle is passed over by the profiler's own warming up
    plan = schedule(wait=PASSED_OVER - 1, warmup=1, active=RECORDED, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write, profile_memory=True) as profiler:
        yield profiler.step
    if not quiet:
        err.print(
            f"Trace of up to {RECORDED} cycles: {path} (chrome://tracing and ui.perfetto.dev show it)"
            if written
            else f"No trace: the run had fewer than {PASSED_OVER + 1} cycles.",
            markup=False,
            soft_wrap=True,
        )
