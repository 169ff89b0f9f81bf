"""Overlap of cells of any shape with the cells of a regular grid, exactly and without any outline of what is cut out.

The area of a polygon is the sum, with signs, of what lies below its edges; in a square, of what lies below them there.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stsr_core.grids import Grid

PAIRS_AT_ONCE = 1 << 17  # pairs of cells whose overlap is computed at a time: what a processor keeps close
TOUCHING = 1e-12  # share of a cell below which an overlap is rounding error


def shares(corners: NDArray[np.float64], grid: Grid) -> sparse.coo_matrix:
    """Shares of the cells of a grid that lie in polygons.

    Args:
        corners: corners of simple polygons (N, V, 2), in the CRS of the grid, in either sense of rotation; short ones
            repeat a corner.
        grid: its cells count row by row.

    Returns:
        (Y * X, N), 0 to 1.
    """
    origin, step = np.array([grid.x.edges[0], grid.y.edges[0]]), np.array([grid.x.step, grid.y.step])
    place = (corners - origin) / step  # cells of the grid are unit squares
    size = (grid.x.size, grid.y.size)
    low, high = (
        np.clip(f, 0, size).astype(np.int64) for f in (np.floor(place.min(axis=1)), np.ceil(place.max(axis=1)))
    )
    width, height = np.maximum(high - low, 0).T
    found = []
    for some in _batches(width * height):
        count = width[some] * height[some]
        source = np.repeat(some, count)
        nth = np.arange(len(source)) - np.repeat(np.cumsum(count) - count, count)
        square = low[source] + np.stack((nth % width[source], nth // width[source]), axis=-1)
        share = _shared(place, source, square)
        met = share > TOUCHING
        found.append((share[met], square[met, 1] * size[0] + square[met, 0], source[met]))
    share, target, source = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return sparse.coo_matrix((share, (target, source)), shape=(math.prod(size), len(corners)))


def _batches(sizes: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Positions of sizes that together come to about PAIRS_AT_ONCE, one batch after the other."""
    batch = np.cumsum(sizes) // PAIRS_AT_ONCE
    return np.split(np.arange(len(sizes)), np.flatnonzero(np.diff(batch)) + 1)


def _shared(place: NDArray[np.float64], source: NDArray[np.int64], square: NDArray[np.int64]) -> NDArray[np.float64]:
    """Area that polygons `source` (P,) of `place` (N, V, 2) share with unit squares that begin at `square` (P, 2)."""
    total = np.zeros(len(source))
    start = place[source, -1] - square
    for v in range(place.shape[1]):
        end = place[source, v] - square
        total += _below(start, end)
        start = end
    return np.abs(total)


def _below(start: NDArray[np.float64], end: NDArray[np.float64]) -> NDArray[np.float64]:
    """Area of the unit square below edges (N, 2), negative where they run to smaller x."""
    run, rise = (end - start).T
    slope = np.divide(rise, run, out=np.zeros_like(run), where=run != 0)
    x0, x1 = np.clip(start[:, 0], 0, 1), np.clip(end[:, 0], 0, 1)
    y0, y1 = (start[:, 1] + (x - start[:, 0]) * slope for x in (x0, x1))
    low, high = np.minimum(y0, y1), np.maximum(y0, y1)
    inside = np.clip(high, 0, 1) - np.clip(low, 0, 1)  # the part of the rise within the square
    above = np.maximum(high, 1) - np.maximum(low, 1)
    mean = inside * (np.clip(high, 0, 1) + np.clip(low, 0, 1)) / 2 + above
    level = high - low <= 0
    mean = np.where(level, np.clip(low, 0, 1), mean / np.where(level, 1.0, high - low))
    return np.asarray((x1 - x0) * mean)
