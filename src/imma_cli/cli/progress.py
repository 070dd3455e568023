"""Progress bars on a terminal, silence elsewhere and under --json."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from imma_cli.cli.console import err

BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float], width: int = 40) -> str:
    """*values* as a line of blocks, each the mean of a stretch of the course."""
    if not values:
        return ""
    width = min(width, len(values))
    stretches = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    means = [sum(s) / len(s) for s in stretches]
    low, high = min(means), max(means)
    return "".join(BLOCKS[round((m - low) / (high - low or 1) * (len(BLOCKS) - 1))] for m in means)


class Course:
    """A bar, and below it one line for each curve that is followed."""

    def __init__(self, title: str, total: int) -> None:
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=err,
        )
        self.doing = title
        self.task = self.bar.add_task(title, total=total)
        self.curves: dict[str, list[float]] = {}

    def advance(self, done: float, doing: str | None = None, **values: float | None) -> None:
        """*done* steps are done; each of *values* continues its curve. A new *doing* is a new title, and begins new curves."""
        if doing is not None and doing != self.doing:
            self.doing = doing
            self.curves.clear()
        self.bar.update(self.task, completed=done, description=self.doing)
        for name, value in values.items():
            if value is not None:
                self.curves.setdefault(name.replace("_", " "), []).append(value)

    def __rich__(self) -> Group:
        lines = []
        for name, values in self.curves.items():
            recent = values[-min(20, 1 + len(values) // 10) :]
            lines.append(Text(f"  {name:<14} {sparkline(values)}  {sum(recent) / len(recent):.4f}"))
        return Group(self.bar, *lines)


def rounded(seconds: float) -> str:
    """A time that is only an estimate."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.0f} h"


class Foretold:
    """Says in a log, which nobody watches, about how long the whole takes: as soon as that can be told, and then now and then."""

    AFTER = 20.0
    """Seconds. The first steps are slower than the others."""
    AGAIN = 60.0
    """Seconds between two lines at least; and a tenth of the whole, so that a log stays short."""

    def __init__(self, total: int) -> None:
        self.total, self.began = total, monotonic()
        self.first: tuple[float, float] | None = None
        """How much was done when, after the first report."""
        self.said: tuple[float, float] | None = None
        """The same, at the last line."""

    def advance(self, done: float, doing: str | None = None, **values: float | None) -> None:
        now = monotonic()
        if self.first is None:
            self.first = done, now
            return
        before, then = self.first
        if now - self.began < self.AFTER or done <= before or not self._due(done, now):
            return
        left = timedelta(seconds=round((now - then) / (done - before) * (self.total - done)))
        err.print(f"  {done:.0f} done, about {left} left" if self.said else f"  about {left} left", markup=False)
        self.said = done, now

    def _due(self, done: float, now: float) -> bool:
        if self.said is None:
            return True
        before, then = self.said
        return now - then >= self.AGAIN and self.total / 10 <= done - before and done < self.total


@contextmanager
def course(title: str, total: int, *, of: str = "steps", quiet: bool) -> Iterator[Callable[..., None]]:
    """Gives a function to report progress with, *of* what there are *total*; nothing where *quiet*, and where nobody watches a line about the time it takes, now and then."""
    if quiet:
        yield lambda done, doing=None, **values: None
        return
    if not err.is_terminal:
        err.print(f"{title}, {total} {of} ...", markup=False)
        yield Foretold(total).advance
        return
    shown = Course(title, total)
    with Live(shown, console=err, refresh_per_second=8):
        yield shown.advance


@contextmanager
def waiting(title: str, *, quiet: bool) -> Iterator[None]:
    """A spinner for what cannot be counted."""
    if quiet or not err.is_terminal:
        yield
        return
    with err.status(title):
        yield
