"""GRIB as centres write it: forecast steps of every kind, and reduced grids, whose rows have different lengths."""

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import eccodes
import numpy as np
import pytest
import shapely
from pyproj import CRS, Transformer

from stsr_core.errors import SourceError
from stsr_core.grids import Axis, Grid
from stsr_core.regrid import regrid
from stsr_core.sources.box import Box
from stsr_core.sources.cube import CellCube
from stsr_core.sources.declared import Declared
from stsr_core.sources.grib import PACKING_STEP, _outlines
from stsr_core.sources.harmonise import find
from stsr_core.sources.open import open_dataset
from tests.grib_files import REGULAR, write_grib
from tests.reading import read_coarse

LATLON = CRS.from_epsg(4326).to_wkt()


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory):
    """Two 6-hourly amounts on the global reduced Gaussian grid N32; its path, its amounts [mm], its rows' lengths."""
    path = tmp_path_factory.mktemp("grib") / "n32.grib2"
    rng = np.random.default_rng(3)
    amounts = []
    with path.open("wb") as file:
        for step in (6, 12):
            handle = eccodes.codes_grib_new_from_samples("reduced_gg_pl_32_grib2")
            lengths = eccodes.codes_get_array(handle, "pl")
            settings = {
                "dataDate": 20010101, "dataTime": 0, "productDefinitionTemplateNumber": 8, "typeOfLevel": "surface",
                "shortName": "tp", "startStep": step - 6, "endStep": step, "bitsPerValue": 24,
            }  # fmt: skip
            for key, value in settings.items():
                eccodes.codes_set(handle, key, value)
            amounts.append(rng.gamma(0.5, 4.0, lengths.sum()))
            eccodes.codes_set_values(handle, amounts[-1] / 1000)  # metres
            eccodes.codes_write(handle, file)
            latitude = eccodes.codes_get_array(handle, "distinctLatitudes")
            eccodes.codes_release(handle)
    return path, np.array(amounts), lengths, np.sort(latitude)[::-1]


def exact_means(amount, lengths, rows, south, west, size):
    """Mean over one square of degrees, by a plain loop over all rows and points."""
    edges = np.concatenate(([90.0], (rows[:-1] + rows[1:]) / 2, [-90.0]))
    total = area = 0.0
    at = 0
    for row, length in enumerate(lengths):
        height = min(edges[row], south + size) - max(edges[row + 1], south)
        step = 360.0 / length
        for point in range(length):
            for turn in (-360.0, 0.0, 360.0):
                centre = point * step + turn
                width = min(centre + step / 2, west + size) - max(centre - step / 2, west)
                if height > 0 and width > 0:
                    total += amount[at] * height * width
                    area += height * width
            at += 1
    assert area == pytest.approx(size**2)
    return total / area


def test_a_reduced_gaussian_grid_is_regridded_by_the_exact_overlap_of_its_cells(gaussian):
    path, amounts, lengths, rows = gaussian
    with open_dataset(str(path)) as dataset:
        cube = read_coarse(dataset, "tp")
    assert isinstance(cube, CellCube)
    assert cube.amount.shape == amounts.shape
    np.testing.assert_array_equal(cube.times.bounds[:, 1], cube.times.labels)
    grid = Grid(Axis(47.5, -5.0, 4), Axis(2.5, 5.0, 6), LATLON)
    found = regrid(cube, grid).amount
    wanted = [
        [[exact_means(a, lengths, rows, 45.0 - 5 * i, 5.0 * j, 5.0) for j in range(6)] for i in range(4)]
        for a in amounts
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert found.sum(dtype=float) == pytest.approx(np.sum(wanted), rel=1e-6)


def test_an_octahedral_grid_is_regridded_onto_a_projected_one_without_gaps(tmp_path):
    lengths = np.array([20 + 4 * row for row in range(32)])
    lengths = np.concatenate((lengths, lengths[::-1]))
    settings = {
        "pl": lengths, "numberOfDataPoints": int(lengths.sum()), "dataDate": 20010101, "dataTime": 0,
        "productDefinitionTemplateNumber": 8, "typeOfLevel": "surface", "shortName": "tp", "startStep": 0, "endStep": 6,
        "longitudeOfLastGridPointInDegrees": 360 - 360 / lengths.max(), "bitsPerValue": 24,
    }  # fmt: skip
    amount = np.random.default_rng(5).gamma(0.5, 4.0, lengths.sum())
    path = write_grib(tmp_path / "o32.grib2", ("reduced_gg_pl_32_grib2", settings, amount / 1000))  # metres
    grid = Grid(Axis(6.95e6, -1e5, 9), Axis(1.5e5, 1e5, 10), CRS.from_epsg(2154).to_wkt())
    with open_dataset(path) as dataset:
        cube = read_coarse(dataset, "tp", near=Box.around(grid))
    np.testing.assert_allclose(regrid(replace(cube, amount=np.ones_like(cube.amount)), grid).amount, 1.0, rtol=1e-6)
    box = shapely.box(grid.x.edges[0], grid.y.edges[-1], grid.x.edges[-1], grid.y.edges[0])
    exact = [
        shapely.intersection(bent(ring), box).area * a
        for ring, a in zip(cube.cells.corners, cube.amount[0], strict=True)
    ]
    assert regrid(cube, grid).amount.sum(dtype=float) * 1e10 == pytest.approx(sum(exact), rel=1e-4)


def bent(ring):
    """A cell of degrees in EPSG:2154, its edges in straight parts of 0.05 degrees."""
    to = Transformer.from_crs(4326, 2154, always_xy=True)
    return shapely.Polygon(np.stack(to.transform(*shapely.segmentize(shapely.LinearRing(ring), 0.05).xy), axis=1))


def test_only_what_lies_near_is_kept_of_a_reduced_grid(gaussian):
    path, amounts, _, _ = gaussian
    with open_dataset(str(path)) as dataset:
        near = read_coarse(dataset, "tp", near=Box(0.0, 40.0, 10.0, 50.0, LATLON))
    assert 12 <= near.amount.shape[1] < amounts.shape[1] / 20


def test_rows_of_unknown_size_are_refused():
    with pytest.raises(SourceError, match="row of one point"):
        _outlines(np.array([50.0, 50.0, 40.0]), np.array([0.0, 5.0, 0.0]), to_poles=False)


HOURS = np.random.default_rng(4).gamma(0.5, 3.0, (6, 3, 4))  # mm


@pytest.fixture
def forecast(tmp_path):
    """Write messages (start, end, amounts [mm]) of a forecast of 2020-01-01, east of Japan; return the path."""

    def write(*messages, name="tp", bits=24):
        def message(start, end, values):
            return REGULAR, {
                "Ni": 4, "Nj": 3, "iDirectionIncrementInDegrees": 0.5, "jDirectionIncrementInDegrees": 0.5,
                "latitudeOfFirstGridPointInDegrees": 36, "latitudeOfLastGridPointInDegrees": 35,
                "longitudeOfFirstGridPointInDegrees": 141, "longitudeOfLastGridPointInDegrees": 142.5,
                "dataDate": 20200101, "dataTime": 0, "shortName": name, "bitsPerValue": bits,
                "stepRange": f"{start}-{end}" if name == "tp" else str(end),
            }, np.asarray(values) / 1000  # fmt: skip

        return write_grib(tmp_path / "forecast.grib2", *(message(*m) for m in messages))

    return write


def rain_of(path, variable="tp", **declared):
    with open_dataset(path) as dataset:
        return read_coarse(dataset, variable, Declared(**declared))


def test_sums_since_the_start_may_begin_with_one_over_no_time(forecast):
    cube = rain_of(forecast((0, 0, 0 * HOURS[0]), *((0, k + 1, HOURS[: k + 1].sum(axis=0)) for k in range(6))))
    np.testing.assert_allclose(cube.amount, HOURS, atol=1e-3)
    assert cube.times.start == datetime(2020, 1, 1)


def test_files_of_one_sum_since_the_start_join_with_the_one_over_no_time(forecast, tmp_path):
    for k in range(4):
        path = forecast((0, k, HOURS[:k].sum(axis=0)))
        Path(path).rename(tmp_path / f"f00{k}.grib2")
    cube = rain_of(str(tmp_path / "f00?.grib2"))
    np.testing.assert_allclose(cube.amount, HOURS[:3], atol=1e-3)
    assert cube.times.start == datetime(2020, 1, 1)


def test_of_sums_since_the_start_and_since_a_reset_either_gives_the_amounts(forecast):
    buckets = [(k // 2 * 2, k + 1, HOURS[k // 2 * 2 : k + 1].sum(axis=0)) for k in range(6)]
    run = [(0, k + 1, HOURS[: k + 1].sum(axis=0)) for k in range(6)]  # the first two are in both, as GFS has them
    for messages in (buckets, run, [m for pair in zip(buckets, run, strict=True) for m in pair]):
        np.testing.assert_allclose(rain_of(forecast(*messages)).amount, HOURS, atol=1e-3)
    with pytest.raises(SourceError, match="7 messages of 'tp' are no array"):
        rain_of(forecast(*run, (0, 6, HOURS[0])))


def test_differences_of_packed_sums_dip_below_0_by_their_packing_at_most(forecast):
    sums = [(0, k + 1, np.linspace(0, 500, 12).reshape(3, 4)) for k in range(3)]
    for dip, refused in ((0.9, False), (2.2, True)):
        path = forecast(*sums, bits=12)
        with open_dataset(path) as dataset:
            quantum = dataset["tp"].attrs[PACKING_STEP] * 1000
            values = dataset["tp"].values.copy()
            values[1, 0, 2] -= dip * quantum / 1000
            changed = dataset.assign(tp=dataset["tp"].copy(data=values))
            if refused:
                with pytest.raises(SourceError, match="Negative precipitation"):
                    read_coarse(changed, "tp")
            else:
                assert read_coarse(changed, "tp").attributes["negatives_set_to_zero"] == "1"


def test_a_rate_at_points_in_time_is_none_over_a_step(forecast):
    path = forecast(*((k, k, HOURS[k]) for k in range(6)), name="prate")
    with pytest.raises(SourceError, match="'time: point' is none over a step"):
        rain_of(path, "prate", time_label="end")


def test_mean_rates_are_read_where_rates_at_points_in_time_lie_beside_them(forecast):
    """GFS has both under one name."""
    path = Path(forecast(*((k, k + 1, HOURS[k]) for k in range(6))))
    means = path.read_bytes()
    points = Path(forecast(*((k + 1, k + 1, 7 * HOURS[k]) for k in range(6)))).read_bytes()
    path.write_bytes(means + points)
    np.testing.assert_allclose(rain_of(str(path)).amount, HOURS, atol=1e-3)


BOX = {
    "dataDate": 20010101, "dataTime": 0, "bitsPerValue": 16, "Ni": 4, "Nj": 3,
    "latitudeOfFirstGridPointInDegrees": 45.0, "latitudeOfLastGridPointInDegrees": 43.0,
    "longitudeOfFirstGridPointInDegrees": 3.0,
    "longitudeOfLastGridPointInDegrees": 6.0, "iDirectionIncrementInDegrees": 1.0, "jDirectionIncrementInDegrees": 1.0,
}  # fmt: skip
LAMBERT = {
    "dataDate": 20010101, "dataTime": 0, "bitsPerValue": 16, "gridType": "lambert", "Nx": 4, "Ny": 3,
    "latitudeOfFirstGridPointInDegrees": 43.0, "longitudeOfFirstGridPointInDegrees": 3.0, "LaDInDegrees": 44.0,
    "LoVInDegrees": 6.0, "Latin1InDegrees": 44.0, "Latin2InDegrees": 44.0, "DxInMetres": 1e5, "DyInMetres": 1e5,
    "jScansPositively": 1,
}  # fmt: skip
RAIN = {"productDefinitionTemplateNumber": 8, "shortName": "tp", "startStep": 0, "endStep": 1}
FIELD = np.arange(12.0).reshape(3, 4)  # mm, in rows and columns as the grid has them


def turned(field):
    """Every second row from its end, as NDFD writes them."""
    rows = field.copy()
    rows[1::2] = rows[1::2, ::-1].copy()
    return rows


@pytest.mark.parametrize(
    ("sample", "grid", "values"),
    [
        ("regular_ll_sfc_grib2", BOX, FIELD),
        ("regular_ll_sfc_grib2", {**BOX, "alternativeRowScanning": 1}, turned(FIELD)),
        ("regular_ll_sfc_grib2", {**BOX, "jPointsAreConsecutive": 1}, FIELD.T),
        ("regular_ll_sfc_grib2", {**BOX, "jPointsAreConsecutive": 1, "alternativeRowScanning": 1}, turned(FIELD.T)),
        ("GRIB2", LAMBERT, FIELD),
        ("GRIB2", {**LAMBERT, "alternativeRowScanning": 1}, turned(FIELD)),
    ],
)
def test_points_in_whatever_order_lie_where_the_grid_says(tmp_path, sample, grid, values):
    """The amount is 4 times the row plus the column, in the directions in which the grid counts them."""
    with open_dataset(write_grib(tmp_path / "a.grib2", (sample, {**grid, **RAIN}, values / 1000))) as dataset:
        np.testing.assert_allclose(read_coarse(dataset, "tp").amount.ravel(), FIELD.ravel(), atol=1e-3)
        south, north = (dataset["latitude"].values.flat[i] for i in ((0, -1) if "gridType" in grid else (-1, 0)))
        west, east = (dataset["longitude"].values.flat[i] for i in (0, 3))
    assert south < north
    assert west < east


@pytest.mark.parametrize("scan", [{"jScansPositively": 0}, {"iScansNegatively": 1}, {"jPointsAreConsecutive": 1}])
def test_projected_grids_that_eccodes_would_misplace_are_refused(tmp_path, scan):
    path = write_grib(tmp_path / "a.grib2", ("GRIB2", {**LAMBERT, **scan, **RAIN}, FIELD / 1000))
    with pytest.raises(SourceError, match="grid of type lambert whose points run .* would misplace them"):
        open_dataset(path)


def test_members_of_a_file_have_their_own_amounts_and_missing_cells_in_whatever_order_they_come(tmp_path):
    ensemble = {**BOX, **RAIN, "productDefinitionTemplateNumber": 11, "bitmapPresent": 1, "missingValue": 9999}
    amounts = {(m, k): HOURS[k] * m for m in (3, 1, 2) for k in (1, 0)}
    amounts[2, 1] = np.where(FIELD == 5, np.nan, amounts[2, 1])
    messages = [
        (
            REGULAR,
            {**ensemble, "perturbationNumber": m, "startStep": k, "endStep": k + 1},
            np.nan_to_num(v / 1000, nan=9999),
        )
        for (m, k), v in amounts.items()
    ]
    with open_dataset(write_grib(tmp_path / "a.grib2", *messages)) as dataset:
        cubes = find(dataset, "tp").read_all()
    assert [cube.driving for cube in cubes] == ["1", "2", "3"]
    for m, cube in enumerate(cubes, start=1):
        np.testing.assert_allclose(cube.amount, [amounts[m, 0], amounts[m, 1]], atol=2e-3)


def test_a_mesh_whose_places_are_in_another_file_is_refused_and_long_names_are_kept(tmp_path):
    mesh = {"gridType": "unstructured_grid", "numberOfDataPoints": 12, **RAIN}
    with pytest.raises(SourceError, match="type unstructured_grid, whose cells have no outlines in GRIB"):
        open_dataset(write_grib(tmp_path / "icon.grib2", ("GRIB2", mesh, FIELD)))
    with open_dataset(write_grib(tmp_path / "a.grib2", (REGULAR, {**BOX, **RAIN}, FIELD))) as dataset:
        assert dataset["tp"].attrs["long_name"].lower() == "total precipitation"


def test_other_variables_of_a_file_do_not_keep_precipitation_from_being_read(tmp_path):
    """Temperatures on two levels make no array, those near the ground have one time more than the rain."""
    sample = "regular_ll_sfc_grib2"
    warm = [(sample, {**BOX, "shortName": "2t", "step": hour}, 280 + FIELD) for hour in range(3)]
    above = [
        (sample, {**BOX, "shortName": "t", "typeOfLevel": "isobaricInhPa", "level": level, "step": 1}, 280 + FIELD)
        for level in (500, 850)
    ]
    rain = [(sample, {**BOX, **RAIN, "endStep": hour}, hour * FIELD / 1000) for hour in (1, 2)]
    with open_dataset(write_grib(tmp_path / "a.grib2", *warm, *above, *rain)) as dataset:
        np.testing.assert_allclose(read_coarse(dataset, "tp").amount, np.stack([FIELD, FIELD]), atol=2e-3)
        for name, why in (("2t", "'2t' has other times, members or places than tp"), ("t", "'t' have several grids")):
            with pytest.raises(SourceError, match=why):
                read_coarse(dataset, name)
