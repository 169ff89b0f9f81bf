"""GRIB of reduced grids: rows of different lengths, whose cells are rectangles between rows and between points."""

import eccodes
import numpy as np
import pytest
from pyproj import CRS

from stsr_core.errors import SourceError
from stsr_core.grids import Axis, Grid
from stsr_core.regrid import regrid
from stsr_core.sources.box import Box
from stsr_core.sources.cube import CellCube
from stsr_core.sources.grib import _outlines
from stsr_core.sources.harmonise import read_coarse
from stsr_core.sources.open import open_dataset

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


def test_only_what_lies_near_is_kept_of_a_reduced_grid(gaussian):
    path, amounts, _, _ = gaussian
    with open_dataset(str(path)) as dataset:
        near = read_coarse(dataset, "tp", near=Box(0.0, 40.0, 10.0, 50.0, LATLON))
    assert 12 <= near.amount.shape[1] < amounts.shape[1] / 20


def test_rows_of_unknown_size_are_refused():
    with pytest.raises(SourceError, match="row of one point"):
        _outlines(np.array([50.0, 50.0, 40.0]), np.array([0.0, 5.0, 0.0]), to_poles=False)
