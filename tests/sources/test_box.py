"""Boxes: what of a grid is read for them."""

import numpy as np
import pytest
import xarray as xr
from pyproj import CRS

from stsr_core.errors import ConfigurationError, GridError
from stsr_core.grids import Axis, Grid
from stsr_core.sources.box import Box, degrees, part_of
from stsr_core.sources.declared import Declared
from stsr_core.sources.harmonise import read_cubes

DEGREES = CRS.from_epsg(4326).to_wkt()
END = Declared(time_label="end")


def globe(first_longitude: float) -> xr.Dataset:
    """One degree around the globe, nodes at the poles as in ERA5; cells hold their number."""
    lat, lon = 90.0 - np.arange(181), first_longitude + np.arange(360)
    coords = {
        "time": np.datetime64("2001-01-01T01", "ns") + np.arange(2) * np.timedelta64(1, "h"),
        "lat": ("lat", lat, {"units": "degrees_north"}),
        "lon": ("lon", lon, {"units": "degrees_east"}),
    }
    values = np.broadcast_to((lat[:, None] + 90) / 1e3 + (lon % 360) / 1e6, (2, 181, 360)).astype(np.float32)
    return xr.Dataset({"pr": (("time", "lat", "lon"), values, {"units": "mm"})}, coords)


@pytest.mark.parametrize("first_longitude", [0.0, -180.0])
@pytest.mark.parametrize("box", ["-3.5,40.5,4.5,49.5", "356.5,40.5,364.5,49.5", "176.5,-9.5,-175.5,0.5"])
def test_cells_of_a_globe_that_a_box_touches_are_read_wherever_its_longitudes_begin(first_longitude, box):
    near = Box.of_degrees(*degrees(box))
    (cube,) = read_cubes(globe(first_longitude), "pr", END, near=near)
    west, south, east, north = degrees(box)
    width = (east - west) % 360
    assert cube.amount.shape == (2, round(north - south), round(width))
    lat = north - 0.5 - np.arange(north - south)
    lon = (west + 0.5 + np.arange(width)) % 360
    np.testing.assert_allclose(cube.amount[0], (lat[:, None] + 90) / 1e3 + lon / 1e6, rtol=1e-5)
    np.testing.assert_allclose(cube.grid.y.centres, lat)
    np.testing.assert_allclose(cube.grid.x.centres % 360, lon, atol=1e-9)


def test_a_cell_that_is_touched_is_read_and_one_that_shares_an_edge_is_not():
    grid = Grid(Axis(9.5, -1.0, 10), Axis(0.5, 1.0, 10), DEGREES)
    part = part_of(grid, grid.shape, Box.of_degrees(2.0, 3.0, 5.001, 6.999))
    assert isinstance(part.grid, Grid)
    assert part.grid.x.centres.tolist() == [2.5, 3.5, 4.5, 5.5]
    assert part.grid.y.centres.tolist() == [6.5, 5.5, 4.5, 3.5]
    tenths = Grid(Axis(49.95, -0.1, 100), Axis(0.05, 0.1, 100), DEGREES)  # whose edges are no exact numbers
    assert part_of(tenths, tenths.shape, Box.of_degrees(0.3, 43.1, 0.7, 43.7)).grid.shape == (6, 4)


def test_a_box_beyond_the_edge_takes_what_there_is_and_one_beside_the_grid_nothing():
    grid = Grid(Axis(9.5, -1.0, 10), Axis(0.5, 1.0, 10), DEGREES)
    assert part_of(grid, grid.shape, Box.of_degrees(-5, -5, 2, 3)).grid.shape == (3, 2)
    with pytest.raises(GridError, match=r"covers x 0.0000 to 10.0000 .* x 20.0000 to 22.0000 .* all of it uncovered"):
        part_of(grid, grid.shape, Box.of_degrees(20, 3, 22, 5))


def test_of_a_projected_grid_the_rows_and_columns_are_taken_that_a_box_of_degrees_reaches():
    grid = Grid(Axis(6.995e6, -10_000.0, 100), Axis(2.05e5, 10_000.0, 100), CRS.from_epsg(2154).to_wkt())
    part = part_of(grid, grid.shape, Box.of_degrees(4.0, 43.0, 6.0, 45.0))
    assert isinstance(part.grid, Grid)
    assert part.grid.shape == (23, 18)  # 770 to 950 km along x: meridians lean
    west, south, east, north = Box.around(part.grid).bounds_in(CRS.from_epsg(4326))
    assert max(west - 4, south - 43, 6 - east, 45 - north) < 0


@pytest.mark.parametrize("text", ["4,43,8", "4;43;8;46", "a,b,c,d", ""])
def test_text_that_is_no_box_is_refused(text):
    with pytest.raises(ConfigurationError, match="no WEST,SOUTH,EAST,NORTH"):
        degrees(text)


@pytest.mark.parametrize("sides", [(4, 46, 8, 43), (4, 43, 4, 46), (4, 43, float("nan"), 46), (4, 43, 8, 91)])
def test_degrees_without_an_inside_are_refused(sides):
    with pytest.raises(ConfigurationError, match="has no inside"):
        Box.of_degrees(*sides)
