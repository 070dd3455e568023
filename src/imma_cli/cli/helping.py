"""A small model's trial is computed on one core: on a machine with more, `imma verify` lets copies of itself share the trials."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from imma_cli.cli.console import err

if TYPE_CHECKING:
    from imma_cli.cli.verifying import Rank
    from imma_cli.families.model import Model
    from imma_cli.families.runtime import Runtime
    from imma_cli.verification.plan import Effort

PARENT = "IMMA_HELPS"
"""The environment variable that tells a helper whom it helps."""
MOST = 3
"""More would take gigabytes, for a model that is quick anyway."""


@contextmanager
def place_to_share(url: str | None, report: Path | None, count: int) -> Iterator[str | None]:
    """A storage that helpers can open: the one that was asked for, or a file for as long as the context lasts."""
    if url is not None or report is not None or not count:
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="imma-") as folder:
        yield f"sqlite:///{Path(folder) / 'trials.sqlite3'}"


def how_many(effort: Effort, rank: Rank, runtime: Runtime, model: Model) -> int:
    """Helpers that are worth it. Where settings are searched there are none: what is proposed follows from what is known,
    and the same command is to come to the same result."""
    from imma_cli.families.runtime import cores

    if rank.several or effort.trials or not runtime.core_to_spare(model):
        return 0
    return min(MOST, cores() - 1)


@contextmanager
def helpers(count: int, url: str | None, *, quiet: bool) -> Iterator[None]:
    """Inside, *count* silent copies of this command work at its trials; *url* names a storage that the command does not."""
    environment = {**os.environ, PARENT: str(os.getpid()), "RANK": "1", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "imma_cli", *sys.argv[1:]]
    if url is not None and "--storage" not in " ".join(sys.argv):
        command += ["--storage", url]
    with ExitStack() as stack:
        for _ in range(count):
            helper = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            stack.callback(helper.wait)
            stack.callback(helper.terminate)  # what it was at is given back
        if count and not quiet:
            err.print(f"{count + 1} processes share the trials; OMP_NUM_THREADS=1 keeps it to one.", markup=False)
        yield


def end_if_orphaned() -> None:
    """A helper whose parent was killed ends as at a request, and gives back what it was at."""
    parent = os.environ.get(PARENT)
    if parent is not None and int(parent) != os.getppid():
        os.kill(os.getpid(), signal.SIGTERM)
