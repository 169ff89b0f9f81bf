"""Fine truth to score against: the wettest hours of fine files, stacked as places of one common size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from stsr_core.errors import SourceError
from stsr_core.grids import coarsen

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stsr_core.factors import Factor

RUNS = ("segment", "event")  # variables along time that number gap-free runs


@dataclass(frozen=True)
class Truth:
    """Fine truth at several places, and what a coarse model would have given there.

    Attributes:
        names: one for each place.
        fine: amount [mm per fine step], (P, T*t, Y*s, X*s), float32; whole coarse cells are NaN where any
            part of them is missing.
        coarse: amount [mm per coarse step], (P, T, Y, X), float32, NaN where missing.
    """

    names: tuple[str, ...]
    fine: NDArray[np.float32]
    coarse: NDArray[np.float32]


def read_truth(paths: Sequence[Path], factor: Factor, *, hours: int, cells: int, variable: str) -> Truth:
    """Read the wettest `hours` and the middle `cells` x `cells` of fine files, cut to whole coarse cells.

    Files smaller than asked for make all places smaller: they are scored as one sample.

    Raises:
        SourceError: a file without the variable, or smaller than one coarse cell in a gap-free run.
    """
    fields = [_middle(_wettest(path, variable, hours, factor), cells, factor, path) for path in paths]
    nt, ny, nx = (min(f.shape[axis] for f in fields) for axis in range(3))
    s, t = factor.space, factor.time
    places = [
        _middle(f[: nt // t * t], min(ny, nx, cells), factor, path) for f, path in zip(fields, paths, strict=True)
    ]
    coarse = np.stack([coarsen(p, factor) for p in places])
    hole = np.isnan(coarse).repeat(t, 1).repeat(s, 2).repeat(s, 3)
    fine = np.where(hole, np.float32(np.nan), np.stack(places))
    return Truth(tuple(p.stem for p in paths), fine, coarse)


def _wettest(path: Path, variable: str, hours: int, factor: Factor) -> NDArray[np.float32]:
    """Read the wettest `hours` inside one gap-free run of a file, whole coarse steps."""
    with xr.open_dataset(path, decode_timedelta=False) as data:
        if variable not in data:
            raise SourceError(f"{path} has no variable {variable!r}; it has {sorted(map(str, data.data_vars))}.")
        amount = data[variable].astype("float32").values
        run = np.zeros(len(amount), int)
        for name in RUNS:
            if name in data.variables and data[name].dims == data[variable].dims[:1]:
                run = np.unique(data[name].values, return_inverse=True)[1] + run * (int(run.max()) + len(run))
    best: tuple[float, int, int] | None = None
    rain = np.nan_to_num(amount).sum(axis=(1, 2), dtype=np.float64)
    for number in np.unique(run):
        inside = np.flatnonzero(run == number)
        nt = min(hours, len(inside)) // factor.time * factor.time
        if nt:
            sums = np.convolve(rain[inside], np.ones(nt), "valid")
            start = int(inside[0] + sums.argmax())
            best = max(best or (-1.0, 0, 0), (float(sums.max()), start, nt))
    if best is None:
        raise SourceError(f"{path} has no gap-free run of {factor.time} steps, so factor {factor} cannot be scored.")
    _, start, nt = best
    return amount[start : start + nt]


def _middle(fine: NDArray[np.float32], cells: int, factor: Factor, path: Path) -> NDArray[np.float32]:
    ny, nx = (min(cells, n) // factor.space * factor.space for n in fine.shape[1:])
    if not (ny and nx):
        raise SourceError(f"{path} of shape {fine.shape} holds no whole coarse cell of factor {factor}.")
    y, x = ((n - m) // 2 for n, m in zip(fine.shape[1:], (ny, nx), strict=True))
    return fine[:, y : y + ny, x : x + nx]
