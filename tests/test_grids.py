from datetime import datetime, timedelta

import cftime
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyproj import CRS

from stsr_core.errors import ShapeError
from stsr_core.factors import Factor
from stsr_core.grids import Axis, Cells, Grid, TimeAxis, coarsen

steps = st.sampled_from([0.1, 0.25, 1 / 24, 1000.0, 10_000.0, -0.1, -1000.0])


@given(st.integers(-500, 500), steps, st.integers(2, 50), st.integers(1, 25))
def test_refined_cells_fill_the_coarse_ones(index, step, size, parts):
    axis = Axis(index * step, step, size)
    fine = axis.refine(parts)
    np.testing.assert_allclose(fine.edges[::parts], axis.edges, rtol=1e-9, atol=abs(step) * 1e-6)
    np.testing.assert_allclose(fine.centres.reshape(size, parts).mean(axis=1), axis.centres, atol=abs(step) * 1e-6)


@given(st.integers(-500, 500), st.sampled_from([0.0, 0.5]), steps, st.integers(0, 30))
def test_a_cell_has_the_same_lattice_index_in_every_subset(index, offset, step, start):
    axis = Axis((index + offset) * step, step, 40)
    assert axis.isel(start, 40).lattice_index == axis.lattice_index + start


LOCAL = 'ENGCRS["l",EDATUM["x"],CS[Cartesian,2],AXIS["x",east],AXIS["y",north],LENGTHUNIT["metre",1]]'


@pytest.mark.parametrize(
    ("crs", "first", "step", "expected"),
    [
        (2154, (6.5e6, 7e5), (-1000.0, 1000.0), 1.0),  # Lambert-93, metres
        (4326, (45.0, 5.0), (-0.01, 0.01), 0.9356),  # 1.1113 km along the meridian, 0.7876 along the parallel
        (4326, (0.0, 179.99), (1.0, 1.0), 110.95),  # across the antimeridian
    ],
)
def test_spacing_is_measured_on_the_ground(crs, first, step, expected):
    y, x = (Axis(f, s, 3) for f, s in zip(first, step, strict=True))
    grid = Grid(y, x, CRS.from_epsg(crs).to_wkt())
    assert grid.spacing_km == pytest.approx(expected, rel=3e-3)
    assert grid.refine(2).spacing_km == pytest.approx(grid.spacing_km / 2, rel=3e-3)


@pytest.mark.parametrize("crs", [None, LOCAL, CRS.from_epsg(4326).to_wkt()])
def test_a_grid_that_no_crs_places_on_the_ground_counts_as_1_km(crs):
    at_the_pole = Axis(90.0, 0.1, 1)
    assert Grid(at_the_pole, Axis(0.0, 0.1, 1), crs).spacing_km == 1.0


@pytest.mark.parametrize("calendar", [None, "360_day", "noleap"])
def test_time_axis_keeps_its_calendar_and_bounds_touch(calendar):
    start = datetime(2001, 2, 27) if calendar is None else cftime.datetime(2001, 2, 27, calendar=calendar)
    axis = TimeAxis(start, timedelta(days=1), 5, "middle")
    fine = axis.refine(4)
    assert (axis.bounds[1:, 0] == axis.bounds[:-1, 1]).all()
    assert (fine.bounds[::4, 0] == axis.bounds[:, 0]).all()
    assert axis.isel(2, 5).lattice_index == axis.lattice_index + 2
    if calendar == "360_day":
        assert axis.bounds[3, 0] == cftime.datetime(2001, 2, 30, calendar=calendar)


@given(st.integers(1, 60), st.integers(0, 500), st.integers(0, 30))
def test_a_step_has_the_same_lattice_index_in_every_period(parts, day, first):
    axis = TimeAxis(datetime(2001, 1, 1) + timedelta(days=day), timedelta(hours=6) / parts, 31)
    assert axis.isel(first, 31).lattice_index == axis.lattice_index + first


def test_labels_name_start_middle_or_end():
    for label, hour in (("start", 0), ("middle", 3), ("end", 6)):
        axis = TimeAxis(datetime(2000, 1, 1), timedelta(hours=6), 2, label)
        assert axis.labels[0] == np.datetime64(f"2000-01-01T{hour:02d}")


@pytest.mark.parametrize("year", [850, 1600, 2290])
def test_dates_beyond_the_centuries_of_nanoseconds_are_right(year):
    axis = TimeAxis(datetime(year, 1, 1), timedelta(hours=6), 3)
    assert axis.labels.tolist() == [datetime(year, 1, 1, hour) for hour in (6, 12, 18)]
    assert axis.bounds[0].tolist() == [datetime(year, 1, 1), datetime(year, 1, 1, 6)]


def test_coarse_total_sums_over_time_and_averages_over_area():
    # Two steps of 1 mm everywhere and 4 mm in one of four cells: 1 + (1 + 1 + 1 + 4) / 4 = 2.75 mm.
    fine = np.ones((2, 2, 2), np.float32)
    fine[1, 0, 0] = 4.0
    np.testing.assert_allclose(coarsen(fine, Factor(space=2, time=2)), [[[2.75]]])


def test_coarsen_refuses_partial_blocks():
    with pytest.raises(ShapeError, match=r"no multiple of factor \(2,1\)"):
        coarsen(np.ones((1, 3, 4), np.float32), Factor(space=2, time=1))


def test_cells_are_equal_by_their_corners_and_crs():
    corners = np.array([[[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [np.nan, np.nan]]])
    assert Cells(corners, LOCAL) == Cells(corners.copy(), LOCAL)
    assert len({Cells(corners, LOCAL), Cells(corners.copy(), LOCAL), Cells(corners + 1, LOCAL)}) == 2
    assert Cells(corners, LOCAL) != Cells(corners, "")
    assert Cells(corners, LOCAL) != Grid(Axis(0.5, 1.0, 1), Axis(0.5, 1.0, 1), LOCAL)
