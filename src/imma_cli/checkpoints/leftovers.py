"""Half-written files of processes that were killed: told apart from those being written by a lock that dies with its process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and so nothing is taken for left behind
    fcntl = None

UNFINISHED = ".part"


@contextmanager
def being_written(path: Path, *, folder: bool) -> Iterator[None]:
    """*path*, made as an empty file or *folder*, which :func:`sweep` leaves alone until the block ends."""
    handle = _made(path, folder)
    while handle is not None and not path.exists():  # swept away after it was made and before it was locked
        os.close(handle)
        handle = _made(path, folder)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def sweep(folder: Path) -> None:
    """Remove from *folder* what killed processes left there; where the file system knows no locks, nothing."""
    if fcntl is None:
        return
    for path in folder.glob(f".imma-*{UNFINISHED}"):
        with suppress(OSError):  # it is being written, or somebody else's, or another process was faster
            handle = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove([path])
            finally:
                os.close(handle)


def remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _made(path: Path, folder: bool) -> int | None:
    if folder:
        path.mkdir(exist_ok=True)
    else:
        path.touch()
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDONLY)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_SH)
    return handle
