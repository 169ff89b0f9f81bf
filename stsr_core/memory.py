"""Memory: how much this process may still take."""

from __future__ import annotations

from pathlib import Path

import psutil

CONTAINER = Path("/sys/fs/cgroup")  # where Linux says what the container of a process may take (cgroup v2)


def available(container: Path = CONTAINER) -> int:
    """Return the bytes that the machine, and the container where it has a limit, have left."""
    free = int(psutil.virtual_memory().available)
    limit, used = container / "memory.max", container / "memory.current"
    if not limit.exists() or (most := limit.read_text().strip()) == "max":
        return free
    return max(0, min(free, int(most) - int(used.read_text())))
