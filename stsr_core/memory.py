"""Memory: how much this process may still take, and that it keeps what it has."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import psutil

CONTAINER = Path("/sys/fs/cgroup")  # where Linux says what the container of a process may take (cgroup v2)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # options of glibc's mallopt, as malloc.h numbers them
# Bytes of freed memory that are kept at the top of the heap, and of tensors from which on each is asked of the system
# anew, the most that glibc takes.
KEPT = {M_TRIM_THRESHOLD: 128 << 20, M_MMAP_THRESHOLD: 32 << 20}


def available(container: Path = CONTAINER) -> int:
    """Return the bytes that the machine, and the container where it has a limit, have left.

    What a container caches of files counts as used there, and is given back when it is needed.
    """
    free = int(psutil.virtual_memory().available)
    limit, used = container / "memory.max", container / "memory.current"
    if not limit.exists() or (most := limit.read_text().strip()) == "max":
        return free
    statistics = container / "memory.stat"
    found = (line.split() for line in statistics.read_text().splitlines()) if statistics.exists() else ()
    cached = next((int(value) for name, value in found if name == "inactive_file"), 0)
    return max(0, min(free, int(most) - int(used.read_text()) + cached))


def keep_freed() -> None:
    """Let this process keep memory that it frees for what it needs next, where its malloc is glibc's.

    Dask has its workers give memory back at once, and the system then clears it page by page for every tensor anew:
    networks on a CPU take more than twice as long.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in KEPT.items():
            libc.mallopt(option, value)
