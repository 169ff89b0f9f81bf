"""Conservative regridding of coarse cubes, in place and time, onto the lattice that a factor needs.

A depth averages over area and sums over time: a target cell gets the overlap-weighted mean of the source
cells on it, a target step the overlap-weighted sum of the source steps in it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import shapely
from pyproj import CRS, Transformer
from scipy import sparse

from stsr_core.errors import GridError
from stsr_core.factors import LARGEST
from stsr_core.grids import Axis, Cells, Grid, TimeAxis, around_nodes
from stsr_core.overlap import shares
from stsr_core.sources.box import Box, crs_of, part_of
from stsr_core.sources.cube import Coarse, Cube
from stsr_core.sources.harmonise import with_negatives

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stsr_core.configuration import TargetGrid
    from stsr_core.factors import Factor
    from stsr_core.sources.harmonise import Reading

COVERED = 1 - 1e-3  # share of a target cell that source cells must cover; weights make up for what lacks
MISSING_SHARE = 1e-6  # share of missing source area above which a target cell is missing
OVERLAPPED = 1 + 1e-3  # source cells that cover a target cell more often lie on each other
PARALLEL_POINTS = 8  # of an edge along a parallel, which other projections bend
KEPT_WEIGHTS = 8  # pairs of grids whose weights a process keeps
BLOCK_VALUES = 1 << 20  # values that are regridded at a time: what a processor keeps close


def coarse_grid(target: TargetGrid, factor: Factor) -> Grid:
    """Coarse lattice of a factor that covers a target box.

    Its cells lie on absolute multiples of their spacing in the target's CRS; the box grows outward to whole
    coarse cells. Rows run north to south, as on a map.
    """
    spacing = target.spacing_m * factor.space

    def span(low: float, high: float) -> tuple[int, int]:
        return math.floor(low / spacing), math.ceil(high / spacing)

    x0, x1 = span(target.x_min, target.x_max)
    y0, y1 = span(target.y_min, target.y_max)
    return Grid(
        Axis((y1 - 0.5) * spacing, -spacing, y1 - y0),
        Axis((x0 + 0.5) * spacing, spacing, x1 - x0),
        CRS.from_user_input(target.crs).to_wkt(),
    )


def reach(target: TargetGrid) -> Box:
    """Return the box that the coarse lattices of all factors need: the target grown by the largest coarse cell."""
    grow = target.spacing_m * LARGEST[0]
    return Box(
        target.x_min - grow, target.y_min - grow, target.x_max + grow, target.y_max + grow,
        CRS.from_user_input(target.crs).to_wkt(),
    )  # fmt: skip


def native_factor(coarse: Coarse | Reading, target: TargetGrid) -> tuple[float, float]:
    """Factor (space, time) that a source would need as it is: its cell size and cadence over those of the target.

    The cell size is the root of the area that the source cell in the middle of the target box, else the nearest, has in
    the target's CRS, where fine cells are counted; 0 where no source cell has a place there.

    Raises:
        GridError: the source has no CRS.
    """
    crs = CRS.from_user_input(target.crs)
    nearby = part_of(coarse.place, coarse.place.shape, Box.around(_box_grid(target, crs)))
    outlines = _moved(nearby.grid, crs)
    cells = shapely.polygons(_filled(outlines))
    middle = shapely.Point((target.x_min + target.x_max) / 2, (target.y_min + target.y_max) / 2)
    distance = np.where(np.isfinite(outlines).any(axis=(1, 2)), shapely.distance(cells, middle), np.inf)
    return (
        math.sqrt(cells[int(np.argmin(distance))].area) / target.spacing_m,
        coarse.times.step / timedelta(hours=target.fine_step_h),
    )


def _box_grid(target: TargetGrid, crs: CRS) -> Grid:
    width, height = target.x_max - target.x_min, target.y_max - target.y_min
    return Grid(Axis(target.y_min + height / 2, height, 1), Axis(target.x_min + width / 2, width, 1), crs.to_wkt())


def _nodes(grid: Grid) -> NDArray[np.float64]:
    """Places where cells of a grid with a CRS meet, (Y + 1, X + 1, 2); none beyond a pole, where rows may lie."""
    y = np.clip(grid.y.edges, -90.0, 90.0) if CRS.from_wkt(crs_of(grid)).is_geographic else grid.y.edges
    return np.stack(np.meshgrid(grid.x.edges, y), axis=-1)


def regrid(coarse: Coarse, grid: Grid) -> Cube:
    """Regrid conservatively onto a regular grid, by exact overlap of cell polygons in its CRS.

    Args:
        coarse: amounts on cells with a CRS.
        grid: target with a CRS.

    Returns:
        Area-weighted mean amounts; a target cell is missing in every step in which more than MISSING_SHARE
        of it lies on missing source cells. Edges of source cells are straight in the target's CRS, but for those of
        cells in rows of latitude.

    Raises:
        GridError: a CRS is unknown, or source cells do not cover the target, or overlap each other.
    """
    if isinstance(coarse, Cube) and coarse.grid == grid:
        return coarse
    weights = _weights(coarse.place, grid)
    flat = coarse.amount.reshape(coarse.times.size, -1)
    out = np.empty((coarse.times.size, *grid.shape), np.float32)
    block = max(1, BLOCK_VALUES // max(1, weights.shape[0] + weights.shape[1]))
    for first in range(0, len(flat), block):
        out[first : first + block] = _weighted(weights, flat[first : first + block].T).T.reshape(-1, *grid.shape)
    return Cube(out, coarse.times, grid, coarse.attributes, coarse.driving)


def read_onto(reading: Reading, grid: Grid) -> tuple[Cube, ...]:
    """Read and regrid every driving member conservatively onto a regular grid, see `regrid`, block by block.

    Memory holds what is returned and one block, never the whole source.
    """
    out, negatives = reading.gathered(grid.shape, lambda one: regrid(one, grid).amount)
    return tuple(
        Cube(amount, reading.times, grid, with_negatives(reading.attributes, zeros), label)
        for amount, zeros, label in zip(out, negatives, reading.labels, strict=True)
    )


@lru_cache(maxsize=KEPT_WEIGHTS)
def _weights(source: Grid | Cells, grid: Grid) -> sparse.csr_matrix:
    """Shares that source cells have of what is covered of every target cell, (target, source); rows sum to 1."""
    shape = source.shape
    nearby = part_of(source, shape, Box.around(grid))
    corners = _outlines(nearby.grid, CRS.from_wkt(grid.crs_wkt or ""))
    share = shares(corners, grid)
    column = nearby.index(shape)[share.col]
    weights = sparse.csr_matrix((share.data, (share.row, column)), shape=(share.shape[0], math.prod(shape)))
    covered = np.asarray(weights.sum(axis=1)).ravel()
    if covered.min() < COVERED:
        raise GridError(_uncovered(grid, covered))
    if covered.max() > OVERLAPPED:
        raise GridError(
            f"Source cells overlap each other: a target cell is covered {covered.max():.3f} times. Are the bounds of "
            "its cells right?"
        )
    return sparse.csr_matrix(sparse.diags_array(1 / covered) @ weights)


def _outlines(place: Grid | Cells, crs: CRS) -> NDArray[np.float64]:
    """Corners (N, V, 2) of cells in another CRS, see `_moved`; those of cells without a place there are 0.

    Raises:
        GridError: outlines that cross themselves.
    """
    moved = _moved(place, crs)
    corners = _filled(moved)
    bent = ~shapely.is_valid(shapely.polygons(corners)) & np.isfinite(moved).any(axis=(1, 2))
    if bent.any():
        raise GridError(
            f"{int(bent.sum())} source cells near the target have outlines that cross themselves. Are the corners of "
            "its cells in order?"
        )
    return corners


def _moved(place: Grid | Cells, crs: CRS) -> NDArray[np.float64]:
    """Corners (N, V, 2) of cells in another CRS, straight between them, NaN where a cell has fewer.

    All are NaN of cells that have no place there, or only a part of one, as beyond the limb that a satellite sees.
    """
    source = CRS.from_wkt(crs_of(place))
    to_crs = Transformer.from_crs(source, crs, always_xy=True).transform
    places = _nodes(place) if isinstance(place, Grid) else place.corners
    if isinstance(place, Cells) and source.is_geographic and not crs.is_geographic:
        places = _along_parallels(places)
    moved = np.stack(to_crs(places[..., 0], places[..., 1]), axis=-1)
    lost = np.isfinite(places) & ~np.isfinite(moved)
    moved[~np.isfinite(moved)] = np.nan
    if isinstance(place, Grid):
        moved, lost = around_nodes(moved), around_nodes(lost)
    moved[lost.any(axis=(1, 2))] = np.nan
    return moved


def _along_parallels(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """Corners (N, V, 2) with points between those on the same latitude, in all cells.

    Rows of reduced grids have different lengths, so corners of one lie within edges of the next: straight edges would
    leave gaps between them, and overlap.
    """
    way = np.roll(corners, -1, axis=1) - corners
    share = np.arange(PARALLEL_POINTS)[:, None] / PARALLEL_POINTS
    parts = [
        corners[:, v, None] + share * way[:, v, None] if (way[:, v, 1] == 0).all() else corners[:, v, None]
        for v in range(corners.shape[1])
    ]
    return np.concatenate(parts, axis=1)


def _weighted(weights: sparse.csr_matrix, amount: NDArray[np.float32]) -> NDArray[np.float64]:
    """Weighted sums (target, n) of amounts (source, n), in float64; NaN where more than MISSING_SHARE falls on NaN."""
    result: NDArray[np.float64] = weights @ amount
    if np.isnan(result).any():
        missing = np.isnan(amount)
        result = weights @ np.where(missing, np.float32(0), amount)
        result[weights @ missing > MISSING_SHARE] = np.nan
    return result


def _filled(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """Corners (N, V, 2) in which those that are NaN repeat the one before; 0 where there is none."""
    filled = corners.copy()
    for v in range(1, filled.shape[1]):
        absent = ~np.isfinite(filled[:, v]).all(axis=1)
        filled[absent, v] = filled[absent, v - 1]
    return np.where(np.isfinite(filled), filled, 0.0)


def _uncovered(grid: Grid, covered: NDArray[np.float64]) -> str:
    rows, columns = np.nonzero((covered < COVERED).reshape(grid.shape))
    y, x = ((axis.edges[[index.min(), index.max() + 1]]) for axis, index in ((grid.y, rows), (grid.x, columns)))
    return (
        f"{rows.size} of {covered.size} target cells are not covered by source cells: they lie in x {x.min():.0f} to "
        f"{x.max():.0f}, y {y.min():.0f} to {y.max():.0f}; the worst is covered to {covered.min():.0%}. Choose a "
        "smaller target grid in catalog.yaml, or a larger source."
    )


def _overlap(size: int, target: NDArray[np.float64]) -> sparse.csr_matrix:
    """Length of the overlap of target intervals, given by edges, with the source intervals 0..1, 1..2 up to `size`.

    Returns:
        (target, source).
    """
    reached = math.ceil(float((target[1:] - target[:-1]).max())) + 1  # source intervals that a target may touch
    source = np.floor(target[:-1, None]).astype(np.int64) + np.arange(reached)
    length = np.minimum(target[1:, None], source + 1) - np.maximum(target[:-1, None], source)
    inside = (length > 0) & (source >= 0) & (source < size)
    row = np.broadcast_to(np.arange(len(source))[:, None], source.shape)
    return sparse.csr_matrix((length[inside], (row[inside], source[inside])), shape=(len(source), size))


def _along(amount: NDArray[np.float32], axis: int, weights: sparse.csr_matrix) -> NDArray[np.float32]:
    """Apply weights (target, source) along one axis, see `_weighted`."""
    moved = np.moveaxis(amount, axis, 0)
    series = moved.reshape(len(moved), -1)
    out = np.empty((weights.shape[0], series.shape[1]), np.float32)
    block = max(1, BLOCK_VALUES // max(1, len(series)))
    for first in range(0, series.shape[1], block):
        out[:, first : first + block] = _weighted(weights, series[:, first : first + block])
    return np.moveaxis(out.reshape(-1, *moved.shape[1:]), 0, axis)


def regrid_time(cube: Cube, step: timedelta) -> Cube:
    """Change the cadence conservatively; new steps lie on absolute multiples of `step` inside the cube's period.

    Steps that are so long already stay where they are.

    Raises:
        GridError: the period holds no whole new step.
    """
    times = cube.times
    if step == times.step:
        return cube
    first = math.ceil(times.since_epoch / step - 1e-9)
    last = math.floor((times.since_epoch + times.step * times.size) / step + 1e-9)
    if last <= first:
        raise GridError(
            f"The source spans {times.step * times.size} from {times.start}; it holds no whole step of {step}. "
            "Give a longer period."
        )
    offset = (step * first - times.since_epoch) / times.step
    edges = offset + (step / times.step) * np.arange(last - first + 1, dtype=np.float64)
    weights = _overlap(times.size, edges)
    changed = TimeAxis(times.start + times.step * offset, step, last - first, times.label)
    return replace(cube, amount=_along(cube.amount, 0, weights), times=changed)


def regrid_to_factor(cube: Cube, asked: tuple[int, int], served: Factor) -> Cube:
    """Regrid within the cube's own axes so that `served` reaches the fine grid that (s, t) `asked` would have.

    The new coarse cell is asked fine cells times the served factor; what does not fill whole new cells at the far
    edges is left out.

    Raises:
        GridError: the cube is smaller than one new cell.
    """
    space, time = asked
    if asked == (served.space, served.time):
        return cube
    amount, axes = cube.amount, []
    for number, axis in ((1, cube.grid.y), (2, cube.grid.x)):
        ratio = served.space / space
        count = math.floor(axis.size / ratio + 1e-9)
        if count < 1:
            raise GridError(f"{axis.size} cells are less than one coarse cell of factor {served}. Use a larger domain.")
        weights = _overlap(axis.size, ratio * np.arange(count + 1, dtype=np.float64)) / ratio
        amount = _along(amount, number, weights)
        step = axis.step * ratio
        axes.append(Axis(float(axis.edges[0]) + step / 2, step, count))
    spatial = replace(cube, amount=amount, grid=Grid(axes[0], axes[1], cube.grid.crs_wkt))
    return regrid_time(spatial, cube.times.step * (served.time / time))
