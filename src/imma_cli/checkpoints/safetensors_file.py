"""The safetensors format in bytes: a header that can be trusted, and a file written anew around changed tensors.

The safetensors library accepts headers that its own specification forbids (duplicate keys, names like ``../../x``,
tensors of size zero) and reorders what it writes. Here a file is refused where it is not what it seems, and what is
written keeps the order, the dtypes and the bytes of the original.
"""

from __future__ import annotations

import errno
import json
import math
import os
import unicodedata
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from imma_cli.checkpoints.file_kinds import other_format
from imma_cli.errors import ImmaError

if TYPE_CHECKING:
    from torch import Tensor

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
HEADER_LIMIT = 100_000_000  # bytes; the safetensors library's own limit
CHUNK = 1 << 20
LISTED = 20

Made = TypeVar("Made")


@dataclass(frozen=True)
class Entry:
    """One tensor: its dtype in safetensors' words, its shape, and where its bytes lie after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself. *entries* keep the order of the header."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int
    """Where the first tensor's bytes begin, counted from the start of the file."""


class _Pairs(list[tuple[str, Any]]):
    """A JSON object before its duplicate keys are lost."""


def read_header(path: Path) -> Header:
    """The header of a safetensors file, checked against the file's length. Reads no tensor and needs no torch.

    Raises ImmaError, with every reason found, for a file that is missing, empty, truncated or in another format, and for a header
    with duplicate keys, unsafe names, unknown dtypes, tensors of size zero, holes or overlaps.
    """
    refusal = f"cannot read {path} as a safetensors file"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(512)
            if len(first) < 8:
                raise ImmaError(
                    refusal, ["the file is empty" if not first else "the file is too short to hold a header"]
                )
            length = int.from_bytes(first[:8], "little")
            if first[8:9] != b"{" and (other := other_format(path, first)):
                raise ImmaError(refusal, [other.what], hint=other.hint)
            if not 2 <= length <= HEADER_LIMIT:
                raise ImmaError(refusal, ["it is no safetensors file: it does not begin with the length of a header"])
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise ImmaError(refusal, [error.strerror or str(error)]) from error
    if len(raw) < length:
        raise ImmaError(
            refusal, [f"the file is truncated: its header is {length:,} bytes long, {len(raw):,} are there"]
        )

    reasons: list[str] = []
    if not raw.startswith(b"{"):
        reasons.append("the header does not start with '{'")
    try:
        pairs = json.loads(raw.decode("utf-8"), object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise ImmaError(refusal, [*reasons, f"the header is not JSON: {error}"]) from error
    if not isinstance(pairs, _Pairs):
        raise ImmaError(refusal, [*reasons, "the header is not a JSON object"])

    metadata: dict[str, str] = {}
    entries: dict[str, Entry] = {}
    reasons += [f"the key {key!r} stands more than once in the header" for key in _duplicates(pairs)]
    for name, value in pairs:
        if name == "__metadata__":
            metadata = _metadata(value, reasons)
        elif entry := _entry(name, value, reasons):
            entries[name] = entry
    if not entries and not reasons:
        reasons.append("it holds no tensors")
    reasons += _layout_faults(entries, size - 8 - length)
    if reasons:
        more = len(reasons) - LISTED
        raise ImmaError(refusal, [*reasons[:LISTED], *([f"and {more} more"] if more > 0 else [])])
    return Header(entries, metadata, data_start=8 + length)


def _duplicates(pairs: _Pairs) -> list[str]:
    seen: set[str] = set()
    return sorted({name for name, _ in pairs if name in seen or seen.add(name)})  # type: ignore[func-returns-value]


def _metadata(value: object, reasons: list[str]) -> dict[str, str]:
    if not isinstance(value, _Pairs) or not all(isinstance(text, str) for _, text in value):
        reasons.append("its metadata is not an object of texts")
        return {}
    reasons += [f"the metadata key {key!r} stands more than once" for key in _duplicates(value)]
    return dict(value)


def _entry(name: str, value: object, reasons: list[str]) -> Entry | None:
    """The entry, or None with the reasons added why it cannot be one."""
    if fault := _name_fault(name):
        reasons.append(fault)
    if not isinstance(value, _Pairs) or sorted(key for key, _ in value) != ["data_offsets", "dtype", "shape"]:
        reasons.append(f"{name!r} is not described by dtype, shape and data_offsets, each once")
        return None
    fields = dict(value)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        reasons.append(f"{name!r} has the unknown dtype {dtype!r}")
        return None
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        reasons.append(f"{name!r} has an impossible shape or position: {shape!r}, {offsets!r}")
        return None
    start, end = offsets
    if 0 in shape:
        reasons.append(f"{name!r} has size zero: {shape}")
    elif 8 * (end - start) != math.prod(shape) * BITS[dtype]:
        reasons.append(f"{name!r} takes {end - start:,} bytes, which does not fit {dtype} of shape {shape}")
    return Entry(dtype, tuple(shape), start, end)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _name_fault(name: str) -> str | None:
    if not name:
        return "a tensor has no name"
    if any(unicodedata.category(character).startswith("C") for character in name):
        return f"the tensor name {name!r} holds control characters"
    if name.startswith(("/", "\\", "~")) or ".." in name or "\\" in name or name[1:3] in (":/", ":\\"):
        return f"the tensor name {name!r} looks like a path"
    return None


def _layout_faults(entries: Mapping[str, Entry], available: int) -> Iterator[str]:
    """What is wrong with the tensors' places in the *available* bytes after the header."""
    ordered = sorted(entries.items(), key=lambda item: (item[1].start, item[1].end))
    if not ordered:
        return
    if ordered[0][1].start > 0:
        yield f"there are {ordered[0][1].start:,} unused bytes before {ordered[0][0]!r}"
    for (name, entry), (following, after) in pairwise(ordered):
        if after.start > entry.end:
            yield f"there are {after.start - entry.end:,} unused bytes between {name!r} and {following!r}"
        elif after.start < entry.end:
            yield f"{name!r} and {following!r} overlap"
    last = max(entry.end for entry in entries.values())
    if last > available:
        yield f"the file is truncated: {last - available:,} bytes of its tensors are missing"
    elif last < available:
        yield f"{available - last:,} bytes follow after the last tensor"


def rewrite(
    source_path: Path,
    header: Header,
    target_path: Path,
    replacement: Callable[[str], Tensor | bytes | None],
    dropped: Set[str],
    metadata: Mapping[str, str],
) -> None:
    """Writes *source_path* anew to *target_path*, with some tensors replaced, without the *dropped* ones, under *metadata*.

    *replacement* is asked for each name in the order of their bytes, in a thread of its own and one ahead of what is being written:
    the tensor's bytes, a tensor of the entry's shape and dtype, or None for one that stays. Those tensors' bytes are copied as they
    are; order and dtypes stay. *target_path* is written in place: give a temporary file. Raises ValueError for a replacement that
    does not fit, OSError where writing fails.
    """
    entries: dict[str, Entry] = {}
    kept = sorted((item for item in header.entries.items() if item[0] not in dropped), key=lambda item: item[1].start)
    position = 0
    for name, entry in kept:
        length = entry.end - entry.start
        entries[name] = Entry(entry.dtype, entry.shape, position, position + length)
        position += length
    with source_path.open("rb") as source, target_path.open("wb") as target:
        target.write(encode_header({name: entries[name] for name in header.entries if name in entries}, metadata))
        with closing(_one_ahead(replacement, [name for name, _ in kept])) as made:
            for name, entry in kept:
                length = entry.end - entry.start
                if not _write(next(made), target, length, name):
                    source.seek(header.data_start + entry.start)
                    _copy(source, target, length)


def _write(new: Tensor | bytes | None, target: IO[bytes], length: int, name: str) -> bool:
    """Whether there was something to write."""
    if new is None:
        return False
    data = as_bytes(new)
    if len(data) != length:
        raise ValueError(f"{name}: {len(data)} bytes given for {length}")
    for begin in range(0, length, CHUNK):  # one call for 100 MB takes the system twice as long
        target.write(data[begin : begin + CHUNK])
    return True


def _one_ahead(make: Callable[[str], Made], names: Sequence[str]) -> Generator[Made, None, None]:
    """What *make* gives for each of *names*. While one is used, the next one or two are made."""
    waiting: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(max_workers=1) as beside:
        for name in names:
            waiting.append(beside.submit(make, name))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def encode_header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a safetensors file: the length, then JSON padded with spaces so that the data are aligned to 8."""
    described: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, entry in entries.items():
        described[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [entry.start, entry.end]}
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def as_bytes(value: Tensor | bytes) -> bytes | memoryview:
    """A tensor's elements in memory order, as safetensors stores them; not copied where they lie so already."""
    if isinstance(value, bytes):
        return value
    import torch

    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _copy(source: IO[bytes], target: IO[bytes], length: int) -> None:
    if hasattr(os, "copy_file_range"):  # the bytes need not come by
        target.flush()
        try:
            while length and (count := os.copy_file_range(source.fileno(), target.fileno(), length, source.tell())):
                source.seek(count, os.SEEK_CUR)
                length -= count
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
                raise
        target.seek(0, os.SEEK_END)
    while length:
        data = source.read(min(CHUNK, length))
        if not data:
            raise OSError("the input became shorter while it was read")
        target.write(data)
        length -= len(data)
