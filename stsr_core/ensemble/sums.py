"""What the receipt of a shard counts and sums up, on the device that made it: a GPU does in a hundredth of a second
what takes its host two."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stsr_core.store.statistics import PAIR, WET_MM, Sums, added

if TYPE_CHECKING:
    from stsr_core.factors import Factor


def counts(frames: Iterable[Tensor]) -> dict[str, float]:
    """Counts and moments of an ensemble, see `store.receipts.Receipt`.

    Args:
        frames: amounts of its steps [mm], one or several (M, T, Y, X) each, float32, NaN where missing.

    Returns:
        wet, missing, sum_mm, max_mm, rain_mm and spread_mm.
    """
    largest, parts = 0.0, []
    for frame in frames:
        amount = frame.nan_to_num()
        wet = amount > WET_MM
        rainy = wet.any(dim=0)
        mean = amount.mean(dim=0)
        variance = (amount - mean).square().sum(dim=0) / max(1, len(amount) - 1)
        largest = max(largest, float(amount.max()))
        parts.append(
            {
                "wet": int(wet.sum()),
                "missing": int(frame.isnan().sum()),
                "sum_mm": _total(amount),
                "rain_mm": _total(mean * rainy),
                "spread_mm": _total(variance.sqrt() * rainy),
                "rainy": int(rainy.sum()),
            }
        )
    found = added(parts)
    cells = max(1, found.pop("rainy"))
    return found | {"max_mm": largest} | {name: found[name] / cells for name in ("rain_mm", "spread_mm")}


def sums(rows: Iterable[Tensor], factor: Factor) -> Sums:
    """Sums that the statistics of an ensemble are made of, see `store.statistics`.

    Args:
        rows: amounts of its coarse rows from north to south [mm per fine step], one or several (M, T*t, k*s, X*s) each,
            float32, NaN where missing.
        factor: (s, t).

    Returns:
        Sums by name; those of parts of an ensemble add up, but for `change` across their borders.
    """
    s, t = factor.space, factor.time
    parts, means = [], []
    for row in rows:
        m, nt, ny, nx = row.shape
        blocks = row.reshape(m, nt // t, t, ny // s, s, nx // s, s)
        mean = blocks.mean(dim=(2, 4, 6), keepdim=True)
        parts.append(_sums_of_rows(blocks, mean))
        means.append(mean[:, :, 0, :, 0, :, 0])
    coarse = torch.cat(means, dim=2)
    change = sum(_total(coarse.diff(dim=axis).abs().nan_to_num()) for axis in (1, 2, 3))
    return added(parts) | {"change": s * s * t * change}


def _sums_of_rows(blocks: Tensor, means: Tensor) -> Sums:
    """Sums over coarse rows, (M, T, t, Y, s, X, s), with their means over t and s x s; all but `change`."""
    _, _, t, _, s, _, _ = blocks.shape
    detail = (blocks - means).nan_to_num()
    size, wet = detail.abs(), means > WET_MM
    apart = {
        "members": [_apart(detail, size, 0)],
        "hours": [_apart(detail.flatten(1, 2), size.flatten(1, 2), 1)],
        "neighbours": [_apart(detail, size, 4), _apart(detail, size, 6)],
    }
    pairs = {f"{name}_{part}": sum(p[i] for p in of) for name, of in apart.items() for i, part in enumerate(PAIR)}
    return {
        "amount": _total(means.nan_to_num()) * s * s * t,
        "size": _total(size),
        "wet": float(((blocks > WET_MM) & wet).sum()),
        "under": float(wet.sum()) * s * s * t,
        **pairs,
    }


def _apart(values: Tensor, size: Tensor, axis: int) -> tuple[float, float]:
    """Sum of |a - b| and of |a| + |b| over neighbours along an axis; `size` is |values|."""
    if values.shape[axis] < 2:
        return 0.0, 0.0
    edges = _total(size.select(axis, 0)) + _total(size.select(axis, -1))
    return _total(values.diff(dim=axis).abs_()), 2 * _total(size) - edges


def _total(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))
