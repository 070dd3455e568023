"""What must be set before torch is imported. Whoever has set it keeps it."""

from __future__ import annotations

import os

SETTINGS = {
    # threads that wait spin, and starve whoever else needs the processor
    "OMP_WAIT_POLICY": "passive",
    # tensors from 2 MB on Linux's huge pages, where the system gives them to those who ask: they lie at multiples of
    # 2 MB then, between which the heap has fewer gaps (benchmarks/speed/loops.py)
    "THP_MEM_ALLOC_ENABLE": "1",
}


def prepare_environment() -> None:
    """Set up this process, and those that it starts, for computing on a processor."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
