"""Memory that is given back when it is not needed any more, for models whose tensors are large. On Linux with glibc; elsewhere nothing happens."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import torch
from torch import nn

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
LARGE = 16 * 2**20
"""Bytes from which a block has a mapping of its own. Such a block is cleared by the system in every step, which takes time; smaller ones are used again."""
SPARE = 64 * 2**20
"""Bytes that the heap grows by, and that may be free at its end before it is cut off."""


def give_back_large_blocks() -> None:
    """Keep glibc from raising the size from which blocks are mapped up to 32 MB, as it does when such blocks are freed:
    activations would then lie in one heap, which has gaps but no end to be cut off."""
    _glibc("mallopt", M_MMAP_THRESHOLD, LARGE)
    # with that glibc stops raising the size of what may be free at the heap's end, too: 128 kB, so that the end would be cut
    # off and cleared again and again
    _glibc("mallopt", M_TRIM_THRESHOLD, SPARE)
    _glibc("mallopt", M_TOP_PAD, SPARE)


def give_back_gaps(unet: Any) -> None:
    """Have diffusers' *unet* give back the heap's gaps on the way there to a gradient, halfway and before its last block:
    at the turn, when most is held, there would be a quarter of a gigabyte of them at SD 1.x's size. What is given back
    is cleared before it is used again, so every block would do it too often."""
    for block in (unet.mid_block, *unet.up_blocks[-2:-1]):
        if _give_back not in block._forward_hooks.values():
            block.register_forward_hook(_give_back)


def give_back_freed() -> None:
    """Give back what was freed, wherever in the heap it was."""
    _glibc("malloc_trim", 0)


def _give_back(block: nn.Module, inputs: Any, outputs: Any) -> None:
    if torch.is_grad_enabled():
        give_back_freed()


def _glibc(name: str, *numbers: int) -> None:
    function = getattr(_library(), name, None)
    if function is not None:
        function(*numbers)


@cache
def _library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
