"""Output that appears whole or not at all: a temporary sibling, flushed, then renamed into place.

What a killed process left half written goes when the next one writes into the same folder.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

from imma_cli.checkpoints.leftovers import UNFINISHED, being_written, remove, sweep
from imma_cli.errors import ImmaError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def refuse_output(
    output: Path,
    source: Path,
    *,
    force: bool,
    folder: bool,
    needed: int = 0,
    replaceable: Callable[[Path], bool] = lambda _: True,
) -> None:
    """Raises ImmaError with every reason why *output* cannot be written from *source*; returns where nothing speaks against it.

    *needed* is the output's size in bytes. An existing *output* is replaced only with *force*, and a folder only where
    *replaceable* says that it is one of ours to replace.
    """
    reasons: list[str] = []
    parent = output.absolute().parent
    if not output.name:
        reasons.append("it names no file")
    elif not parent.is_dir():
        reasons.append(f"its folder {parent} does not exist" if not parent.exists() else f"{parent} is not a folder")
    elif not os.access(parent, os.W_OK | os.X_OK):
        reasons.append(f"there is no permission to write into {parent}")
    elif shutil.disk_usage(parent).free < needed:
        free = shutil.disk_usage(parent).free
        reasons.append(f"the disk is too full: {needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free")
    if _overlap(output, source):
        reasons.append("it is the input, or lies in it or around it; the input is never changed")
    elif os.path.lexists(output):
        if not force:
            reasons.append("it exists already (--force overwrites it)")
        if folder and not (output.is_dir() and not output.is_symlink() and replaceable(output)):
            reasons.append("what is there is not a model folder, so it is not replaced even with --force")
        elif not folder and output.is_dir():
            reasons.append("it is a folder; a file is written")
    if reasons:
        raise ImmaError(f"cannot write {output}", reasons)


def _overlap(output: Path, source: Path) -> bool:
    if output.exists() and source.exists() and output.samefile(source):
        return True
    inside, around = output.resolve(), source.resolve()
    return inside.is_relative_to(around) or around.is_relative_to(inside)


def make_writable(folder: Path) -> None:
    """Make *folder* if it is not there. Raises OSError where it cannot be made or written to."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".imma-can-write"
    probe.touch()
    probe.unlink(missing_ok=True)  # another process may look at the same moment


@contextmanager
def atomic_file(output: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary path beside *output* that becomes *output* when the block ends, and vanishes if it is left by an exception.

    Raises ImmaError where *output* exists and *force* is not given, and for a full disk or any other failed write.
    """
    with _temporary(output, force) as temporary, being_written(temporary, folder=False):
        yield temporary
        flush(temporary)
        _refuse_existing(output, force)
        temporary.replace(output)
        flush(output.absolute().parent)


@contextmanager
def atomic_folder(output: Path, *, force: bool = False) -> Iterator[Path]:
    """As :func:`atomic_file`, for a folder: the block fills the temporary folder that it is given.

    With *force*, an existing folder is set aside first and comes back if the new one cannot take its place.
    """
    with _temporary(output, force) as temporary, being_written(temporary, folder=True):
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            flush(path)
        _refuse_existing(output, force)
        if output.exists():
            aside = _sibling(output, ".earlier")  # no half-written one: it may be the only good one for a moment
            output.rename(aside)
            try:
                temporary.rename(output)
            except BaseException:
                aside.rename(output)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        else:
            temporary.rename(output)
        flush(output.absolute().parent)


@contextmanager
def _temporary(output: Path, force: bool) -> Iterator[Path]:
    _refuse_existing(output, force)
    sweep(output.absolute().parent)
    temporary = _sibling(output, UNFINISHED)
    try:
        yield temporary
    except OSError as error:
        remove([temporary])
        if error.errno in FULL:
            raise ImmaError(
                f"cannot write {output}",
                ["the disk is full (or a quota is used up)"],
                hint="Nothing was written. Free some space, or choose another place with --output.",
            ) from error
        raise ImmaError(
            f"cannot write {output}", [error.strerror or str(error)], hint="Nothing was written."
        ) from error
    except BaseException:  # also Ctrl-C: no exception may leave half a file behind
        remove([temporary])
        raise


def _sibling(output: Path, suffix: str) -> Path:
    """A free hidden name in the same folder, and so on the same file system: only there is a rename atomic."""
    return output.absolute().parent / f".imma-{token_hex(6)}{suffix}"


def _refuse_existing(output: Path, force: bool) -> None:
    if os.path.lexists(output) and not force:
        raise ImmaError(f"cannot write {output}", ["it exists already (--force overwrites it)"])


def flush(path: Path) -> None:
    """What was written to *path* reaches the disk before the rename does."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
