from datetime import datetime, timedelta
from itertools import pairwise

import numpy as np
import pytest
import shapely
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pyproj import CRS, Transformer

from stsr_core.configuration import TargetGrid
from stsr_core.errors import GridError
from stsr_core.factors import Factor
from stsr_core.grids import Axis, Cells, Grid, TimeAxis
from stsr_core.regrid import coarse_grid, native_factor, reach, regrid, regrid_time, regrid_to_factor
from stsr_core.sources.cube import CellCube, Cube

LATLON = CRS.from_epsg(4326).to_wkt()
TARGET = TargetGrid(crs="EPSG:2154", spacing_m=1000.0, x_min=8.5e5, x_max=9.5e5, y_min=6.3e6, y_max=6.4e6)


def cube_of(amount, step_h=1.0, step=0.1, crs=LATLON):
    nt, ny, nx = amount.shape
    times = TimeAxis(datetime(2018, 5, 1), timedelta(hours=step_h), nt)
    return Cube(amount.astype(np.float32), times, Grid(Axis(46.0, -step, ny), Axis(3.0, step, nx), crs), {})


def exact_mean(cube, grid, row, column):
    """Area-weighted mean over one target cell, by a plain loop over all source polygons."""
    to = Transformer.from_crs(4326, 2154, always_xy=True)
    x, y = grid.x.edges[column : column + 2], grid.y.edges[row : row + 2]
    cell = shapely.box(min(x), min(y), max(x), max(y))
    total = 0.0
    for i in range(cube.grid.y.size):
        for j in range(cube.grid.x.size):
            lon, lat = cube.grid.x.edges[j : j + 2], cube.grid.y.edges[i : i + 2]
            ring = [
                to.transform(a, b) for a, b in ((lon[0], lat[0]), (lon[1], lat[0]), (lon[1], lat[1]), (lon[0], lat[1]))
            ]
            total += cube.amount[0, i, j] * shapely.Polygon(ring).intersection(cell).area
    return total / cell.area


def test_a_target_cell_is_the_mean_by_exact_polygon_overlap():
    cube = cube_of(np.random.default_rng(0).gamma(0.5, 2, (1, 30, 40)))
    grid = coarse_grid(TARGET, Factor(space=25, time=1))
    out = regrid(cube, grid)
    for row, column in ((0, 0), (1, 2), (3, 3)):
        assert out.amount[0, row, column] == pytest.approx(exact_mean(cube, grid, row, column), rel=1e-5)


def test_a_uniform_field_stays_uniform():
    out = regrid(cube_of(np.full((2, 30, 40), 3.0)), coarse_grid(TARGET, Factor(space=8, time=1)))
    np.testing.assert_allclose(out.amount, 3.0, rtol=1e-6)


@pytest.mark.parametrize(("crs", "middle"), [("EPSG:3031", 0.0), ("EPSG:32661", 2e6), ("EPSG:3413", 0.0)])
def test_points_at_the_poles_cover_polar_targets(crs, middle):
    ends = {f"{axis}_{end}": middle + way * 3e5 for axis in "xy" for end, way in (("min", -1), ("max", 1))}
    target = TargetGrid(crs=crs, spacing_m=5000.0, **ends)
    grid = Grid(Axis(90.0, -1.0, 181), Axis(0.0, 1.0, 360), LATLON)  # the outer rows would reach half a cell beyond
    times = TimeAxis(datetime(2018, 5, 1), timedelta(hours=1), 1)
    cube = Cube(np.full((1, 181, 360), 3.0, np.float32), times, grid, {})
    np.testing.assert_allclose(regrid(cube, coarse_grid(target, Factor(space=10, time=1))).amount, 3.0, rtol=1e-6)
    space, _ = native_factor(cube, target)
    assert 0 < space < 30


def test_missing_source_cells_stay_missing_and_touch_only_what_they_cover():
    amount = np.ones((2, 30, 40))
    amount[1, 15, 20] = np.nan
    out = regrid(cube_of(amount), coarse_grid(TARGET, Factor(space=10, time=1)))
    assert not np.isnan(out.amount[0]).any()
    assert 1 <= np.isnan(out.amount[1]).sum() <= 9
    np.testing.assert_allclose(out.amount[1][~np.isnan(out.amount[1])], 1.0, rtol=1e-6)


def test_a_target_outside_the_source_names_what_is_not_covered():
    # Rows end at 46.05 - 10 * 0.1 = 45.05 N, which is y = 6.42e6 m or more everywhere in the box: nothing is covered.
    with pytest.raises(GridError, match=r"The source covers .* is needed, all of it uncovered"):
        regrid(cube_of(np.ones((1, 5, 40))), coarse_grid(TARGET, Factor(space=10, time=1)))


def test_a_source_without_crs_is_refused():
    with pytest.raises(GridError, match="no CRS.*Declare `crs`"):
        regrid(cube_of(np.ones((1, 30, 40)), crs=None), coarse_grid(TARGET, Factor(space=10, time=1)))


def test_coarse_grid_lies_on_absolute_multiples_and_covers_the_box():
    grid = coarse_grid(TARGET, Factor(space=8, time=3))
    assert (np.round(grid.x.edges / 8000) * 8000 == grid.x.edges).all()
    assert grid.x.edges[0] <= TARGET.x_min
    assert grid.x.edges[-1] >= TARGET.x_max
    assert grid.y.step < 0
    assert grid.y.edges[0] >= TARGET.y_max


def test_native_factor_is_cell_size_and_cadence_over_the_targets():
    space, time = native_factor(cube_of(np.ones((4, 30, 40)), step_h=3), TARGET)
    # 0.1 degrees: 11.1 km by 11.1 km * cos(44.2 degrees) = 7.96 km; root of the product 9.4 km.
    assert space == pytest.approx(9.4, abs=0.1)
    assert time == 3


@pytest.mark.parametrize("x_min", [-490_000.0, -510_000.0])
def test_the_native_factor_is_that_of_the_cell_in_the_middle_across_the_line_of_dates_too(x_min):
    # Uneven longitudes, 0.05 degrees wide west of 177 E and 1 degree east of it; those east of 180 are above 180.
    edges = np.concatenate((165 + 0.05 * np.arange(240), 177 + np.arange(16)))
    south = np.arange(-30, -3, 0.5)
    corners = np.array([[[w, s + 0.5], [e, s + 0.5], [e, s], [w, s]] for s in south for w, e in pairwise(edges)])
    times = TimeAxis(datetime(2018, 5, 1), timedelta(hours=1), 1)
    cells = CellCube(np.ones((1, len(corners)), np.float32), times, Cells(corners, LATLON), {})
    target = TargetGrid(
        crs="+proj=laea +lat_0=-17 +lon_0=180 +datum=WGS84", spacing_m=10_000.0, x_min=x_min, x_max=x_min + 1e6,
        y_min=-5e5, y_max=5e5,
    )  # fmt: skip
    # 1 x 0.5 degrees at 16.75 S: 106.6 km by 55.3 km.
    assert native_factor(cells, target)[0] == pytest.approx(7.68, abs=0.01)


def test_the_native_factor_counts_cells_as_the_target_does():
    crs = CRS.from_epsg(3857).to_wkt()  # whose lengths at 44 N are 1.4 times those on the ground
    grid = Grid(Axis(5.6e6, -8000.0, 60), Axis(4.0e5, 8000.0, 80), crs)
    cube = Cube(np.ones((1, 60, 80), np.float32), TimeAxis(datetime(2018, 5, 1), timedelta(hours=1), 1), grid, {})
    assert native_factor(cube, TARGET)[0] == pytest.approx(8.0 * np.cos(np.deg2rad(44.3)), rel=0.01)
    same = TargetGrid(crs="EPSG:3857", spacing_m=1000.0, x_min=6.0e5, x_max=7.0e5, y_min=5.3e6, y_max=5.4e6)
    assert native_factor(cube, same)[0] == pytest.approx(8.0, rel=1e-6)


GEOSTATIONARY = CRS.from_user_input("+proj=geos +h=35785831 +lon_0=0 +sweep=y +a=6378169 +b=6356583.8")


@pytest.mark.parametrize(("lat_0", "covered"), [(50.0, True), (78.0, False), (88.0, False)])
def test_cells_beyond_the_limb_that_a_satellite_sees_cover_nothing(lat_0, covered):
    grid = Grid(Axis(5.5e6, -1e4, 1101), Axis(-5.5e6, 1e4, 1101), GEOSTATIONARY.to_wkt())
    cube = Cube(
        np.full((1, *grid.shape), 2.0, np.float32), TimeAxis(datetime(2018, 5, 1), timedelta(hours=1), 1), grid, {}
    )
    target = TargetGrid(
        crs=f"+proj=laea +lat_0={lat_0} +lon_0=0 +datum=WGS84", spacing_m=2000.0, x_min=-3e5, x_max=3e5, y_min=-3e5,
        y_max=3e5,
    )  # fmt: skip
    lattice = coarse_grid(target, Factor(space=25, time=1))
    if covered:
        np.testing.assert_allclose(regrid(cube, lattice).amount, 2.0, rtol=1e-6)
        assert native_factor(cube, target)[0] > 5.0 * 1.2  # 10 km below the satellite, the more the further away
    else:
        with pytest.raises(GridError, match="of 144 target cells are not covered|no place in the CRS of the source"):
            regrid(cube, lattice)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([0.5, 1.0, 2.0, 3.0, 4.0, 6.0]), st.integers(0, 2**32 - 1))
def test_changing_the_cadence_keeps_the_sum(hours, seed):
    cube = cube_of(np.random.default_rng(seed).gamma(0.5, 2, (12, 3, 3)))
    out = regrid_time(cube, timedelta(hours=hours))
    assert out.amount.shape[0] == 12 / hours
    np.testing.assert_allclose(out.amount.sum(axis=0), cube.amount.sum(axis=0), rtol=1e-5)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 40), st.sampled_from([1, 3, 6]), st.sampled_from([0.5, 1, 2, 4, 6, 9, 24]), st.integers(8, 30))
def test_new_steps_lie_on_absolute_multiples_and_hold_what_fell_in_them(begin, old, new, size):
    """By a plain loop over old and new steps, in hours since the origin of the lattice."""
    amount = np.random.default_rng(begin).gamma(0.5, 2, (size, 1, 2)).astype(np.float32)
    times = TimeAxis(datetime(1850, 1, 1) + timedelta(hours=begin), timedelta(hours=old), size, "middle")
    cube = Cube(amount, times, Grid(Axis(46.0, -0.1, 1), Axis(3.0, 0.1, 2), LATLON), {})
    end = begin + old * size
    wanted = [k for k in range(1000) if begin <= k * new and (k + 1) * new <= end]
    assume(wanted)
    out = regrid_time(cube, timedelta(hours=new))
    if new == old:
        assert out is cube
        return
    assert (out.times.since_epoch, out.times.size) == (timedelta(hours=wanted[0] * new), len(wanted))
    assert (out.times.step, out.times.label) == (timedelta(hours=new), "middle")
    for found, k in zip(out.amount, wanted, strict=True):
        shares = [
            max(0.0, min(begin + old * (i + 1), (k + 1) * new) - max(begin + old * i, k * new)) / old
            for i in range(size)
        ]
        np.testing.assert_allclose(found, np.tensordot(shares, amount, 1), rtol=1e-5, atol=1e-6)


def test_a_period_shorter_than_a_step_is_refused():
    with pytest.raises(GridError, match="no whole step of 6:00:00"):
        regrid_time(cube_of(np.ones((3, 3, 3))), timedelta(hours=6))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([8, 9, 10, 12, 30]), st.integers(0, 2**32 - 1))
def test_regridding_to_the_nearest_factor_keeps_depth_and_fine_spacing(space, seed):
    cube = cube_of(np.random.default_rng(seed).gamma(0.5, 2, (4, 40, 40)))
    out = regrid_to_factor(cube, (space, 1), Factor(space=10, time=1))
    assert out.grid.x.refine(10).step == pytest.approx(cube.grid.x.refine(space).step)
    if space == 10:
        assert out is cube
    uniform = regrid_to_factor(cube_of(np.full((1, 40, 40), 2.0)), (space, 1), Factor(space=10, time=1))
    np.testing.assert_allclose(uniform.amount, 2.0, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 25), st.integers(4, 25), st.integers(1, 6), st.integers(1, 6))
def test_regridding_to_the_nearest_factor_begins_where_the_cube_does_and_keeps_its_totals(asked, served, hours, steps):
    cube = cube_of(np.random.default_rng(asked).gamma(0.5, 2, (60, 20, 30)), step_h=hours)
    ratio, longer = served / asked, steps / hours
    assume(int(20 / ratio) >= 1 and served != asked)
    out = regrid_to_factor(cube, (asked, hours), Factor(space=served, time=steps))
    for axis, before in ((out.grid.y, cube.grid.y), (out.grid.x, cube.grid.x)):
        assert axis.edges[0] == pytest.approx(before.edges[0])
        assert axis.step == pytest.approx(before.step * ratio)
        assert before.size - ratio < axis.size * ratio <= before.size + 1e-6
    assert out.times.step == cube.times.step * longer
    rows, columns = (np.clip(n * ratio - np.arange(m), 0, 1) for n, m in zip(out.grid.shape, (20, 30), strict=True))
    kept = (cube.amount * rows[:, None] * columns).sum(axis=(1, 2)) / ratio**2  # as sums of the new cells
    first, last = ((t - cube.times.start) / cube.times.step for t in (
        out.times.start, out.times.start + out.times.step * out.times.size))  # fmt: skip
    share = np.clip(last - np.arange(60), 0, 1) - np.clip(first - np.arange(60), 0, 1)
    assert out.amount.sum(dtype=float) == pytest.approx((kept * share).sum(), rel=1e-4)


def test_cells_that_lie_on_each_other_or_cross_themselves_are_refused():
    lattice = coarse_grid(TARGET, Factor(space=10, time=1))
    cube = cube_of(np.ones((1, 30, 40)))
    y, x = cube.grid.y.edges, cube.grid.x.edges
    corners = np.array([[[w, n], [e, n], [e, s], [w, s]] for n, s in pairwise(y) for w, e in pairwise(x)])

    def of(rings):
        return CellCube(np.ones((1, len(rings)), np.float32), cube.times, Cells(rings, LATLON), {})

    np.testing.assert_allclose(regrid(of(corners), lattice).amount, 1.0, rtol=1e-6)
    with pytest.raises(GridError, match=r"overlap each other: a target cell is covered 2.000 times"):
        regrid(of(np.concatenate((corners, corners[600:700]))), lattice)
    crossed = corners.copy()
    crossed[620, [1, 2]] = crossed[620, [2, 1]]
    with pytest.raises(GridError, match="1 source cells near the target have outlines that cross themselves"):
        regrid(of(crossed), lattice)
    with pytest.raises(GridError, match=r"target cells are not covered .* the worst is covered to [2-9]\d%"):
        regrid(of(np.delete(corners, 620, axis=0)), coarse_grid(TARGET, Factor(space=25, time=1)))


def test_the_reach_of_a_target_holds_the_lattices_of_all_factors():
    box = reach(TARGET)
    for space in range(1, 26):
        grid = coarse_grid(TARGET, Factor(space=space, time=1))
        assert box.x_min <= grid.x.edges.min() <= grid.x.edges.max() <= box.x_max
        assert box.y_min <= grid.y.edges.min() <= grid.y.edges.max() <= box.y_max


def test_the_native_factor_of_cells_in_feet_is_that_in_metres():
    feet = "+proj=lcc +lat_1=44 +lat_2=49 +lat_0=46.5 +lon_0=3 +x_0=700000 +y_0=6600000 +ellps=GRS80 +units=us-ft"
    crs, step = CRS.from_user_input(feet).to_wkt(), 8000 / 0.3048006096
    grid = Grid(Axis(6.5e6 / 0.3048006096, -step, 40), Axis(7.5e5 / 0.3048006096, step, 40), crs)
    times = TimeAxis(datetime(2018, 5, 1), timedelta(hours=1), 1)
    space, _ = native_factor(Cube(np.ones((1, 40, 40), np.float32), times, grid, {}), TARGET)
    assert space == pytest.approx(8.0, rel=1e-3)
