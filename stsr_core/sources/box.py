"""Boxes: which part of a grid lies near a target, so that only that part is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stsr_core.errors import ConfigurationError, GridError
from stsr_core.grids import Axis, Cells, Grid

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray
    from pyproj import CRS

MARGIN_CELLS = 2  # source cells kept around the box of a target
ROUNDING = 1e-6  # of a cell, by which edges of cells and of a box may differ where they are meant to be one
FULL_CIRCLE = 360.0


def degrees(text: str) -> tuple[float, float, float, float]:
    """Read WEST,SOUTH,EAST,NORTH.

    Raises:
        ConfigurationError: no four numbers.
    """
    try:
        west, south, east, north = (float(part) for part in text.split(","))
    except ValueError as e:
        raise ConfigurationError(f"Box {text!r} is no WEST,SOUTH,EAST,NORTH in degrees; write 4,43,8,46.") from e
    return west, south, east, north


@dataclass(frozen=True)
class Box:
    """A rectangle in a CRS (WKT), near which are the cells that it touches and `margin` more on every side."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float
    crs_wkt: str
    margin: int = MARGIN_CELLS

    @classmethod
    def of_degrees(cls, west: float, south: float, east: float, north: float) -> Box:
        """Return a box of longitudes and latitudes, without a margin; west may be above east across 180 degrees.

        Raises:
            ConfigurationError: degrees that make no box.
        """
        from pyproj import CRS

        sides = (west, south, east, north)
        if not (all(map(math.isfinite, sides)) and -90 <= south < north <= 90 and west != east):
            raise ConfigurationError(
                f"Box {sides} has no inside. West, south, east and north are needed, in degrees: 4,43,8,46."
            )
        return cls(west, south, east + FULL_CIRCLE * (east < west), north, CRS("OGC:CRS84").to_wkt(), margin=0)

    @classmethod
    def around(cls, grid: Grid) -> Box:
        """Return the box of a grid with a CRS.

        Raises:
            GridError: the grid has no CRS.
        """
        if grid.crs_wkt is None:
            raise GridError("The target grid has no CRS, so nothing can be placed on it. Give it one.")
        x, y = grid.x.edges, grid.y.edges
        return cls(float(x.min()), float(y.min()), float(x.max()), float(y.max()), grid.crs_wkt)

    def bounds_in(self, crs: CRS) -> tuple[float, float, float, float]:
        """West, south, east, north of the box in another CRS; east may be beyond 180 degrees.

        Raises:
            GridError: the box has no finite place there.
        """
        from pyproj import CRS, Transformer

        transformer = Transformer.from_crs(CRS.from_wkt(self.crs_wkt), crs, always_xy=True)
        west, south, east, north = transformer.transform_bounds(
            self.x_min, self.y_min, self.x_max, self.y_max, densify_pts=51
        )
        if not np.isfinite([west, south, east, north]).all():
            raise GridError(f"The target box has no place in the CRS of the source ({crs.name}). Check both CRS.")
        if crs.is_geographic and east < west:
            east += FULL_CIRCLE
        return west, south, east, north


@dataclass(frozen=True)
class Part:
    """A part of the horizontal grid of an array.

    Attributes:
        grid: its cells.
        rows: slice of the first horizontal dimension.
        columns: slices of the second one, in order; empty where there is only one dimension.
        keep: which of the values so taken are cells of `grid`, None for all.
    """

    grid: Grid | Cells
    rows: slice
    columns: tuple[slice, ...]
    keep: NDArray[np.int64] | None = None

    @property
    def size(self) -> int:
        """Number of cells."""
        return math.prod(self.grid.shape)

    def index(self, shape: tuple[int, ...]) -> NDArray[np.int64]:
        """Return the flat positions of the cells in a grid of this shape, (cells,)."""
        number = np.arange(math.prod(shape)).reshape(shape)[self.rows]
        taken = np.concatenate([number[:, c] for c in self.columns], axis=1) if self.columns else number
        return taken.ravel() if self.keep is None else taken.ravel()[self.keep]

    def take(self, array: xr.DataArray, dtype: type[np.floating]) -> NDArray[np.floating]:
        """Read this part of an array (..., T, Y, X) or (..., T, N), as (..., T, cells), in memory of its own."""
        names = [str(d) for d in array.dims[-2 if self.columns else -1 :]]
        if self.columns:
            pieces = [array.isel({names[0]: self.rows, names[1]: c}).values for c in self.columns]
        else:
            pieces = [array.isel({names[0]: self.rows}).values]
        values = np.concatenate(pieces, axis=-1, dtype=dtype)
        flat = values.reshape(*values.shape[: -len(names)], -1)
        return flat if self.keep is None else flat[..., self.keep]


def part_of(grid: Grid | Cells, shape: tuple[int, ...], near: Box | None) -> Part:
    """Return the part of a grid that lies near a box, or all of it.

    Args:
        grid: regular grid, or cells in the order of a flattened array.
        shape: horizontal shape of the array, (Y, X) or (N,).
        near: the box.

    Raises:
        GridError: the grid has no CRS, or no cell near the box.
    """
    if near is None:
        return Part(grid, slice(None), (slice(None),) if len(shape) == 2 else ())
    return _part_of_cells(grid, shape, near) if isinstance(grid, Cells) else _part_of_grid(grid, near)


def _part_of_grid(grid: Grid, near: Box) -> Part:
    from pyproj import CRS

    crs = CRS.from_wkt(crs_of(grid))
    west, south, east, north = near.bounds_in(crs)
    first, stop = _reach(grid.y, south, north, near.margin)
    rows = (max(0, first), min(grid.y.size, stop))
    if crs.is_geographic:
        x_axis, columns = _around(grid.x, west, east, near.margin)
    else:
        low, high = _reach(grid.x, west, east, near.margin)
        low, high = max(0, low), min(grid.x.size, high)
        x_axis, columns = grid.x.isel(low, max(low, high)), (slice(low, high),)
    if rows[1] <= rows[0] or x_axis.size == 0:
        raise GridError(
            f"The source covers x {_span(grid.x)} and y {_span(grid.y)}; x {west:.4f} to {east:.4f} and y "
            f"{south:.4f} to {north:.4f} is needed, all of it uncovered. Choose another target grid or box, or a "
            "larger source."
        )
    return Part(Grid(grid.y.isel(*rows), x_axis, grid.crs_wkt), slice(*rows), columns)


def crs_of(grid: Grid | Cells) -> str:
    """Return the CRS of a grid.

    Raises:
        GridError: it has none.
    """
    if grid.crs_wkt is None:
        raise GridError(
            "The source has no CRS, so it cannot be placed on a target grid. Declare `crs` of the source in "
            "catalog.yaml."
        )
    return grid.crs_wkt


def _span(axis: Axis) -> str:
    return f"{axis.edges.min():.4f} to {axis.edges.max():.4f}"


def _reach(axis: Axis, low: float, high: float, margin: int) -> tuple[int, int]:
    """Cells from..to that a stretch touches, with a margin; may lie outside the axis."""
    first, last = sorted(((low - axis.edges[0]) / axis.step, (high - axis.edges[0]) / axis.step))
    return math.floor(first + ROUNDING) - margin, math.ceil(last - ROUNDING) + margin


def _around(axis: Axis, west: float, east: float, margin: int) -> tuple[Axis, tuple[slice, ...]]:
    """The part of a longitude axis between two meridians, joined across the seam of a global axis; of the turns by
    which a regional axis may lie off them, the one that covers most.
    """
    turn = FULL_CIRCLE / abs(axis.step)
    cyclic = abs(axis.size - turn) < 1e-3
    if not cyclic:
        ways = [_reach(axis, west + FULL_CIRCLE * k, east + FULL_CIRCLE * k, margin) for k in (-2, -1, 0, 1, 2)]
        low, high = max(ways, key=lambda w: min(axis.size, w[1]) - max(0, w[0]))
        low, high = max(0, low), min(axis.size, high)
        return axis.isel(low, max(low, high)), (slice(low, high),)
    low, high = _reach(axis, west, east, margin)
    if high - low >= axis.size:
        return axis, (slice(None),)
    start, stop = low % axis.size, low % axis.size + high - low
    pieces = (slice(start, min(stop, axis.size)), slice(0, max(0, stop - axis.size)))
    return axis.isel(start, stop), tuple(p for p in pieces if p.stop > p.start)


def _part_of_cells(cells: Cells, shape: tuple[int, ...], near: Box) -> Part:
    from pyproj import CRS

    crs = CRS.from_wkt(cells.crs_wkt)
    west, south, east, north = near.bounds_in(crs)
    x, y = cells.corners[..., 0], cells.corners[..., 1]
    known = np.asarray(np.isfinite(cells.corners[:, :3]).all(axis=(1, 2)))
    x, y = np.where(known[:, None], x, 0.0), np.where(known[:, None], y, 0.0)
    shift = np.zeros(len(x))
    if crs.is_geographic:
        centre = (west + east) / 2
        shift = -FULL_CIRCLE * np.round((np.nanmean(x, axis=1) - centre) / FULL_CIRCLE)
    x = x + shift[:, None]
    touches = (np.nanmax(x, axis=1) >= west) & (np.nanmin(x, axis=1) <= east)
    touches = touches & (np.nanmax(y, axis=1) >= south) & (np.nanmin(y, axis=1) <= north) & known
    found = np.flatnonzero(touches)
    if found.size == 0:
        raise GridError(
            f"No cell of the source is near x {west:.4f} to {east:.4f} and y {south:.4f} to {north:.4f}, which is "
            "needed. Choose another target grid or box, or another source."
        )
    corners = np.stack((x[found], np.where(np.isfinite(cells.corners[found, :, 0]), y[found], np.nan)), axis=-1)
    kept = Cells(corners, cells.crs_wkt)
    if len(shape) == 1:
        rows = slice(int(found[0]), int(found[-1]) + 1)
        return Part(kept, rows, (), found - rows.start)
    row, column = np.divmod(found, shape[1])
    rows, columns = (slice(int(v.min()), int(v.max()) + 1) for v in (row, column))
    keep = (row - rows.start) * (columns.stop - columns.start) + column - columns.start
    return Part(kept, rows, (columns,), keep)
