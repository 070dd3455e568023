"""Which of the processes that share a storage still live."""

from __future__ import annotations

import socket
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

HEARTBEAT = 20.0
"""Seconds between two signs of life of a worker."""
DEAD_AFTER = 120.0
"""A worker of another machine is dead after so many seconds without one, by the observer's own clock."""


def this_worker() -> dict[str, Any]:
    """This process, as others recognise it. *host* is one machine since it started, as this process sees process ids:
    machines share names, and a container counts its processes for itself."""
    host = [socket.gethostname()]
    try:
        host.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        host.append(str(Path("/proc/self/ns/pid").readlink()))
    except OSError:  # not Linux
        host.append(f"{uuid.getnode():x}")
    process = psutil.Process()
    return {"host": " ".join(host), "pid": process.pid, "started": process.create_time()}


class Watch:
    """Who lives, as far as this process can tell. Clocks of two machines are never compared."""

    def __init__(self, dead_after: float) -> None:
        self._host = this_worker()["host"]
        self._dead_after = dead_after
        self._beats: dict[int, tuple[Any, float]] = {}

    def is_alive(self, trial_id: int, worker: dict[str, Any], beat: Any) -> bool:
        """Whether *worker* is still at the trial, where *beat* is what it last wrote there as a sign of life."""
        if worker["host"] == self._host:
            try:
                process = psutil.Process(worker["pid"])
                if process.status() == psutil.STATUS_ZOMBIE:
                    return False
                if abs(process.create_time() - worker["started"]) < 1:
                    return True
            except psutil.NoSuchProcess:
                return False
            except psutil.AccessDenied:
                pass
            # another process has the pid now, or the clock was set: only the heartbeat tells
        now = time.monotonic()
        last, since = self._beats.setdefault(trial_id, (beat, now))
        if beat != last:
            self._beats[trial_id] = beat, now
            return True
        return now - since < self._dead_after
