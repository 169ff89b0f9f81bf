"""Grids of every kind: what is read and regridded is checked against polygons put together here, cell by cell."""

from datetime import datetime, timedelta

import numpy as np
import pytest
import shapely
import xarray as xr
from pyproj import CRS, Transformer

from stsr_core.configuration import TargetGrid
from stsr_core.errors import GridError, SourceError
from stsr_core.factors import Factor
from stsr_core.grids import Axis, Cells, Grid
from stsr_core.regrid import PARALLEL_POINTS, coarse_grid, native_factor, reach, regrid
from stsr_core.sources.box import Box
from stsr_core.sources.declared import Declared
from stsr_core.sources.open import open_dataset
from tests.reading import read_coarse

TARGET = TargetGrid(crs="EPSG:2154", spacing_m=1000.0, x_min=8.5e5, x_max=9.0e5, y_min=6.3e6, y_max=6.35e6)
LATTICE = coarse_grid(TARGET, Factor(space=10, time=1))
ROTATED = {
    "grid_mapping_name": "rotated_latitude_longitude",
    "grid_north_pole_latitude": 43.0,
    "grid_north_pole_longitude": -170.0,
}


def rain(*shape):
    return np.random.default_rng(3).gamma(0.5, 2.0, shape).astype(np.float32)


def timed(variables, coords=None, nt=2):
    """A dataset with hourly bounds, its variable `pr` in mm."""
    time = np.datetime64("2001-01-01T01", "ns") + np.arange(nt) * np.timedelta64(1, "h")
    data = xr.Dataset(variables, {"time": time, **(coords or {})})
    data["time_bnds"] = (("time", "nv"), np.stack([time - np.timedelta64(1, "h"), time], axis=1))
    data["time"].attrs["bounds"] = "time_bnds"
    data["time"].encoding.update(units="hours since 2001-01-01", dtype="int32")
    data["pr"].attrs.setdefault("units", "mm")
    return data


def slow(rings, amounts):
    """Area means over the cells of LATTICE by one intersection after the other; rings are in EPSG:2154."""
    out = np.zeros(LATTICE.shape)
    polygons = [shapely.Polygon(r) for r in rings]
    for i in range(LATTICE.shape[0]):
        for j in range(LATTICE.shape[1]):
            y, x = np.sort(LATTICE.y.edges[i : i + 2]), np.sort(LATTICE.x.edges[j : j + 2])
            cell = shapely.box(x[0], y[0], x[1], y[1])
            out[i, j] = sum(p.intersection(cell).area * a for p, a in zip(polygons, amounts, strict=True)) / cell.area
    return out


def rectangles(x, y, crs, parts=1):
    """Outlines of the cells between edges; of edges along x, so many parts are straight in EPSG:2154."""
    to, on = Transformer.from_crs(crs, 2154, always_xy=True), np.linspace(0, 1, parts + 1)
    return [
        [
            to.transform(x[j] + (x[j + 1] - x[j]) * share, y[row])
            for row, way in ((i, 1), (i + 1, -1))
            for share in on[::way]
        ]
        for i in range(len(y) - 1)
        for j in range(len(x) - 1)
    ]


def check(data, rings, declared=None, kind=Grid):
    coarse = read_coarse(data, "pr", declared or Declared(), near=reach(TARGET))
    assert isinstance(coarse.grid if kind is Grid else coarse.cells, kind)
    whole = read_coarse(data, "pr", declared or Declared())
    out = regrid(coarse, LATTICE)
    np.testing.assert_allclose(out.amount, regrid(whole, LATTICE).amount, rtol=1e-6)
    flat = data["pr"].values.reshape(len(out.amount), -1)
    for step in range(len(out.amount)):
        np.testing.assert_allclose(out.amount[step], slow(rings, flat[step]), rtol=1e-5)
    return coarse


def edges(centres):
    step = centres[1] - centres[0]
    return np.append(centres - step / 2, centres[-1] + step / 2)


def test_numbers_of_a_grid_mapping_may_be_lists_of_one():
    x, y = 4e4 * np.arange(-3.0, 4), 4e4 * np.arange(-3.0, 3)
    lambert = {"grid_mapping_name": "lambert_conformal_conic", "longitude_of_central_meridian": 10.5,
               "latitude_of_projection_origin": 49.5, "standard_parallel": 49.5}  # fmt: skip
    for made in (float, lambda v: np.array([v]), lambda v: [v]):
        attributes = {k: made(v) if isinstance(v, float) else v for k, v in lambert.items()}
        variables = {"pr": (("time", "y", "x"), rain(2, 6, 7), {"grid_mapping": "crs"}), "crs": ((), 0, attributes)}
        found = read_coarse(timed(variables, {"y": y, "x": x}), "pr").grid.crs_wkt
        assert found == CRS.from_cf(lambert).to_wkt()


def test_rotated_pole_in_netcdf3(tmp_path):
    lat = np.arange(-4.5, -1.0, 0.25)
    lon = np.arange(-5.5, -1.0, 0.25)
    crs = CRS.from_cf(ROTATED)
    pr = rain(2, lat.size, lon.size)
    coords = {"rlat": ("rlat", lat, {"units": "degrees"}), "rlon": ("rlon", lon, {"units": "degrees"})}
    data = timed({"pr": (("time", "rlat", "rlon"), pr, {"grid_mapping": "rotated_pole"})}, coords)
    data["rotated_pole"] = ((), np.int32(0), ROTATED)
    data.to_netcdf(tmp_path / "r.nc", format="NETCDF3_CLASSIC")
    with open_dataset(str(tmp_path / "r.nc")) as opened:
        coarse = check(opened, rectangles(edges(lon), edges(lat), crs))
    space, time = native_factor(coarse, TARGET)
    # 0.25 degrees near the rotated equator: 27.8 km by 27.8 km times cos(2.6 degrees).
    assert space == pytest.approx(27.8, abs=0.2)
    assert time == 1.0


def test_a_grid_mapping_that_contradicts_latitudes_and_longitudes_is_refused():
    lat, lon = np.arange(-4.5, -1.0, 0.25), np.arange(-5.5, -1.0, 0.25)
    to_degrees = Transformer.from_crs(CRS.from_cf(ROTATED), 4326, always_xy=True)
    longitude, latitude = to_degrees.transform(*np.meshgrid(lon, lat))
    pr = rain(2, lat.size, lon.size)
    data = timed(
        {"pr": (("time", "rlat", "rlon"), pr, {"grid_mapping": "pole"}), "pole": ((), np.int32(0), ROTATED)},
        {"rlat": lat, "rlon": lon, "lat": (("rlat", "rlon"), latitude), "lon": (("rlat", "rlon"), longitude)},
    )
    check(data, rectangles(edges(lon), edges(lat), CRS.from_cf(ROTATED)))
    stated = data["lat"].copy()
    for cells, agrees in ((0.4, True), (0.6, False)):
        data["lat"] = stated + 0.25 * cells
        if agrees:
            assert read_coarse(data, "pr").grid.shape == (14, 18)
        else:
            with pytest.raises(GridError, match="put a cell 16.[67] km from where its lat"):
                read_coarse(data, "pr")
    data["lat"] = stated
    data["pole"].attrs["grid_north_pole_longitude"] = 170.0  # a sign that was lost
    with pytest.raises(GridError, match=r"put a cell \d+\.\d km from where its lat and lon say.*`crs:`"):
        read_coarse(data, "pr")


def test_a_grid_mapping_that_lacks_its_pole_is_refused():
    half = {k: v for k, v in ROTATED.items() if k != "grid_north_pole_longitude"}
    variables = {"pr": (("time", "rlat", "rlon"), rain(2, 3, 4), {"grid_mapping": "pole"}), "pole": ((), 0, half)}
    data = timed(variables, {"rlat": np.arange(3.0), "rlon": np.arange(4.0)})
    with pytest.raises(GridError, match=r"'pole' is not understood \(it lacks 'grid_north_pole_longitude'\).*`crs:`"):
        read_coarse(data, "pr")


def test_the_places_of_wrf_files_have_a_time_and_must_not_move():
    longitude, latitude = np.meshgrid(np.arange(4.2, 6.2, 0.1), np.arange(43.2, 44.7, 0.1))
    latitude = latitude + 0.01 * longitude
    pr = rain(2, *latitude.shape)
    dims = ("time", "south_north", "west_east")
    degrees = {"XLAT": latitude, "XLONG": longitude}
    data = timed({"pr": (dims, pr, {"coordinates": "XLONG XLAT"})})
    data = data.assign({n: (dims, np.stack([v, v])) for n, v in degrees.items()})
    still = timed({"pr": (dims, pr)}, {n: (dims[1:], v) for n, v in degrees.items()})
    found, wanted = (regrid(read_coarse(d, "pr"), LATTICE).amount for d in (data, still))
    np.testing.assert_array_equal(found, wanted)
    data["XLAT"][1] += 0.5
    with pytest.raises(GridError, match="moves with time"):
        read_coarse(data, "pr")


def test_axes_are_known_by_their_cf_units_whatever_their_names():
    lat, lon = np.arange(43.0, 45.0, 0.25), np.arange(4.0, 7.0, 0.25)
    pr = rain(2, lat.size, lon.size)
    north, east = {"units": "degrees_north"}, {"units": "degrees_east"}
    coords = {"g0_lat_1": ("g0_lat_1", lat, north), "g0_lon_2": ("g0_lon_2", lon, east)}
    data = timed({"pr": (("time", "g0_lat_1", "g0_lon_2"), pr)}, coords)
    check(data, rectangles(edges(lon), edges(lat), CRS.from_epsg(4326)))


def test_axes_may_lie_along_dimensions_under_other_names_but_not_contradict_them():
    lat, lon = np.arange(43.0, 45.0, 0.25), np.arange(4.0, 7.0, 0.25)
    north, east = {"units": "degrees_north"}, {"units": "degrees_east"}
    variables = {"pr": (("time", "y", "x"), rain(2, lat.size, lon.size)), "lat": ("y", lat, north)}
    data = timed({**variables, "lon": ("x", lon, east)})
    check(data, rectangles(edges(lon), edges(lat), CRS.from_epsg(4326)))
    swapped = data.rename(y="lat", x="lon").set_coords(["lat", "lon"])
    swapped["lat"].attrs, swapped["lon"].attrs = east, north
    with pytest.raises(GridError, match="Axis lon has the units or attributes of the other axis"):
        read_coarse(swapped, "pr")


def test_numbers_of_rows_and_columns_give_way_to_latitudes_and_longitudes_along_them():
    lat, lon = np.arange(43.0, 45.0, 0.25), np.arange(4.0, 7.0, 0.25)
    coords = {"y": np.arange(lat.size), "x": np.arange(lon.size), "lat": ("y", lat, {"units": "degrees_north"}),
              "lon": ("x", lon, {"units": "degrees_east"})}  # fmt: skip
    data = timed({"pr": (("time", "y", "x"), rain(2, lat.size, lon.size))}, coords)
    rings = rectangles(edges(lon), edges(lat), CRS.from_epsg(4326))
    check(data, rings)
    check(data.drop_vars("x"), rings)
    check(data, rings, Declared(crs="EPSG:4326"))
    with pytest.raises(GridError, match="which is no length"):  # declared in metres, but in no units
        read_coarse(data.drop_vars(["y", "x"]), "pr", Declared(crs="EPSG:3857"))


@pytest.mark.parametrize("attributes", [{"axis": "Y"}, {"units": "1"}, {"standard_name": "latitude"}])
def test_an_axis_that_contradicts_the_latitudes_along_it_is_refused(attributes):
    lat, lon = np.arange(43.0, 45.0, 0.25), np.arange(4.0, 7.0, 0.25)
    coords = {"y": ("y", lat + 0.1, attributes), "x": lon, "lat": ("y", lat, {"units": "degrees_north"})}
    data = timed({"pr": (("time", "y", "x"), rain(2, lat.size, lon.size))}, coords)
    declared = Declared(crs="EPSG:4326")
    assert read_coarse(data, "pr", declared).grid.y.first == pytest.approx(43.1)
    data["y"] = ("y", np.arange(lat.size), attributes)
    for one in (declared, Declared()):
        with pytest.raises(GridError, match="Axis y runs from 0 to 7, and lat along it from 43 to 44.75. Remove"):
            read_coarse(data, "pr", one)


def test_projected_axes_may_have_latitudes_and_longitudes_along_them():
    y, x = 5.3e6 + 2.5e4 * np.arange(8), 4e5 + 2.5e4 * np.arange(12)
    _, lat = Transformer.from_crs(3857, 4326, always_xy=True).transform(x[:8], y)
    for attributes in ({}, {"units": "m"}):
        coords = {"y": ("y", y, attributes), "x": ("x", x, attributes), "lat": ("y", lat, {"units": "degrees_north"})}
        data = timed({"pr": (("time", "y", "x"), rain(2, 8, 12))}, coords)
        grid = read_coarse(data, "pr", Declared(crs="EPSG:3857")).grid
        np.testing.assert_allclose(grid.y.centres, y)
        np.testing.assert_allclose(grid.x.centres, x)


def test_rotated_axes_without_their_pole_are_not_taken_for_latitudes():
    data = timed(
        {"pr": (("time", "rlat", "rlon"), rain(2, 3, 4))},
        {
            "rlat": ("rlat", [40.0, 41, 42], {"units": "degrees"}),
            "rlon": ("rlon", [1.0, 2, 3, 4], {"units": "degrees"}),
        },
    )
    with pytest.raises(GridError, match="no CRS"):
        regrid(read_coarse(data, "pr"), LATTICE)


def test_longitudes_0_to_360_and_descending_latitudes_reach_across_the_meridian():
    lat = np.arange(46.0, 41.0, -0.5)
    west = TargetGrid(crs="EPSG:2154", spacing_m=1000.0, x_min=4.0e5, x_max=4.4e5, y_min=6.3e6, y_max=6.34e6)
    lattice = coarse_grid(west, Factor(space=10, time=1))
    centre = Transformer.from_crs(2154, 4326, always_xy=True).transform(4.2e5, 6.32e6)
    assert -1.0 < centre[0] < 0.0  # just west of Greenwich
    globe = np.arange(0.0, 360.0, 0.5)
    pr = rain(2, lat.size, globe.size)
    coords = {"lat": ("lat", lat, {"units": "degrees_north"}), "lon": ("lon", globe, {"units": "degrees_east"})}
    data = timed({"pr": (("time", "lat", "lon"), pr)}, coords)
    local = data.assign_coords(lon=(globe + 180) % 360 - 180).sortby("lon").sel(lon=slice(-6, 6))
    local["lon"].attrs["units"] = "degrees_east"
    a = regrid(read_coarse(data, "pr", near=reach(west)), lattice)
    b = regrid(read_coarse(local, "pr"), lattice)
    np.testing.assert_allclose(a.amount, b.amount, rtol=1e-6)
    np.testing.assert_allclose(regrid(read_coarse(data, "pr"), lattice).amount, b.amount, rtol=1e-6)
    assert read_coarse(data, "pr", near=reach(west)).grid.x.size < 20


@pytest.mark.parametrize("first", [0.0, -180.0])
@pytest.mark.parametrize("columns", [1024, 1080, 2160, 4320])
def test_longitudes_of_few_digits_close_the_circle(first, columns):
    step = 360.0 / columns
    lat, lon = np.arange(42.0, 47.0, step), (first + step * np.arange(columns)).astype(np.float32)
    coords = {"lat": ("lat", lat.astype(np.float32), {}), "lon": ("lon", lon, {})}
    data = timed({"pr": (("time", "lat", "lon"), np.full((1, lat.size, lon.size), 3.0))}, coords, nt=1)
    for middle in (0, 180):
        crs = CRS.from_proj4(f"+proj=laea +lat_0=44.5 +lon_0={middle}").to_wkt()
        grid = Grid(Axis(8e4, -4e4, 5), Axis(-8e4, 4e4, 5), crs)
        np.testing.assert_allclose(regrid(read_coarse(data, "pr", near=Box.around(grid)), grid).amount, 3.0, rtol=1e-6)
    whole = read_coarse(data, "pr").grid.x
    assert whole.edges[-1] - whole.edges[0] == pytest.approx(360.0, abs=1e-9)


@pytest.mark.parametrize("first", [0.0, -180.0])
def test_a_column_that_lies_on_the_first_a_full_circle_on_is_left_out(first):
    lat, globe = np.arange(46.0, 41.0, -0.5), first + np.arange(0.0, 360.5, 0.5)
    at_zero = TargetGrid(crs="EPSG:2154", spacing_m=1000.0, x_min=4.4e5, x_max=4.8e5, y_min=6.3e6, y_max=6.34e6)
    lattice = coarse_grid(at_zero, Factor(space=10, time=1))
    pr = rain(2, lat.size, globe.size)
    pr[..., -1] = pr[..., 0]
    pr[:, 2, [0, -1]] = np.nan  # in the far north of the target's surroundings
    coords = {"lat": ("lat", lat, {"units": "degrees_north"}), "lon": ("lon", globe, {"units": "degrees_east"})}
    data = timed({"pr": (("time", "lat", "lon"), pr)}, coords)
    once = data.isel(lon=slice(0, -1))
    cube = read_coarse(data, "pr")
    assert cube.grid == read_coarse(once, "pr").grid
    np.testing.assert_array_equal(cube.amount, pr[..., :-1])
    near = regrid(read_coarse(data, "pr", near=reach(at_zero)), lattice)
    np.testing.assert_allclose(near.amount, regrid(read_coarse(once, "pr"), lattice).amount, rtol=1e-6)

    data["pr"][1, 5, -1] += 1.0
    with pytest.raises(SourceError, match=r"last column of lon lies on the first, a full circle on, but 1 of its 20 "):
        read_coarse(data, "pr")


def test_projected_axes_in_km_and_a_declared_crs():
    x, y = np.arange(840.0, 920.0, 8.0), np.arange(6360.0, 6285.0, -8.0)
    coords = {"y": ("y", y, {"units": "km"}), "x": ("x", x, {"units": "km"})}
    data = timed({"pr": (("time", "y", "x"), rain(2, y.size, x.size))}, coords)
    check(data, rectangles(1000 * edges(x), 1000 * edges(y), CRS.from_epsg(2154)), Declared(crs="EPSG:2154"))
    data["x"].attrs["units"] = "K"
    with pytest.raises(GridError, match="no length"):
        read_coarse(data, "pr", Declared(crs="EPSG:2154"))
    with pytest.raises(GridError, match=r"declared CRS 'EPSG:0' is not understood"):
        read_coarse(data, "pr", Declared(crs="EPSG:0"))


def slanted():
    """Centres and corners of a turned lattice in EPSG:2154, as longitudes and latitudes."""
    j, i = np.meshgrid(np.arange(15.0), np.arange(14.0))
    jc, ic = np.meshgrid(np.arange(16.0) - 0.5, np.arange(15.0) - 0.5)
    to = Transformer.from_crs(2154, 4326, always_xy=True)

    def place(a, b):
        return to.transform(8.35e5 + 6000 * a - 1500 * b, 6.28e6 + 1500 * a + 6000 * b)

    return place(j, i), place(jc, ic)


def rings_of(lon, lat):
    """Quads in EPSG:2154 of corner arrays."""
    x, y = Transformer.from_crs(4326, 2154, always_xy=True).transform(lon, lat)
    return [
        [(x[a, b], y[a, b]) for a, b in ((i, j), (i, j + 1), (i + 1, j + 1), (i + 1, j))]
        for i in range(x.shape[0] - 1)
        for j in range(x.shape[1] - 1)
    ]


def test_curvilinear_latitudes_and_longitudes_with_and_without_corners():
    (lon, lat), (lonc, latc) = slanted()
    coords = {
        "lat": (("y", "x"), lat, {"units": "degrees_north", "bounds": "latv"}),
        "lon": (("y", "x"), lon, {"units": "degrees_east", "bounds": "lonv"}),
    }
    data = timed({"pr": (("time", "y", "x"), rain(2, *lon.shape))}, coords)
    for name, c in (("latv", latc), ("lonv", lonc)):
        data[name] = (("y", "x", "v"), np.stack([c[:-1, :-1], c[:-1, 1:], c[1:, 1:], c[1:, :-1]], axis=-1))
    check(data, rings_of(lonc, latc), kind=Cells)
    without = data.drop_vars(["latv", "lonv"])
    out = regrid(read_coarse(without, "pr"), LATTICE).amount
    # Corners half way between centres lie within metres of the true ones here.
    np.testing.assert_allclose(out, regrid(read_coarse(data, "pr"), LATTICE).amount, rtol=2e-3)
    swapped = without.assign_coords(lat=without["lat"].assign_attrs(units="degrees_north") + 60)
    with pytest.raises(GridError, match="Latitudes reach"):
        read_coarse(swapped, "pr")


def test_cells_reach_across_the_line_of_dates_and_to_the_poles():
    """A turned grid whose columns cross 180 degrees, by its centres and by its corners."""
    grid = Grid(Axis(4e4, -2e4, 5), Axis(-4e4, 2e4, 5), CRS.from_proj4("+proj=laea +lat_0=-17 +lon_0=180").to_wkt())
    column, row = np.meshgrid(np.arange(12.0), np.arange(10.0))

    def degrees(a, b):
        return (178.6 + 0.25 * a + 0.05 * b + 180) % 360 - 180, -18.2 + 0.25 * b - 0.05 * a

    lon, lat = degrees(column, row)
    coords = {"lat": (("y", "x"), lat, {"units": "degrees_north"}), "lon": (("y", "x"), lon, {"units": "degrees_east"})}
    data = timed({"pr": (("time", "y", "x"), np.full((2, *lat.shape), 3.0))}, coords)
    assert np.ptp(lon) > 350
    corners = [degrees(column + a, row + b) for a, b in ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5))]
    bounded = data.assign(
        {f"{n}v": (("y", "x", "v"), np.stack([c[i] for c in corners], -1)) for i, n in enumerate("xy")}
    )
    bounded["lon"].attrs["bounds"], bounded["lat"].attrs["bounds"] = "xv", "yv"
    for one in (data, bounded):
        for near in (None, Box.around(grid)):
            np.testing.assert_allclose(regrid(read_coarse(one, "pr", near=near), grid).amount, 3.0, rtol=1e-6)

    uneven = np.array([-90.0, -89.2, -88.0, -86.5])  # of which the first row would reach beyond the pole
    axes = {"lat": ("lat", uneven, {"units": "degrees_north"}), "lon": ("lon", 2.0 * np.arange(180))}
    polar = timed({"pr": (("time", "lat", "lon"), np.full((2, 4, 180), 3.0))}, axes)
    cells = read_coarse(polar, "pr").cells
    assert cells.corners[..., 1].min() == -90.0


def mesh(start_index=0):
    """A UGRID mesh of triangles and quads in one array, counted from 0 or 1."""
    _, (lon, lat) = slanted()
    node = np.arange(lon.size).reshape(lon.shape)
    faces = []
    for i in range(lon.shape[0] - 1):
        for j in range(lon.shape[1] - 1):
            a, b, c, d = node[i, j], node[i, j + 1], node[i + 1, j + 1], node[i + 1, j]
            faces += [[a, b, c, -1], [a, c, d, -1]] if (i + j) % 3 == 0 else [[a, b, c, d]]
    faces = np.array(faces)
    connectivity = np.where(faces < 0, -999, faces + start_index).astype(np.int32)
    data = timed({"pr": (("time", "face"), rain(2, len(faces)), {"mesh": "Mesh2", "location": "face"})})
    data["nodes"] = (("face", "four"), connectivity, {"start_index": start_index, "_FillValue": np.int32(-999)})
    data["node_x"] = ("node", lon.ravel(), {"standard_name": "longitude", "units": "degrees_east"})
    data["node_y"] = ("node", lat.ravel(), {"standard_name": "latitude", "units": "degrees_north"})
    data["Mesh2"] = ((), np.int32(0), {
        "cf_role": "mesh_topology", "topology_dimension": 2, "node_coordinates": "node_x node_y",
        "face_node_connectivity": "nodes",
    })  # fmt: skip
    x, y = Transformer.from_crs(4326, 2154, always_xy=True).transform(lon.ravel(), lat.ravel())
    return data, [[(x[n], y[n]) for n in face if n >= 0] for face in faces]


@pytest.mark.parametrize("start_index", [0, 1])
def test_unstructured_ugrid_meshes(tmp_path, start_index):
    data, rings = mesh(start_index)
    data.to_netcdf(tmp_path / "m.nc")
    with open_dataset(str(tmp_path / "m.nc")) as opened:
        check(opened, rings, kind=Cells)


def test_meshes_may_mark_absent_corners_by_negative_numbers():
    data, rings = mesh()
    data["nodes"] = (("face", "four"), np.where(data["nodes"] < 0, -1, data["nodes"]).astype(np.int32))
    check(data, rings, kind=Cells)


def test_corners_lie_half_way_between_centres_and_as_far_beyond_the_outer_ones():
    lon, lat = np.meshgrid(4.0 + 0.1 * np.arange(6), 43.0 + 0.1 * np.arange(5))
    places = {"lat": (("y", "x"), lat, {"units": "degrees_north"}), "lon": (("y", "x"), lon, {"units": "degrees_east"})}
    corners = read_coarse(timed({"pr": (("time", "y", "x"), rain(2, 5, 6))}, places), "pr").cells.corners
    expected = np.stack([lon, lat], -1).reshape(-1, 1, 2) + np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.05
    np.testing.assert_allclose(corners, expected, atol=1e-4)


@pytest.mark.parametrize("shift", [-0.6, 0.6])
def test_bounds_beside_their_centres_are_refused(shift):
    lat = np.arange(42.0, 46.0)
    coords = {"lat": ("lat", lat, {"units": "degrees_north", "bounds": "lat_bnds"}), "lon": np.arange(4.0, 9.0)}
    data = timed({"pr": (("time", "lat", "lon"), rain(2, 4, 5))}, coords)
    data["lat_bnds"] = (("lat", "nv"), lat[:, None] + shift + np.array([-0.5, 0.5]))
    with pytest.raises(GridError, match="Bounds lat_bnds do not hold the centres of axis lat"):
        read_coarse(data, "pr")


def test_meshes_by_vertices_in_radians_as_icon_writes_them():
    _, (lon, lat) = slanted()
    corner = [np.stack([c[:-1, :-1], c[:-1, 1:], c[1:, 1:], c[1:, :-1]], axis=-1).reshape(-1, 4) for c in (lon, lat)]
    data = timed({"pr": (("time", "cell"), rain(2, len(corner[0])))})
    for name, standard, values in (("clon", "longitude", corner[0]), ("clat", "latitude", corner[1])):
        attributes = {"standard_name": standard, "units": "radian", "bounds": f"{name}_vertices"}
        data[name] = ("cell", np.deg2rad(values.mean(axis=1)), attributes)
        data[f"{name}_vertices"] = (("cell", "v"), np.deg2rad(values), {"units": "radian"})
    check(data, rings_of(lon, lat), kind=Cells)
    with pytest.raises(SourceError, match="have no outlines"):
        read_coarse(data.drop_vars(["clon_vertices", "clat_vertices"]), "pr")
    broken, _ = mesh()
    broken["nodes"][3, 1] = 10_000
    with pytest.raises(SourceError, match="names node 10000, but has 240 nodes"):
        read_coarse(broken, "pr")


@pytest.mark.parametrize("bounds_first", [False, True])
def test_uneven_latitudes_are_cells_by_their_bounds(bounds_first):
    lat_edges = np.array([41.0, 42.0, 43.5, 44.0, 44.2, 46.0])
    lat, lon = (lat_edges[:-1] + lat_edges[1:]) / 2, np.arange(2.0, 8.0, 0.5)
    coords = {"lat": ("lat", lat, {"units": "degrees_north", "bounds": "lat_bnds"}), "lon": ("lon", lon, {})}
    data = timed({"pr": (("time", "lat", "lon"), rain(2, lat.size, lon.size))}, coords)
    data["lat_bnds"] = (("lat", "nv"), np.stack([lat_edges[:-1], lat_edges[1:]], axis=1))
    if bounds_first:
        data["lat_bnds"] = data["lat_bnds"].transpose("nv", "lat")
    check(data, rectangles(edges(lon), lat_edges, CRS.from_epsg(4326), parts=PARALLEL_POINTS), kind=Cells)


def test_totals_are_conserved_to_a_millionth():
    data, rings = mesh()
    out = regrid(read_coarse(data, "pr"), LATTICE)
    y, x = np.sort(LATTICE.y.edges), np.sort(LATTICE.x.edges)
    box = shapely.box(x[0], y[0], x[-1], y[-1])
    exact = sum(shapely.Polygon(r).intersection(box).area * a for r, a in zip(rings, data["pr"].values[0], strict=True))
    assert out.amount[0].sum(dtype=np.float64) * 1e8 == pytest.approx(exact, rel=1e-6)


def test_what_is_not_covered_is_named():
    data, _ = mesh()
    with pytest.raises(GridError, match=r"target cells are not covered .* lie in x 850000 to"):
        regrid(read_coarse(data.isel(face=slice(120, None)), "pr"), LATTICE)
    far = TargetGrid(crs="EPSG:2154", spacing_m=1000.0, x_min=1e5, x_max=2e5, y_min=6.3e6, y_max=6.4e6)
    with pytest.raises(GridError, match="No cell of the source is near x .* which is needed"):
        read_coarse(data, "pr", near=reach(far))


def test_weights_are_made_once_per_pair_of_grids():
    from stsr_core.regrid import _weights

    data, _ = mesh()
    coarse = read_coarse(data, "pr")
    regrid(coarse, LATTICE)
    before = _weights.cache_info()
    regrid(read_coarse(data, "pr"), LATTICE)
    assert _weights.cache_info().hits == before.hits + 1
    assert _weights.cache_info().misses == before.misses


def test_one_entry_of_models_runs_and_scenarios_is_selected_by_label():
    lat, lon = np.arange(45.0, 42.0, -0.5), np.arange(3.0, 7.0, 0.5)
    values = rain(2, 3, 2, lat.size, lon.size)
    coords = {"lat": ("lat", lat, {"units": "degrees_north"}), "lon": ("lon", lon), "scenario": ["ssp126", "ssp585"]}
    data = timed({"pr": (("scenario", "run", "time", "lat", "lon"), values)}, coords)
    with pytest.raises(SourceError, match=r"scenario \(2: ssp126, ssp585\); run \(3: 0, 1, 2\)"):
        read_coarse(data, "pr")
    cube = read_coarse(data, "pr", Declared(select={"scenario": "ssp585", "run": 2}))
    np.testing.assert_array_equal(cube.amount, values[1, 2])
    refused = {"none of ssp126, ssp585": {"scenario": "ssp370"}, "none of 0 to 2": {"run": 3}, "no dimension": {"z": 0}}
    for message, select in refused.items():
        with pytest.raises(SourceError, match=message):
            read_coarse(data, "pr", Declared(select=select))


def test_a_forecast_with_a_scalar_start_and_valid_times_along_its_steps():
    data = timed({"pr": (("time", "lat", "lon"), rain(3, 4, 5))}, {"lat": np.arange(4.0), "lon": np.arange(5.0)}, nt=3)
    forecast = data.drop_vars("time_bnds").rename(time="valid_time").swap_dims(valid_time="step")
    forecast = forecast.assign_coords(time=np.datetime64("2001-01-01", "ns"))
    del forecast["valid_time"].attrs["bounds"]
    cube = read_coarse(forecast, "pr", Declared(time_label="end"))
    assert (cube.times.start, cube.times.step) == (datetime(2001, 1, 1), timedelta(hours=1))


def test_axes_in_radians_are_in_radians():
    lat, lon = np.arange(45.0, 42.0, -0.5), np.arange(3.0, 7.0, 0.5)
    axes = {"lat": ("latitude", lat), "lon": ("longitude", lon)}
    coords = {n: (n, np.deg2rad(v), {"standard_name": s, "units": "radians"}) for n, (s, v) in axes.items()}
    data = timed({"pr": (("time", "lat", "lon"), rain(2, lat.size, lon.size))}, coords)
    data["lat"].attrs["bounds"] = "lat_bnds"
    data["lat_bnds"] = (("lat", "nv"), np.deg2rad(np.stack([lat - 0.25, lat + 0.25], axis=1)))
    grid = read_coarse(data, "pr").grid
    np.testing.assert_allclose(grid.y.centres, lat)
    np.testing.assert_allclose(grid.x.centres, lon)


@pytest.mark.parametrize("units", ["radian", "rad", "microradian"])
@pytest.mark.parametrize("names", [("axis", "Y", "X"), ("standard_name", "projection_{}_angular_coordinate", "")])
def test_angles_that_a_geostationary_satellite_scans_are_lengths_over_its_height(units, names):
    height, size = 35_785_831.0, 1e-6 if units == "microradian" else 1.0
    mapping = {"grid_mapping_name": "geostationary", "perspective_point_height": height, "sweep_angle_axis": "x",
               "longitude_of_projection_origin": -75.0, "latitude_of_projection_origin": 0.0,
               "semi_major_axis": 6378137.0, "semi_minor_axis": 6356752.31414}  # fmt: skip
    angle, step = {"y": 0.08 - 5.6e-5 * np.arange(6), "x": -0.03 + 5.6e-5 * np.arange(7)}, 5.6e-5
    attribute, *words = names
    coords = {}
    for dim, word in zip("yx", words, strict=True):
        said = {attribute: (word or words[0]).format(dim), "units": units, "bounds": f"{dim}_bnds"}
        coords[dim] = (dim, angle[dim] / size, said)
        coords[f"{dim}_bnds"] = ((dim, "nv"), (angle[dim][:, None] + [-step / 2, step / 2]) / size)
    data = timed({"pr": (("time", "y", "x"), rain(2, 6, 7), {"grid_mapping": "m"}), "m": ((), 0, mapping)}, coords)
    grid = read_coarse(data, "pr").grid
    assert CRS.from_wkt(grid.crs_wkt) == CRS.from_cf(mapping)
    np.testing.assert_allclose(grid.y.centres, angle["y"] * height)
    np.testing.assert_allclose(grid.x.centres, angle["x"] * height)
    data["x"].attrs["units"] = "1"
    with pytest.raises(GridError, match="Axis x is in '1', which is no length"):
        read_coarse(data, "pr")
