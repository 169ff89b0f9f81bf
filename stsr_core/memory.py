"""Memory: how much this process may still take, and that it keeps what it has."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import psutil

CONTAINER = Path("/sys/fs/cgroup")  # where Linux says what the container of a process may take (cgroup v2)
# Options of glibc's mallopt, by number, and values in bytes: freed memory that is kept at the top of the heap, and
# the size from which on memory is asked of the system for each tensor anew, the largest that glibc takes.
KEPT = {-1: 128 << 20, -3: 32 << 20}


def available(container: Path = CONTAINER) -> int:
    """Return the bytes that the machine, and the container where it has a limit, have left."""
    free = int(psutil.virtual_memory().available)
    limit, used = container / "memory.max", container / "memory.current"
    if not limit.exists() or (most := limit.read_text().strip()) == "max":
        return free
    return max(0, min(free, int(most) - int(used.read_text())))


def keep_freed() -> bool:
    """Let this process keep memory that it frees for what it needs next; False where malloc is not glibc's.

    Dask has its workers give memory back at once, and the system then clears it page by page for every tensor anew:
    networks on a CPU take more than twice as long.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return False
    return all(libc.mallopt(option, value) == 1 for option, value in KEPT.items())
