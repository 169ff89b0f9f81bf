"""Statistics of an ensemble that need no truth: what it has that is finer than coarse cells, and how members differ.

They are ratios of sums that add up over shards, chosen because they say little of the weather: one checkpoint's are
much the same in drizzle and in thunderstorms, a broken one's are not. Detail is an amount minus the mean of its coarse
cell and step.

- `detail`: its size, over the differences between neighbouring coarse cells and steps.
- `members`, `hours`, `neighbours`: sum |a - b| over sum (|a| + |b|) of the detail a and b of the same cell in two
  members or in successive steps, or of neighbours inside a coarse cell: 0 where they are the same, 0.7 for independent
  noise of a normal distribution, 1 where they have nothing in common.
- `wet`: wet cells of wet coarse cells, over those there would be if every cell were either dry or as wet as the others.
  With H the Hoover index, half of the size of the detail over the amount, that share is 1 - H.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stsr_core.factors import Factor

WET_MM = 0.1  # amount per fine step above which a cell counts as wet
PAIRS = ("members", "hours", "neighbours")
PAIR = ("apart", "size")
STATISTICS = ("detail", *PAIRS, "wet")

Sums = dict[str, float]


def sums(amount: NDArray[np.float32], factor: Factor) -> Sums:
    """Sums that statistics are made of.

    Args:
        amount: amount [mm per fine step], (M, T*t, Y*s, X*s), float32, NaN where missing.
        factor: (s, t).

    Returns:
        Sums by name; those of parts of an ensemble add up.
    """
    s, t = factor.space, factor.time
    m, nt, ny, nx = amount.shape
    coarse = np.empty((m, nt // t, ny // s, nx // s), np.float32)
    rows = []
    for y in range(ny // s):  # one coarse row after the other, in little memory
        blocks = amount[:, :, y * s : (y + 1) * s].reshape(m, nt // t, t, s, nx // s, s)
        means = blocks.mean(axis=(2, 3, 5), keepdims=True, dtype=np.float32)
        coarse[:, :, y] = means[:, :, 0, 0, :, 0]
        rows.append(_sums_of_row(blocks, means))
    change = sum(np.nansum(np.abs(np.diff(coarse, axis=n)), dtype=np.float64) for n in (1, 2, 3))
    return added(rows) | {"change": s * s * t * float(change)}


def _sums_of_row(blocks: NDArray[np.float32], means: NDArray[np.float32]) -> Sums:
    """Sums over a coarse row, (M, T, t, s, X, s), with its means over t and s x s; all but `change`."""
    m, coarse_steps, t, s, nx, _ = blocks.shape
    detail = np.nan_to_num(blocks - means)
    size, wet = np.abs(detail), means > WET_MM
    steps = m, coarse_steps * t, s, nx, s
    apart = {
        "members": [_apart(detail, size, 0)],
        "hours": [_apart(detail.reshape(steps), size.reshape(steps), 1)],
        "neighbours": [_apart(detail, size, 3), _apart(detail, size, 5)],
    }
    pairs = {f"{name}_{part}": sum(p[i] for p in of) for name, of in apart.items() for i, part in enumerate(PAIR)}
    return {
        "amount": float(np.nansum(means, dtype=np.float64)) * s * s * t,
        "size": _total(size),
        "wet": float(((blocks > WET_MM) & wet).sum()),
        "under": float(wet.sum()) * s * s * t,
        **pairs,
    }


def _apart(values: NDArray[np.float32], size: NDArray[np.float32], axis: int) -> tuple[float, float]:
    """Sum of |a - b| and of |a| + |b| over neighbours along an axis; `size` is |values|."""
    if values.shape[axis] < 2:
        return 0.0, 0.0
    edges = _total(np.take(size, 0, axis)) + _total(np.take(size, -1, axis))
    return _total(np.abs(np.diff(values, axis=axis))), 2 * _total(size) - edges


def _total(values: NDArray[np.float32]) -> float:
    return float(values.sum(dtype=np.float64))


def added(parts: Iterable[Mapping[str, float]]) -> Sums:
    """Add up the sums of parts of an ensemble."""
    total: Sums = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def statistics(total: Mapping[str, float]) -> dict[str, float]:
    """Statistics of an ensemble by name; those that it is too small or too dry for are absent."""
    even = total["amount"] - total["size"] / 2
    wet = total["wet"] * total["amount"]
    parts = {
        "detail": (total["size"], total["change"]),
        **{name: (total[f"{name}_apart"], total[f"{name}_size"]) for name in PAIRS},
        "wet": (wet, total["under"] * even),
    }
    return {name: above / below for name, (above, below) in parts.items() if below > 0}
