"""Confidence intervals of CRPS ratios, by resampling blocks of hours and places."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK_STEPS = 6  # steps of a block; rain an hour later is no new evidence
BLOCK_CELLS = 128  # cells along a block
RESAMPLES = 2000
# An interval lies within the range of its blocks, and that of n holds the middle of their law with 1 - 2^(1-n): with
# less than 95 % where there are fewer than these, whatever is resampled.
LEAST_BLOCKS = 6


def sums_by_block(crps: NDArray[np.float32]) -> NDArray[np.float64]:
    """Sums of a CRPS field (P, T, Y, X) over blocks, flat; those at the far edges are smaller, empty ones left out."""
    sums, counts = np.nan_to_num(crps).astype(np.float64), np.isfinite(crps).astype(np.float64)
    for axis, size in ((1, BLOCK_STEPS), (2, BLOCK_CELLS), (3, BLOCK_CELLS)):
        edges = np.arange(0, crps.shape[axis], size)
        sums, counts = np.add.reduceat(sums, edges, axis=axis), np.add.reduceat(counts, edges, axis=axis)
    valid = counts.ravel() > 0
    return sums.ravel()[valid]


def ratio_interval(
    first: NDArray[np.float64], second: NDArray[np.float64], seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the ratio of two means over the same cells, from their sums over blocks.

    Resamples in which both are zero, as where it hardly rains, have none and are left out. NaN where none has a ratio,
    and of fewer blocks than LEAST_BLOCKS.
    """
    if len(first) < LEAST_BLOCKS:
        return math.nan, math.nan
    index = np.random.default_rng(seed).integers(0, len(first), (RESAMPLES, len(first)))
    above, below = first[index].sum(axis=1), second[index].sum(axis=1)
    known = (above > 0) | (below > 0)
    if not known.any():
        return math.nan, math.nan
    with np.errstate(divide="ignore"):
        ratios = above[known] / below[known]
    # no interpolation, as a ratio may be infinite
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2], method="closest_observation")
    return float(low), float(high)
