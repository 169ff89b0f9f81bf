"""Training patches from archives of fine precipitation.

Patches are drawn where it rains, at any offset in place and time, and augmented by what leaves the physics
as it is: flips, transposition, a change of amplitude, and a coarser grid that stands for other radars.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stsr_core.errors import SourceError
from stsr_core.factors import Factor, FactorConfiguration
from stsr_core.grids import coarsen

if TYPE_CHECKING:
    from numpy.typing import NDArray

QUANTUM_MM = 0.01
MISSING = np.uint16(65535)
CELL_TARGET = 112  # fine cells along a patch, before rounding to whole coarse cells
MIN_COARSE = 5  # coarse cells along a patch, at least
WEIGHT_BLOCK = (6, 32)  # steps and cells over which the rain that weighs the draw is averaged
DRY_SHARE = 0.05  # probability of a draw that ignores the rain
SPACINGS = (1, 2, 3)  # grid coarsening that stands for other radars ...
SPACING_SHARES = (0.8, 0.12, 0.08)  # ... and how often
AMPLITUDE = 0.5  # log amplitude scaling is uniform within +- this
ATTEMPTS = 200


@dataclass(frozen=True)
class Region:
    """One gap-free piece of an archive: amounts as uint16 quanta (T, Y, X), and the weights of the draw."""

    name: str
    quanta: NDArray[np.uint16]
    weights: NDArray[np.float64]


def _weights(quanta: NDArray[np.uint16]) -> NDArray[np.float64]:
    steps, cells = WEIGHT_BLOCK
    t, y, x = (n // b for n, b in zip(quanta.shape, (steps, cells, cells), strict=True))
    amount = quanta[: t * steps, : y * cells, : x * cells].astype(np.float32)
    amount[amount == MISSING] = 0.0
    blocks = np.sqrt(amount * QUANTUM_MM).reshape(t, steps, y, cells, x, cells).mean(axis=(1, 3, 5))
    return blocks.astype(np.float64)


def load_archive(paths: Sequence[Path], variable: str = "precipitation") -> list[Region]:
    """Read fine NetCDF files into memory, one region for each gap-free run of each file.

    Args:
        paths: NetCDF files with dims (time, y, x), mm per step; an optional `segment` (time) numbers the
            gap-free runs.
        variable: name of the amounts.

    Raises:
        SourceError: no files, a missing variable, or amounts that do not fit the quantum's range.
    """
    import xarray as xr

    if not paths:
        raise SourceError("No training files were found. Name NetCDF files with --train and --validation.")
    regions = []
    for path in paths:
        with xr.open_dataset(path, decode_timedelta=False) as data:
            if variable not in data:
                raise SourceError(f"{path} has no variable {variable!r}; it has {sorted(map(str, data.data_vars))}.")
            segment = data["segment"].values if "segment" in data else np.zeros(data.sizes["time"], int)
            pieces = [data[variable].isel(time=np.flatnonzero(segment == number)) for number in np.unique(segment)]
            regions += [region_of(path.stem, piece.values) for piece in pieces]
    return regions


def region_of(name: str, amount: NDArray[np.floating]) -> Region:
    """Wrap one gap-free piece of amounts [mm per step], (T, Y, X), NaN where missing.

    Raises:
        SourceError: amounts that do not fit the quantum's range.
    """
    if np.nanmax(amount) > (int(MISSING) - 1) * QUANTUM_MM or np.nanmin(amount) < 0:
        raise SourceError(f"{name} holds amounts outside 0..655 mm per step; check units and fill value.")
    quanta = np.where(np.isnan(amount), MISSING, np.rint(np.nan_to_num(amount) / QUANTUM_MM)).astype(np.uint16)
    return Region(name, quanta, _weights(quanta))


def patch_cells(factor: Factor) -> int:
    """Coarse cells along a training patch without its halo."""
    return max(MIN_COARSE, round(CELL_TARGET / factor.space))


@dataclass(frozen=True)
class Patch:
    """A training example.

    Attributes:
        fine: amount [mm per fine step], (L*t, Y*s, X*s), float32.
        coarse: amount [mm per coarse step] with a halo of one cell on every side, (L+2, Y+2, X+2), float32.
    """

    fine: NDArray[np.float32]
    coarse: NDArray[np.float32]


def draw_patch(
    regions: Sequence[Region], configuration: FactorConfiguration, rng: np.random.Generator, *, augment: bool = True
) -> Patch:
    """Draw one patch for a factor configuration.

    Raises:
        SourceError: the regions are too small, or too gappy, for the factor.
    """
    for _ in range(ATTEMPTS):
        spacing = int(rng.choice(SPACINGS, p=SPACING_SHARES)) if augment else 1
        block = _draw_block(regions, configuration, spacing, rng)
        if block is None:
            continue
        fine = _coarser_grid(block, spacing)
        fine = _augmented(fine, rng) if augment else fine
        coarse = coarsen(fine, configuration.factor)
        s, t = configuration.factor.space, configuration.factor.time
        return Patch(np.ascontiguousarray(fine[t:-t, s:-s, s:-s]), coarse)
    raise SourceError(
        f"No complete patch for factor {configuration.factor} was found in {ATTEMPTS} draws; regions are "
        f"{[r.quanta.shape for r in regions]}. Larger or less gappy regions are needed."
    )


def _draw_block(
    regions: Sequence[Region], configuration: FactorConfiguration, spacing: int, rng: np.random.Generator
) -> NDArray[np.float32] | None:
    """Return complete amounts [mm] of a block with halo, or None if the draw fell on a gap or an edge."""
    factor = configuration.factor
    steps = (configuration.context_length + 2) * factor.time
    cells = (patch_cells(factor) + 2) * factor.space * spacing
    size = (steps, cells, cells)
    totals = np.array([r.weights.sum() + 1e-9 for r in regions])
    region = regions[rng.choice(len(regions), p=totals / totals.sum())]
    room = [n - m for n, m in zip(region.quanta.shape, size, strict=True)]
    if min(room) < 0:
        return None
    centre = _draw_centre(region, rng)
    start = [
        int(np.clip(c - rng.integers(m // 4, m - m // 4 + 1), 0, r)) for c, m, r in zip(centre, size, room, strict=True)
    ]
    quanta = region.quanta[tuple(slice(a, a + m) for a, m in zip(start, size, strict=True))]
    if (quanta == MISSING).any():
        return None
    return quanta.astype(np.float32) * np.float32(QUANTUM_MM)


def _draw_centre(region: Region, rng: np.random.Generator) -> tuple[int, int, int]:
    if rng.random() < DRY_SHARE:
        t, y, x = (int(rng.integers(n)) for n in region.quanta.shape)
        return t, y, x
    flat = region.weights.ravel()
    index = np.unravel_index(rng.choice(flat.size, p=flat / flat.sum()), region.weights.shape)
    block = (WEIGHT_BLOCK[0], WEIGHT_BLOCK[1], WEIGHT_BLOCK[1])
    t, y, x = (int(i * b + rng.integers(b)) for i, b in zip(index, block, strict=True))
    return t, y, x


def _coarser_grid(block: NDArray[np.float32], spacing: int) -> NDArray[np.float32]:
    return block if spacing == 1 else coarsen(block, Factor(space=spacing, time=1))


def _augmented(fine: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    if rng.random() < 0.5:
        fine = fine[:, ::-1]
    if rng.random() < 0.5:
        fine = fine[:, :, ::-1]
    if rng.random() < 0.5:
        fine = fine.swapaxes(1, 2)
    return np.ascontiguousarray(fine * np.float32(np.exp(rng.uniform(-AMPLITUDE, AMPLITUDE))))
