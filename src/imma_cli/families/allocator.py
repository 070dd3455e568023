"""Memory that is given back when it is not needed any more, for models whose tensors are large."""

from __future__ import annotations

import ctypes
import sys

M_MMAP_THRESHOLD = -3  # malloc.h
LARGE = 4 * 2**20
"""Bytes from which a block has a mapping of its own. Smaller ones would be mapped and cleared anew in every step, which takes time."""


def give_back_large_blocks() -> None:
    """Keep glibc from raising the size from which blocks are mapped up to 32 MB, as it does when such blocks are freed:
    activations would then lie in one heap, which has gaps but no end to be cut off. Elsewhere nothing happens."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)
