"""A run's state in one file that appears whole or not at all: tensors, and JSON about them. Reading it runs no code.

The format is safetensors'. The metadata hold the command that the state belongs to, a tree of JSON in which numbers
stand for the tensors, and a checksum over all of it: going on from a damaged state would not be noticed later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from imma_cli.checkpoints.atomic import atomic_file
from imma_cli.checkpoints.safetensors_file import CHUNK, Entry, Header, as_bytes, encode_header, read_header
from imma_cli.errors import ImmaError

if TYPE_CHECKING:
    from hashlib import _Hash

State = dict[str, Any]
"""A tree of dicts, lists and tensors, with numbers, texts, booleans and None at its ends besides."""

TENSOR = "tensor number"
"""Key of the dict that stands for a tensor in the JSON."""
STRIDES = "strides"
"""Another, where its elements lie in another order: convolutions on them are computed in another, and rounded otherwise."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
NO_CHECKSUM = "0" * 64


@dataclass(frozen=True)
class SavedState:
    """A state file whose checksum is right; its tensors are read when they are asked for."""

    path: Path
    header: Header
    command: State
    """What was being done, by whatever describes it."""
    tree: State

    @classmethod
    def open(cls, path: Path) -> SavedState:
        """Raises ImmaError where the file is damaged, or no state."""
        try:
            header = read_header(path)
            command, tree, checksum = (header.metadata.get(key) for key in ("command", "tree", "checksum"))
            if command is None or tree is None or checksum is None:
                raise ImmaError("", ["it is no state of imma's"])
            if _checksum(path, header, command, tree) != checksum:
                raise ImmaError("", ["it is damaged: its checksum does not fit what it holds"])
        except ImmaError as error:
            raise ImmaError(
                f"The saved state {path} cannot be used.",
                error.reasons,
                hint="Delete it, or leave out --resume, to start from the beginning.",
            ) from error
        return cls(path, header, json.loads(command), json.loads(tree))

    def read(self, *names: str) -> Any:
        """What stands under *names* in the tree, with its tensors on the CPU; None where there is no such thing."""
        found: Any = self.tree
        for name in names:
            found = (found or {}).get(name)
        with self.path.open("rb") as file:

            def unpacked(value: Any) -> Any:
                if isinstance(value, list):
                    return [unpacked(each) for each in value]
                if not isinstance(value, dict):
                    return value
                if TENSOR not in value:
                    return {key: unpacked(each) for key, each in value.items()}
                entry = self.header.entries[str(value[TENSOR])]
                file.seek(self.header.data_start + entry.start)
                # memory of torch's own: how it is aligned may decide how a matrix product is computed
                data = torch.empty(entry.end - entry.start, dtype=torch.uint8)
                file.readinto(data.numpy().data)
                tensor = data.view(DTYPES[entry.dtype]).view(entry.shape)
                if STRIDES not in value:
                    return tensor
                return torch.empty_strided(entry.shape, value[STRIDES], dtype=tensor.dtype).copy_(tensor)

            return unpacked(found)


def write_state(path: Path, command: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Put *state* of *command* at *path*, in place of an older one. Never more than one tensor is held a second time.

    Raises ImmaError where it cannot be written; then the older one is still there.
    """
    tensors: list[Tensor] = []
    tree = json.dumps(_packed(state, tensors, {}))
    metadata = {"command": json.dumps(command), "tree": tree, "checksum": NO_CHECKSUM}
    entries = dict(_entries(tensors))
    summed = _begun(metadata["command"], tree)
    with atomic_file(path, force=True) as temporary, temporary.open("r+b") as file:
        file.write(encode_header(entries, metadata))
        for tensor in tensors:
            data = as_bytes(tensor)
            summed.update(data)
            file.write(data)
        file.seek(0)
        # as long as the header without it
        file.write(encode_header(entries, metadata | {"checksum": summed.hexdigest()}))


def differences(then: Any, now: Any, of: str = "") -> Iterator[str]:
    """In what two trees of JSON differ, one line for each place."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*then, *now]):
            yield from differences(then.get(key), now.get(key), f"{of}.{key}" if of else key)
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now) and _are_dicts(then + now):
        for number, (one, other) in enumerate(zip(then, now, strict=True), 1):
            yield from differences(one, other, f"{of}.{number}")
    elif then != now:
        yield f"{of}: {_short(then)} then, {_short(now)} now"


def _are_dicts(values: list[Any]) -> bool:
    return all(isinstance(value, dict) for value in values)


def _short(value: Any, length: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def random_state(device: torch.device) -> State:
    """torch's global generators: not the loops', but a layer or a library may use them."""
    on_gpu = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **on_gpu}


def restore_random_state(saved: State, device: torch.device) -> None:
    torch.set_rng_state(saved["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(saved["cuda"], device)


def _packed(value: Any, tensors: list[Tensor], known: dict[int, int]) -> Any:
    """*value* with numbers for tensors, which go into *tensors*; what is one tensor stays one."""
    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = len(tensors)
            tensors.append(value)
        number: State = {TENSOR: known[id(value)]}
        # what is no more than a view has no order of its own
        in_order = value.is_contiguous() or torch.empty_like(value).stride() != value.stride()
        return number if in_order else number | {STRIDES: list(value.stride())}
    if isinstance(value, Mapping):
        return {key: _packed(each, tensors, known) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_packed(each, tensors, known) for each in value]
    return value


def _entries(tensors: list[Tensor]) -> Iterator[tuple[str, Entry]]:
    position = 0
    for number, tensor in enumerate(tensors):
        end = position + tensor.numel() * tensor.element_size()
        yield str(number), Entry(NAMES[tensor.dtype], tuple(tensor.shape), position, end)
        position = end


def _begun(command: str, tree: str) -> _Hash:
    return hashlib.sha256(f"{command}\n{tree}\n".encode())


def _checksum(path: Path, header: Header, command: str, tree: str) -> str:
    summed = _begun(command, tree)
    with path.open("rb") as file:
        file.seek(header.data_start)
        while data := file.read(CHUNK):
            summed.update(data)
    return summed.hexdigest()
