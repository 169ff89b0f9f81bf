"""Noise that depends on (product seed, driving member, member, absolute time, absolute place) and on nothing else."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

NOISE_TILE = 64  # fine cells along one tile of the noise lattice; part of what a seed means
MASK = (1 << 64) - 1
MEMBER_BITS = 16  # of the key that count members; the others tell driving members apart


def stream_of(driving: str) -> int:
    """Number of the stream of noise of a driving member, 48 bits of a digest of its label; 0 for the label ""."""
    return int.from_bytes(hashlib.sha256(driving.encode()).digest()[:6]) if driving else 0


def lattice_noise(
    seed: int, member: int, start: tuple[int, int, int], shape: tuple[int, int, int], stream: int = 0
) -> NDArray[np.float32]:
    """Standard normal noise on a box of the absolute fine lattice.

    Any two boxes agree where they overlap: each tile of the lattice has its own Philox counter.

    Args:
        seed: product seed.
        member: number of the member, from 0, below 2^16.
        start: absolute fine index of the first step, row and column; may be negative.
        shape: (T, Y, X) of the box.
        stream: number of the driving member's stream, see `stream_of`.

    Returns:
        (T, Y, X), float32.
    """
    t0, y0, x0 = start
    nt, ny, nx = shape
    noise = np.empty(shape, np.float32)
    n = NOISE_TILE
    key = np.array([seed & MASK, stream << MEMBER_BITS | member], dtype=np.uint64)
    for ty in range(y0 // n, (y0 + ny - 1) // n + 1):
        for tx in range(x0 // n, (x0 + nx - 1) // n + 1):
            ya, yb = max(y0, ty * n), min(y0 + ny, (ty + 1) * n)
            xa, xb = max(x0, tx * n), min(x0 + nx, (tx + 1) * n)
            for t in range(nt):
                counter = np.array([0, (t0 + t) & MASK, ty & MASK, tx & MASK], dtype=np.uint64)
                tile = np.random.Generator(np.random.Philox(key=key, counter=counter)).standard_normal(
                    (n, n), dtype=np.float32
                )
                noise[t, ya - y0 : yb - y0, xa - x0 : xb - x0] = tile[
                    ya - ty * n : yb - ty * n, xa - tx * n : xb - tx * n
                ]
    return noise
