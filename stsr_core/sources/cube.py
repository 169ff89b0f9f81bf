"""The canonical coarse cube that all stages after reading work on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, TypeAlias

from stsr_core.errors import ShapeError
from stsr_core.grids import Axis, Cells, Grid, TimeAxis

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from stsr_core.factors import Factor


@dataclass(frozen=True)
class Cube:
    """Coarse precipitation of one driving member.

    Attributes:
        amount: mm per coarse step, (T, Y, X), float32, >= 0; NaN is missing.
        times: time axis, in the calendar of the source.
        grid: horizontal grid, oriented as the source has it.
        attributes: provenance that travels into what is published (title, source, license, attribution, ...).
        driving: label of the driving member; "" where the source is no ensemble.
    """

    amount: NDArray[np.float32]
    times: TimeAxis
    grid: Grid
    attributes: Mapping[str, str]
    driving: str = ""

    def __post_init__(self) -> None:
        expected = (self.times.size, *self.place.shape)
        if self.amount.shape != expected:
            raise ShapeError(f"Amounts of shape {self.amount.shape} do not belong to axes of sizes {expected}.")

    @property
    def place(self) -> Grid:
        """Where its amounts are."""
        return self.grid


@dataclass(frozen=True)
class CellCube:
    """Coarse precipitation on cells that form no regular grid; regridding makes a `Cube` of it.

    Attributes:
        amount: mm per coarse step, (T, N), float32, >= 0; NaN is missing.
        times: time axis, in the calendar of the source.
        cells: the cells.
        attributes: provenance, as in `Cube`.
        driving: label of the driving member, as in `Cube`.
    """

    amount: NDArray[np.float32]
    times: TimeAxis
    cells: Cells
    attributes: Mapping[str, str]
    driving: str = ""

    def __post_init__(self) -> None:
        expected = (self.times.size, *self.place.shape)
        if self.amount.shape != expected:
            raise ShapeError(f"Amounts of shape {self.amount.shape} do not belong to {expected} steps and cells.")

    @property
    def place(self) -> Cells:
        """Where its amounts are."""
        return self.cells


Coarse: TypeAlias = Cube | CellCube


def coarse_of(
    amount: NDArray[np.float32], times: TimeAxis, place: Grid | Cells, attributes: Mapping[str, str], driving: str = ""
) -> Coarse:
    """Make a `Cube` of amounts (T, cells) on a regular grid, of those on other cells a `CellCube`."""
    if isinstance(place, Grid):
        return Cube(amount.reshape(-1, *place.shape), times, place, attributes, driving)
    return CellCube(amount, times, place, attributes, driving)


def as_cube(coarse: NDArray[np.float32], factor: Factor) -> Cube:
    """Wrap coarse amounts (T, Y, X) as a cube on an abstract 1 km, 1 h fine lattice."""
    _, ny, nx = coarse.shape
    s = float(factor.space)
    grid = Grid(Axis(s / 2, s, ny), Axis(s / 2, s, nx))
    return Cube(coarse, TimeAxis(datetime(2000, 1, 1), timedelta(hours=factor.time), len(coarse)), grid, {})
