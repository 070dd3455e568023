"""Single tensors of safetensors files, read one at a time, so that a checkpoint never stands in memory twice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from imma_cli.checkpoints.row_map import RowMap, row_map
from imma_cli.checkpoints.safetensors_file import Entry, Header
from imma_cli.checkpoints.topology import Shape
from imma_cli.families.halving import narrowed

if TYPE_CHECKING:
    from imma_cli.checkpoints.checkpoint import Checkpoint, WeightFile

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def read_tensor(path: Path, header: Header, entry: Entry, rows: range | None = None) -> Tensor:
    """One tensor of a safetensors file, in the file's dtype; only *rows* of it where they are given."""
    begin, length, shape = entry.start, entry.end - entry.start, entry.shape
    if rows is not None:
        size = length // shape[0]
        begin, length, shape = begin + rows.start * size, len(rows) * size, (len(rows), *shape[1:])
    data = torch.empty(length, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        file.seek(header.data_start + begin)
        rest = memoryview(data.numpy())  # type: ignore[arg-type]
        while rest:
            if not (count := file.readinto(rest)):
                raise OSError(f"{path} became shorter while it was read")
            rest = rest[count:]
    return data.view(DTYPES[entry.dtype]).view(shape)


def portions(shape: Shape, values: int) -> Iterator[range | None]:
    """The rows of a tensor of this *shape*, so many at a time that they are at most so many *values*, or one. None: all of it."""
    if math.prod(shape) <= values:
        yield None
        return
    at_once = max(1, values // math.prod(shape[1:]))
    for begin in range(0, shape[0], at_once):
        yield range(begin, min(begin + at_once, shape[0]))


def all_finite(tensor: Tensor) -> bool:
    """Whether *tensor* is free of NaN and Inf. A sum takes no memory and shows both; a sum that overflowed is looked at again."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def rows_of(checkpoint: Checkpoint, part: str) -> RowMap:
    """Where the weights of *part* lie in the checkpoint's files."""
    return row_map(part, checkpoint.layout, checkpoint.shapes[part], checkpoint.config)


class Float32Weights:
    """The weights of one part of a checkpoint by diffusers' names, each made when it is asked for.

    What the file holds in float32 is mapped into memory instead of copied: privately, so training it in place does not
    reach the file. Everything else is read, cast, and forgotten.
    """

    def __init__(self, checkpoint: Checkpoint, part: str) -> None:
        self.entries = checkpoint.entries[part]
        self.rows = rows_of(checkpoint, part)
        self._mapped: dict[Path, Any] = {}

    def narrow(self, name: str, shape: Shape) -> Tensor:
        """The same weight in 16 bits. Nothing is mapped for it: pages that were read would count as this process's memory."""
        return narrowed(self.get(name, shape, mapped=False))

    def get(self, name: str, shape: Shape, *, mapped: bool = True) -> Tensor:
        """The weight *name*, which has *shape* in the model."""
        if key := self.rows.whole(name):
            return self._read(key, mapped).reshape(shape)
        whole = torch.empty(shape).view(shape[0], -1)
        for key, (taken, within) in self.rows.sources(name).items():
            whole[within] = self._read(key, mapped).flatten(1)[taken]
        return whole.view(shape)

    def _read(self, key: str, mapped: bool) -> Tensor:
        file, entry = self.entries[key]
        if entry.dtype != "F32" or not entry.shape or not mapped:
            return read_tensor(file.path, file.header, entry).float()
        if file.path not in self._mapped:
            from safetensors import safe_open

            self._mapped[file.path] = safe_open(file.path, "pt")
        tensor: Tensor = self._mapped[file.path].get_tensor(key)
        return tensor


class Scattered(Mapping[str, Tensor]):
    """The keys of one part after changed *weights* took their places, in the file's dtypes, each made when it is asked for."""

    def __init__(self, checkpoint: Checkpoint, part: str, weights: Mapping[str, Tensor]) -> None:
        self.checkpoint, self.part, self.weights = checkpoint, part, weights
        self.rows = rows_of(checkpoint, part)
        self.names: dict[str, list[str]] = {}
        """Per key, the names of the changed weights that have rows in it."""
        for name in weights:
            for key in self.rows.sources(name):
                self.names.setdefault(key, []).append(name)

    def __getitem__(self, key: str) -> Tensor:
        entry = self.place(key)[1]
        for name in self.names[key]:
            if self.rows.whole(name) == key:  # nothing of the original is in it
                return self.weights[name].detach().reshape(entry.shape).to("cpu", DTYPES[entry.dtype])
        own = {name: self.weights[name] for name in self.names[key]}
        return self.rows.scatter(own, self.original(key), key)

    def __iter__(self) -> Any:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def cast(self, key: str) -> bool:
        """Whether a weight in *key* has another dtype than the file."""
        dtype = DTYPES[self.place(key)[1].dtype]
        return any(self.weights[name].dtype != dtype for name in self.names[key])

    def original(self, key: str, rows: range | None = None) -> Tensor:
        """The key's tensor as it is in the checkpoint, or *rows* of it."""
        file, entry = self.place(key)
        return read_tensor(file.path, file.header, entry, rows)

    def place(self, key: str) -> tuple[WeightFile, Entry]:
        return self.checkpoint.entries[self.part][key]
