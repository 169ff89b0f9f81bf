"""Confidence intervals of ratios of means, by resampling.

Whole days of places are resampled where there are LEAST_BLOCKS of them at least. Fewer have no interval, and blocks of
hours and cells are resampled in their stead as if they were independent. They are not quite: rain an hour later and a
block further is of the same weather, so that these intervals are too narrow for other days and places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESAMPLES = 2000
# An interval lies within the range of its blocks, and that of n holds the middle of their law with 1 - 2^(1-n): with
# less than 95 % where there are fewer than these, whatever is resampled.
LEAST_BLOCKS = 6


@dataclass(frozen=True)
class Block:
    """What is resampled as one: so many steps, and so many cells along a square, of one place."""

    steps: int
    cells: int

    def __str__(self) -> str:
        return f"blocks of {self.steps} steps and {self.cells} cells"


@dataclass(frozen=True)
class Day(Block):
    """All cells of a place for a day."""

    def __str__(self) -> str:
        return "whole days of places"


SMALL = Block(steps=6, cells=128)


def block_of(truth: NDArray[np.float32], steps_per_day: int) -> Block:
    """Choose what is resampled of fields like a truth (P, T, Y, X), NaN where missing."""
    day = Day(steps_per_day, max(truth.shape[-2:]))
    return day if len(sums_by_block(truth, day)) >= LEAST_BLOCKS else SMALL


def sums_by_block(values: NDArray[np.floating], block: Block) -> NDArray[np.float64]:
    """Sums of a field (P, T, Y, X) over blocks, flat; those at the far edges are smaller, empty ones left out."""
    sums, counts = np.nan_to_num(values).astype(np.float64), np.isfinite(values).astype(np.float64)
    for axis, size in ((1, block.steps), (2, block.cells), (3, block.cells)):
        edges = np.arange(0, values.shape[axis], size)
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
