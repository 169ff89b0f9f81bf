"""Conservative regridding of coarse cubes, in place and time, onto the lattice that a factor needs.

A depth averages over area and sums over time: a target cell gets the overlap-weighted mean of the source
cells on it, a target step the overlap-weighted sum of the source steps in it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np
import shapely
from pyproj import CRS, Geod, Transformer
from scipy import sparse

from stsr_core.errors import GridError
from stsr_core.grids import Axis, Grid, TimeAxis
from stsr_core.sources.cube import Cube

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stsr_core.configuration import TargetGrid
    from stsr_core.factors import Factor

COVERED = 1 - 1e-6  # share of a target cell that source cells must cover
MISSING_SHARE = 1e-6  # share of missing source area above which a target cell is missing
MARGIN_CELLS = 2  # source cells kept around the target box


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


def native_factor(cube: Cube, target: TargetGrid) -> tuple[float, float]:
    """Factor (space, time) that a cube would need as it is: its cell size and cadence over those of the target.

    The cell size is the root of the area of the source cell at the middle of the target box.
    """
    crs = _crs_of(cube)
    to_source = Transformer.from_crs(CRS.from_user_input(target.crs), crs, always_xy=True)
    x, y = to_source.transform((target.x_min + target.x_max) / 2, (target.y_min + target.y_max) / 2)
    dx, dy = abs(cube.grid.x.step), abs(cube.grid.y.step)
    if crs.is_geographic:
        geod = crs.get_geod() or Geod(ellps="WGS84")
        width = geod.inv(x - dx / 2, y, x + dx / 2, y)[2]
        height = geod.inv(x, y - dy / 2, x, y + dy / 2)[2]
    else:
        metres = crs.axis_info[0].unit_conversion_factor
        width, height = dx * metres, dy * metres
    return math.sqrt(width * height) / target.spacing_m, cube.times.step / timedelta(hours=target.fine_step_h)


def _crs_of(cube: Cube) -> CRS:
    if cube.grid.crs_wkt is None:
        raise GridError(
            "The source has no CRS, so it cannot be placed on a target grid. Declare `crs` of the source in "
            "catalog.yaml."
        )
    return CRS.from_wkt(cube.grid.crs_wkt)


def regrid(cube: Cube, grid: Grid) -> Cube:
    """Regrid conservatively onto another regular grid, by exact overlap of cell polygons in its CRS.

    Args:
        cube: coarse amounts with a CRS.
        grid: target with a CRS.

    Returns:
        Area-weighted mean amounts; a target cell is missing in every step in which more than MISSING_SHARE
        of it lies on missing source cells. Edges of source cells are straight in the target's CRS.

    Raises:
        GridError: a CRS is unknown, or source cells do not cover the target.
    """
    if cube.grid == grid:
        return cube
    source, rows, columns = _nearby(cube, grid)
    polygons = _polygons(source, CRS.from_wkt(grid.crs_wkt or ""))
    cells = _polygons(grid, None)
    target_index, source_index = shapely.STRtree(polygons).query(cells, predicate="intersects")
    area = shapely.area(shapely.intersection(cells[target_index], polygons[source_index]))
    share = area / abs(grid.x.step * grid.y.step)
    weights = sparse.csr_matrix((share, (target_index, source_index)), shape=(len(cells), len(polygons)))
    covered = np.asarray(weights.sum(axis=1)).ravel()
    if covered.min() < COVERED:
        raise GridError(_uncovered(grid, covered))
    amount = cube.amount[:, rows, columns].reshape(cube.times.size, -1).T.astype(np.float64)
    return replace(cube, amount=_weighted(weights, amount, covered).T.reshape(-1, *grid.shape), grid=grid)


def _weighted(
    weights: sparse.csr_matrix, amount: NDArray[np.float64], covered: NDArray[np.float64]
) -> NDArray[np.float32]:
    missing = np.isnan(amount)
    result = (weights @ np.where(missing, 0.0, amount)) / covered[:, None]
    if missing.any():
        result[weights @ missing.astype(np.float64) > MISSING_SHARE] = np.nan
    return result.astype(np.float32)


def _nearby(cube: Cube, grid: Grid) -> tuple[Grid, slice, slice]:
    """Part of the source grid around the target, and where it lies in the cube."""
    crs = _crs_of(cube)
    to_source = Transformer.from_crs(CRS.from_wkt(grid.crs_wkt or ""), crs, always_xy=True)
    x, y = grid.x.edges, grid.y.edges
    west, south, east, north = to_source.transform_bounds(x.min(), y.min(), x.max(), y.max(), densify_pts=51)

    def part(axis: Axis, low: float, high: float, name: str) -> slice:
        position = sorted(((low - axis.edges[0]) / axis.step, (high - axis.edges[0]) / axis.step))
        if position[0] < -1e-9 or position[1] > axis.size + 1e-9:
            raise GridError(
                f"The source covers {name} {min(axis.edges[0], axis.edges[-1]):.4f} to "
                f"{max(axis.edges[0], axis.edges[-1]):.4f}; the target needs {low:.4f} to {high:.4f}. "
                "Choose a smaller target grid in catalog.yaml, or a larger source."
            )
        first, last = math.floor(position[0]) - MARGIN_CELLS, math.ceil(position[1]) + MARGIN_CELLS
        return slice(max(0, first), min(axis.size, last))

    rows = part(cube.grid.y, south, north, "y")
    columns = part(cube.grid.x, west, east, "x")
    y_axis, x_axis = cube.grid.y.isel(rows.start, rows.stop), cube.grid.x.isel(columns.start, columns.stop)
    return Grid(y_axis, x_axis, crs.to_wkt()), rows, columns


def _polygons(grid: Grid, crs: CRS | None) -> NDArray[np.object_]:
    """Cell polygons, row by row, in another CRS if one is given."""
    x, y = np.meshgrid(grid.x.edges, grid.y.edges)
    if crs is not None:
        x, y = Transformer.from_crs(CRS.from_wkt(grid.crs_wkt or ""), crs, always_xy=True).transform(x, y)
    corner = np.stack((x, y), axis=-1)
    rings = np.stack((corner[:-1, :-1], corner[:-1, 1:], corner[1:, 1:], corner[1:, :-1]), axis=2)
    return shapely.polygons(rings.reshape(-1, 4, 2))


def _uncovered(grid: Grid, covered: NDArray[np.float64]) -> str:
    worst = np.unravel_index(int(covered.argmin()), grid.shape)
    x, y = grid.x.centres[worst[1]], grid.y.centres[worst[0]]
    return (
        f"{int((covered < COVERED).sum())} of {covered.size} target cells are not covered by source cells; the worst, "
        f"at x = {x:.0f}, y = {y:.0f}, is covered to {covered.min():.0%}. Choose a smaller target grid in catalog.yaml."
    )


def _overlap(source: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Length of the overlap of every target interval with every source interval, both given by edges."""
    low = np.maximum(target[:-1, None], source[None, :-1])
    high = np.minimum(target[1:, None], source[None, 1:])
    return np.clip(high - low, 0.0, None)


def _along(amount: NDArray[np.float32], axis: int, weights: NDArray[np.float64]) -> NDArray[np.float32]:
    """Apply weights (target, source) along one axis; NaN where any weight falls on NaN."""
    moved = np.moveaxis(amount, axis, -1).astype(np.float64)
    missing = np.isnan(moved)
    result = np.where(missing, 0.0, moved) @ weights.T
    if missing.any():
        result[missing.astype(np.float64) @ weights.T > MISSING_SHARE] = np.nan
    return np.moveaxis(result, -1, axis).astype(np.float32)


def regrid_time(cube: Cube, step: timedelta) -> Cube:
    """Change the cadence conservatively; new steps lie on absolute multiples of `step` inside the cube's period.

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
    weights = _overlap(np.arange(times.size + 1.0), edges)
    changed = TimeAxis(times.start + times.step * offset, step, last - first, times.label)
    return replace(cube, amount=_along(cube.amount, 0, weights), times=changed)


def regrid_to_factor(cube: Cube, asked: Factor, served: Factor) -> Cube:
    """Regrid within the cube's own axes so that `served` reaches the fine grid that `asked` would have.

    The new coarse cell is asked fine cells times the served factor; what does not fill whole new cells at the far
    edges is left out.

    Raises:
        GridError: the cube is smaller than one new cell.
    """
    if asked == served:
        return cube
    amount, axes = cube.amount, []
    for number, axis in ((1, cube.grid.y), (2, cube.grid.x)):
        ratio = served.space / asked.space
        count = math.floor(axis.size / ratio + 1e-9)
        if count < 1:
            raise GridError(f"{axis.size} cells are less than one coarse cell of factor {served}. Use a larger domain.")
        weights = _overlap(np.arange(axis.size + 1.0), ratio * np.arange(count + 1, dtype=np.float64)) / ratio
        amount = _along(amount, number, weights)
        step = axis.step * ratio
        axes.append(Axis(float(axis.edges[0]) + step / 2, step, count))
    spatial = replace(cube, amount=amount, grid=Grid(axes[0], axes[1], cube.grid.crs_wkt))
    return regrid_time(spatial, cube.times.step * (served.time / asked.time))
