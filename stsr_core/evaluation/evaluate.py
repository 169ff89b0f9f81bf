"""Evaluation of a checkpoint on fine data: coarsen, downscale, score, beside the baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr

from stsr_core.ensemble.downscale import ensemble_quanta
from stsr_core.ensemble.plan import Plan, Recipe
from stsr_core.errors import SourceError
from stsr_core.evaluation.scores import pooled, scores
from stsr_core.grids import Axis, Grid, TimeAxis, coarsen
from stsr_core.networks.transform import linear_interpolation
from stsr_core.sources.cube import Cube
from stsr_core.store.layout import MISSING, QUANTUM_MM

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stsr_core.checkpoint import Checkpoint
    from stsr_core.downscaler import Downscaler
    from stsr_core.factors import Factor

Table = dict[str, dict[str, float]]


def crop(path: Path, variable: str, hours: int, cells: int, factor: Factor) -> NDArray[np.float32]:
    """Read the wettest `hours` and the middle `cells` x `cells` of a fine file, cut to whole coarse cells.

    Raises:
        SourceError: the file is smaller than one coarse cell, or holds missing values in the crop.
    """
    with xr.open_dataset(path, decode_timedelta=False) as data:
        amount = data[variable].astype("float32").load().values
    nt = min(hours, len(amount)) // factor.time * factor.time
    ny, nx = (min(cells, n) // factor.space * factor.space for n in amount.shape[1:])
    if not (nt and ny and nx):
        raise SourceError(f"{path} of shape {amount.shape} holds no whole coarse cell of factor {factor}.")
    y, x = ((n - m) // 2 for n, m in zip(amount.shape[1:], (ny, nx), strict=True))
    middle = amount[:, y : y + ny, x : x + nx]
    rain = np.convolve(np.nansum(middle, axis=(1, 2)), np.ones(nt), "valid")
    start = int(rain.argmax())
    result = middle[start : start + nt]
    if np.isnan(result).any():
        raise SourceError(f"{path} has missing values in the evaluated crop; choose another with --cells.")
    return result


def as_cube(coarse: NDArray[np.float32], factor: Factor) -> Cube:
    """Wrap coarse amounts as a cube on an abstract 1 km, 1 h fine lattice."""
    _, ny, nx = coarse.shape
    s = float(factor.space)
    grid = Grid(Axis(s / 2, s, ny), Axis(s / 2, s, nx))
    times = TimeAxis(datetime(2000, 1, 1), timedelta(hours=factor.time), len(coarse))
    return Cube(coarse, times, grid, {})


def linear_baseline(coarse: NDArray[np.float32], factor: Factor) -> NDArray[np.float32]:
    """Linear interpolation in t, y and x, one member (1, T, Y, X)."""
    padded = torch.from_numpy(np.pad(coarse, 1, mode="edge"))
    return linear_interpolation(padded[None], factor).numpy()


def even_baseline(coarse: NDArray[np.float32], factor: Factor) -> NDArray[np.float32]:
    """Even spreading over every block, one member (1, T, Y, X)."""
    s, t = factor.space, factor.time
    return (coarse / np.float32(t)).repeat(t, 0).repeat(s, 1).repeat(s, 2)[None]


def evaluate(
    checkpoint: Checkpoint,
    downscaler: Downscaler,
    paths: Sequence[Path],
    *,
    variable: str = "precipitation",
    members: int = 8,
    hours: int = 24,
    cells: int = 256,
    seed: int = 1,
    workers: int = 1,
    report: Callable[[str], None] = lambda _: None,
) -> Table:
    """Score a checkpoint and the baselines on fine files, pooled over the files.

    Returns:
        Scores by method (`stsr`, `linear`, `even`) and name; `stsr` also has its CRPS over each baseline's.
    """
    factor = downscaler.factor
    parts: dict[str, list[dict[str, float]]] = {}
    for path in paths:
        truth = crop(path, variable, hours, cells, factor)
        coarse = coarsen(truth, factor)
        recipe = Recipe.of(checkpoint, downscaler.served, seed=seed, members=members, conserve=True)
        quanta = ensemble_quanta(Plan(as_cube(coarse, factor), recipe), downscaler, workers=workers)
        ensemble = np.where(quanta == MISSING, np.nan, quanta * np.float32(QUANTUM_MM)).astype(np.float32)
        for name, fields in (
            ("stsr", ensemble),
            ("linear", linear_baseline(coarse, factor)),
            ("even", even_baseline(coarse, factor)),
        ):
            parts.setdefault(name, []).append(scores(fields, truth, factor.space))
            report(f"{path.stem} {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in parts[name][-1].items()))
    table = {name: pooled(values) for name, values in parts.items()}
    for baseline in ("linear", "even"):
        table["stsr"][f"crps_over_{baseline}"] = table["stsr"]["crps"] / table[baseline]["crps"]
    return table
