"""How much memory this process has needed so far."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from imma_cli.families.runtime import Runtime


def peak_memory(runtime: Runtime) -> int:
    """Peak bytes: of the GPU's allocator on CUDA, else of the whole process (0 where the system does not tell)."""
    if runtime.device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(runtime.device))
    if sys.platform == "win32":
        return 0
    status = Path("/proc/self/status")
    if status.exists():  # on Linux the other figure begins at that of the process that started this one
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
