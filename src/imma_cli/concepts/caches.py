"""Room for what is computed once and read in every step: in memory, and past a limit on disk."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

IN_MEMORY = 512 * 2**20
"""Bytes of one cache that memory has room for: the latents of 4000 pictures of 512 × 512, or 2200 captions of SD 1.x's."""


def room(shape: Sequence[int], like: Tensor) -> Tensor:
    """An empty tensor of *shape* with the dtype and device of *like*, or mapped from a temporary file without a name where it is large.

    What is mapped is on the processor, and read from the disk when a step asks for it; TMPDIR says where the file is.
    """
    count = math.prod(shape)
    size = count * like.element_size()
    if size <= IN_MEMORY:
        return torch.empty(*shape, dtype=like.dtype, device=like.device)
    descriptor, name = tempfile.mkstemp(prefix="imma-")
    try:
        os.ftruncate(descriptor, size)
        return torch.from_file(name, shared=True, size=count, dtype=like.dtype).view(*shape)
    finally:
        os.close(descriptor)
        Path(name).unlink()
