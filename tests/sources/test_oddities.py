"""Files as their producers wrote them: each reads to the physically right answer, or is refused with the reason.

The right answers are computed here from the raw numbers (netCDF4 without masks and scales, eccodes message by message),
by other means than the ones tested.
"""

from datetime import datetime, timedelta
from pathlib import Path

import cftime
import netCDF4
import numpy as np
import pytest

from stsr_core.configuration import TargetGrid
from stsr_core.errors import GridError, SourceError
from stsr_core.factors import Factor
from stsr_core.regrid import coarse_grid, regrid
from stsr_core.sources.cube import CellCube, Cube
from stsr_core.sources.declared import Declared
from stsr_core.sources.open import open_dataset
from tests.reading import read_coarse

ODDITIES = Path(__file__).parents[3] / "shared" / "data" / "oddities"
pytestmark = pytest.mark.skipif(not ODDITIES.is_dir(), reason="shared/data/oddities is not here")

AORC = "AORC.19790201.precip.nc"
MRMS = "MRMS_GaugeCorr_QPE_01H_00.00_20160922-040000.grib2"
ARPEGE = "arpege_PRECIP_SE.grib"
ERA5 = "era5_cp_lsp_radolan24km_x_test.nc"
NEX = "nexgddp_pr_2005-01.nc"
CMCC = "pr_Amon_CMCC-CM2-SR5_dcppA-hindcast_s1960-r10i1p1f1_gn_196011-197012.nc"
EC_EARTH = "pr_day_EC-Earth3_dcppA-hindcast_s1961-r6i2p1f1_gr_19620101-19621231.nc"
STAGE_IV = "test_stageiv_xyt_borked.nc"
HADGEM = "xclim_pr_day_HadGEM2-CC_rcp85_360day_2095.nc"
RADOLAN = "+proj=stere +lat_0=90 +lat_ts=60 +lon_0=10 +a=6370040 +b=6370040 +units=km"


def read(name, variable, near=None, **declared):
    with open_dataset(str(ODDITIES / name)) as dataset:
        return read_coarse(dataset, variable, Declared(**declared), near=near)


def raw(name, *variables):
    with netCDF4.Dataset(ODDITIES / name) as data:
        data.set_auto_maskandscale(False)
        found = [data[v][:].astype(np.float64) for v in variables]
    return found[0] if len(found) == 1 else found


def test_aorc_marks_missing_cells_as_minus_9999_without_saying_so():
    with pytest.raises(SourceError, match=r"-9999 mm .* \d+ values are the same.*declare `missing_values:`"):
        read(AORC, "precrate", time_label="end")
    cube = read(AORC, "precrate", time_label="end", missing_values=(-9999.0,))
    values = raw(AORC, "precrate")  # mm per hour, hourly: the number is the amount
    land = values != -9999.0
    assert np.isnan(cube.amount).sum() == (~land).sum()
    assert float(cube.amount[land].sum(dtype=np.float64)) == pytest.approx(values[land].sum(), rel=1e-6)
    assert cube.times.start == datetime(1979, 2, 1, 0)  # its description: stamps are at the end of the hour


def test_mrms_grib2_says_neither_units_nor_interval_nor_what_minus_3_means():
    with pytest.raises(SourceError, match="Nothing says which time"):
        read(MRMS, "unknown", units="mm")
    with pytest.raises(SourceError, match="no length.*`step_h:`"):
        read(MRMS, "unknown", units="mm", time_label="end")
    with pytest.raises(SourceError, match="no units"):
        read(MRMS, "unknown", time_label="end", step_h=1.0)
    declared = {"units": "mm", "time_label": "end", "step_h": 1.0}
    with pytest.raises(SourceError, match="-3 mm .* values are the same"):
        read(MRMS, "unknown", **declared)
    cube = read(MRMS, "unknown", **declared, missing_values=(-3.0,))
    values = grib_values(MRMS)[0]
    assert cube.amount.shape == (1, 3500, 7000)
    assert float(np.nansum(cube.amount, dtype=np.float64)) == pytest.approx(values[values != -3].sum(), rel=1e-6)
    assert cube.times.start == datetime(2016, 9, 22, 3)
    assert cube.grid.y.first == pytest.approx(54.995)
    assert cube.grid.x.first == pytest.approx(230.005)


def grib_values(name):
    import eccodes

    found = []
    with (ODDITIES / name).open("rb") as file:
        while (handle := eccodes.codes_grib_new_from_file(file)) is not None:
            found.append(eccodes.codes_get_values(handle))
            eccodes.codes_release(handle)
    return np.array(found)


def test_arpege_grib1_accumulates_since_the_start_and_its_differences_dip_below_0():
    with pytest.raises(SourceError, match=r"Negative precipitation: -0\.3108 mm at step 18.*max_negative_mm"):
        read(ARPEGE, "tp")
    cube = read(ARPEGE, "tp", max_negative_mm=0.35)
    totals = grib_values(ARPEGE).reshape(24, 53, 80)
    hour = totals[9] - totals[8]
    np.testing.assert_allclose(cube.amount[9], np.where(hour < 0, 0, hour), atol=1e-6)
    differences = np.diff(totals, axis=0, prepend=0)
    assert cube.attributes["negatives_set_to_zero"] == str((differences < 0).sum())
    # Setting negatives to 0 adds exactly what they lacked: 17.7 mm of 30 728 mm over all cells.
    added = float(cube.amount.sum(dtype=np.float64)) - totals[-1].sum()
    assert added == pytest.approx(-differences[differences < 0].sum(), rel=1e-4)
    assert (cube.times.start, cube.times.step) == (datetime(2018, 5, 1), timedelta(hours=1))
    assert cube.grid.y.first == pytest.approx(46.25)
    assert cube.grid.x.first == 2.0


def test_era5_parts_without_units_and_crs_add_up_when_both_are_declared():
    with pytest.raises(SourceError, match="no units"):
        read(ERA5, "cp + lsp", time_label="end")
    cube = read(ERA5, "cp + lsp", units="mm", time_label="end")
    convective, large_scale = raw(ERA5, "cp", "lsp")
    np.testing.assert_allclose(cube.amount, convective + large_scale, rtol=1e-6)
    target = TargetGrid(crs="EPSG:25832", spacing_m=1000.0, x_min=5e5, x_max=6e5, y_min=5.6e6, y_max=5.7e6)
    grid = coarse_grid(target, Factor(space=25, time=1))
    with pytest.raises(GridError, match="no CRS.*Declare `crs`"):
        regrid(cube, grid)
    placed = read(ERA5, "cp + lsp", units="mm", time_label="end", crs=RADOLAN)
    assert placed.grid.x.step == 24.0  # km, as the declared CRS has it
    assert regrid(placed, grid).amount.max() <= placed.amount.max()


def test_nex_gddp_daily_noleap_means_are_at_noon_and_become_daily_totals():
    with pytest.raises(SourceError, match="Nothing says which time"):
        read(NEX, "pr")
    cube = read(NEX, "pr", time_label="middle")
    flux = raw(NEX, "pr")
    np.testing.assert_allclose(cube.amount, flux * 86400, rtol=1e-6)
    assert cube.times.start == cftime.DatetimeNoLeap(2005, 1, 1)
    assert cube.times.step == timedelta(days=1)
    assert cube.grid.crs_wkt is not None  # lon has no units, but lat does and their names are plain


def test_cmcc_months_are_refused_because_they_are_not_even():
    with pytest.raises(SourceError, match=r"Step 1 \(1960-12-02 .* lasts 28 days.*months"):
        read(CMCC, "pr")


def test_ec_earth_days_come_from_bounds_and_its_cells_leave_gaps_that_are_not_filled():
    cube = read(EC_EARTH, "pr")
    flux = raw(EC_EARTH, "pr")
    np.testing.assert_allclose(cube.amount, np.maximum(flux, 0).reshape(365, 18) * 86400, rtol=1e-6)
    assert cube.attributes["negatives_set_to_zero"] == str((flux < 0).sum())  # all of them above -1e-20 mm
    assert (cube.times.start, cube.times.label) == (datetime(1962, 1, 1), "middle")
    # Every hundredth cell was kept: centres are 70 degrees apart, but bounds say that a cell is 0.7 degrees wide.
    assert isinstance(cube, CellCube)
    assert np.ptp(cube.cells.corners[7, :, 0]) == pytest.approx(0.703125)
    target = TargetGrid(crs="EPSG:3035", spacing_m=1000.0, x_min=2.7e6, x_max=2.9e6, y_min=3.0e6, y_max=3.2e6)
    with pytest.raises(GridError, match=r"not covered|No cell of the source is near"):
        regrid(cube, coarse_grid(target, Factor(space=25, time=1)))


def test_broken_stage_iv_is_refused_until_its_interval_is_declared():
    name = "Total_precipitation_surface_1_Hour_Accumulation"
    with pytest.raises(SourceError, match="have no length.*`time_label:` and `step_h:`"):
        read(STAGE_IV, name)
    cube = read(STAGE_IV, name, time_label="end", step_h=1.0)
    values, latitude, longitude = raw(STAGE_IV, name, "lat", "lon")
    np.testing.assert_allclose(cube.amount.reshape(118, 87), values[0], rtol=1e-6)
    assert cube.times.start == datetime(2018, 9, 14, 4)
    # Latitude and longitude are stored as (x, y): cell (row 50, column 20) must lie at their [20, 50].
    ring = cube.cells.corners.reshape(118, 87, 4, 2)[50, 20]
    assert ring.mean(axis=0) == pytest.approx((longitude[20, 50], latitude[20, 50]), abs=1e-3)
    # HRAP cells are about 4 km wide: 4762.5 m on its polar stereographic plane true at 60 N.
    height = np.hypot(*((ring[3] - ring[0]) * (np.cos(np.deg2rad(35)), 1))) * 111.2
    assert 3.8 < height < 4.5


def test_hadgem_360_day_calendar_keeps_its_30th_of_february():
    with pytest.raises(SourceError, match="Nothing says which time"):
        read(HADGEM, "pr")
    cube = read(HADGEM, "pr", time_label="start")
    flux = raw(HADGEM, "pr")
    np.testing.assert_allclose(cube.amount, flux * 86400, rtol=1e-6)
    assert cube.times.labels[59] == cftime.Datetime360Day(2095, 2, 30)
    assert isinstance(cube, Cube)
    assert cube.grid.y.step == pytest.approx(-1 / 12, rel=1e-4)
    january = np.nansum(cube.amount[:30], axis=0)
    np.testing.assert_allclose(january, np.nansum(flux[:30], axis=0) * 86400, rtol=1e-5)
