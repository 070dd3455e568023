"""The weights that hardening began with: put back in the end, and until then in nobody's way."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO, Any

import torch
from torch import Tensor

from imma_cli.errors import ImmaError

IN_MEMORY = 64 * 2**20
"""Bytes that are kept in memory; more waits in a file that has no name, so that nothing of it is left whatever happens."""


@contextmanager
def put_back(weights: Sequence[Tensor]) -> Iterator[None]:
    """Leaving the context gives *weights* the values that they had, also after an exception."""
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    with _elsewhere(weights) if size > IN_MEMORY else _in_memory(weights):
        yield


@contextmanager
def _in_memory(weights: Sequence[Tensor]) -> Iterator[None]:
    copies = [weight.detach().clone() for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, copy in zip(weights, copies, strict=True):
                weight.copy_(copy)


@contextmanager
def _elsewhere(weights: Sequence[Tensor]) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.TemporaryFile(prefix="imma-"))
            for weight in weights:
                file.write(_bytes_of(weight.detach().cpu().contiguous()))
            file.flush()
        except OSError as error:
            raise ImmaError(
                f"The weights as they are cannot be kept in a temporary file while they change: {error.strerror}.",
                hint="Make room there, or set TMPDIR to a folder on another disk.",
            ) from error
        try:
            yield
        finally:
            _read_back(file, weights)


@torch.no_grad()
def _read_back(file: IO[bytes], weights: Sequence[Tensor]) -> None:
    file.seek(0)
    for weight in weights:
        again = torch.empty(weight.shape, dtype=weight.dtype)
        memory = _bytes_of(again)
        memory[:] = file.read(len(memory))
        weight.copy_(again)


def _bytes_of(tensor: Tensor) -> memoryview:
    buffer: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(buffer)
