"""Files put together here as producers write theirs: each reads to amounts known beforehand, or is refused."""

import bz2
import gzip
import io
import lzma
import zipfile
from datetime import datetime, timedelta

import cftime
import h5py
import netCDF4
import numpy as np
import pytest
import xarray as xr

from stsr_core.checkpoint import Library
from stsr_core.configuration import Configuration, shipped_catalog
from stsr_core.errors import SourceError
from stsr_core.inspection import inspect
from stsr_core.sources.declared import Declared
from stsr_core.sources.harmonise import find
from stsr_core.sources.open import open_dataset
from tests.reading import read_coarse

MM = np.random.default_rng(5).gamma(0.5, 2.0, (4, 5, 6)).astype(np.float32)
LAT, LON = 43.0 + 0.1 * np.arange(5), 4.0 + 0.1 * np.arange(6)
LOOK = {"configuration": Configuration.load(shipped_catalog()), "library": Library.open()}


def lines(dataset, variable=None, declared=None):
    """The lines that an inspection proposes, in order."""
    found = inspect(dataset, variable, declared or Declared(), **LOOK)
    return [d.line.partition(" #")[0].strip() for d in found.doubts]


@pytest.fixture
def imerg(tmp_path):
    """Half an hour in mm/hr, longitudes first, in a group; its bounds end a second early."""
    path = tmp_path / "3B-HHR.HDF5"
    with h5py.File(path, "w") as file:
        grid = file.create_group("Grid")
        grid.create_group("Intermediate")
        for name, values in (("time", np.array([662774400])), ("lon", LON), ("lat", LAT)):
            grid[name] = values
            grid[name].make_scale(name)
        seconds = b"seconds since 1980-01-06 00:00:00 UTC"
        grid["time"].attrs.update(units=np.bytes_(seconds), calendar=np.bytes_(b"julian"), bounds=np.bytes_(b"tb"))
        grid["lat"].attrs["units"], grid["lon"].attrs["units"] = np.bytes_(b"degrees_north"), np.bytes_(b"degrees_east")
        grid["tb"] = np.array([[662774400, 662776199]])
        grid["precipitation"] = 2 * MM[:1].transpose(0, 2, 1)
        grid["precipitation"].attrs["units"] = np.bytes_(b"mm/hr")
        for axis, name in enumerate(("time", "lon", "lat")):
            grid["precipitation"].dims[axis].attach_scale(grid[name])
    return path


def test_imerg_lies_in_a_group_and_its_bounds_leave_out_a_second(imerg):
    with open_dataset(str(imerg)) as dataset:
        with pytest.raises(
            SourceError, match=r"leave out the last second. If steps last 0.5 h, declare `time_label: s"
        ):
            read_coarse(dataset, "precipitation")
        assert lines(dataset) == ["time_label: start", "step_h: 0.5"]
        cube = read_coarse(dataset, "precipitation", Declared(time_label="start", step_h=0.5))
    np.testing.assert_allclose(cube.amount, MM[:1], rtol=1e-6)
    assert cube.times.step == timedelta(minutes=30)
    assert cube.times.start == datetime(2001, 1, 6, 0, 0)  # of our calendar, whatever the file calls it


def test_several_groups_are_named(imerg):
    with h5py.File(imerg, "a") as file:
        file.create_group("Other")
    with pytest.raises(SourceError, match=r"no variables but in groups \(Grid, Other\). Copy the group"):
        open_dataset(str(imerg))


@pytest.mark.parametrize(("calendar", "kind"), [("proleptic_gregorian", datetime), ("365_day", cftime.datetime)])
def test_dates_that_cdo_writes_as_numbers_of_days(tmp_path, calendar, kind):
    """Running sums stamped with 20010228.0, .25, .5 and .75; the first of the sums has no known start."""
    with netCDF4.Dataset(tmp_path / "icon.nc", "w") as file:
        for name, values in (("time", 20010228 + np.arange(4) / 4), ("lat", LAT), ("lon", LON)):
            file.createDimension(name, len(values))
            file.createVariable(name, "f8", (name,))[:] = values
        file["time"].setncatts({"units": "day as %Y%m%d.%f", "calendar": calendar})
        file.createVariable("tot_prec", "f8", ("time", "lat", "lon"))[:] = MM.cumsum(axis=0)
        file["tot_prec"].units = "kg m-2"
    with open_dataset(str(tmp_path / "icon.nc")) as dataset:
        cube = read_coarse(dataset, "tot_prec", Declared(accumulated="run"))
        np.testing.assert_allclose(cube.amount, MM[1:], atol=1e-5)
        assert isinstance(cube.times.start, kind)
        assert str(cube.times.start) == "2001-02-28 00:00:00"
        assert cube.times.step == timedelta(hours=6)
        later = dataset.assign_coords(time=dataset["time"] + 1)
        with pytest.raises(SourceError, match="20010229, which is no day as %Y%m%d.%f of calendar"):
            read_coarse(later, "tot_prec", Declared(accumulated="run"))


def wrf(path, hours, mm, *, xtime, written="2001-03-01_{:02}:00:00"):
    """A wrfout file: running sums since the start of the run, dates as characters, and perhaps minutes since then."""
    with netCDF4.Dataset(path, "w", format="NETCDF3_64BIT_OFFSET") as file:
        for name, size in {"Time": None, "DateStrLen": 19, "south_north": 5, "west_east": 6}.items():
            file.createDimension(name, size)
        times = file.createVariable("Times", "S1", ("Time", "DateStrLen"))
        times[:] = [list(written.format(h)) for h in hours]
        dims = ("Time", "south_north", "west_east")
        lon, lat = np.meshgrid(LON, LAT)
        for name, values, units in (("XLAT", lat, "degree_north"), ("XLONG", lon, "degree_east"), ("RAINNC", mm, "mm")):
            file.createVariable(name, "f4", dims)[:] = np.broadcast_to(values, (len(hours), 5, 6))
            file[name].units = units
        file["RAINNC"].coordinates = "XLONG XLAT XTIME" if xtime else "XLONG XLAT"
        if xtime:
            file.createVariable("XTIME", "f4", ("Time",))[:] = 60.0 * np.array(hours)
            file["XTIME"].units = "minutes since 2001-03-01 00:00:00"


@pytest.mark.parametrize("xtime", [False, True])
def test_wrf_writes_its_dates_as_characters_and_one_file_after_the_other(tmp_path, xtime):
    sums = np.concatenate((np.zeros_like(MM[:1]), MM.cumsum(axis=0)))
    wrf(tmp_path / "wrfout_d01_a", [0, 3, 6], sums[:3], xtime=xtime)
    wrf(tmp_path / "wrfout_d01_b", [9, 12], sums[3:], xtime=xtime)
    run = Declared(accumulated="run")
    with open_dataset(str(tmp_path / "wrfout_d01_a")) as dataset:
        cube = read_coarse(dataset, "RAINNC", run)
    np.testing.assert_allclose(cube.amount.reshape(2, 5, 6), MM[:2], atol=1e-5)
    with open_dataset(str(tmp_path / "wrfout*")) as dataset:
        cube = read_coarse(dataset, "RAINNC", run)
    np.testing.assert_allclose(cube.amount.reshape(4, 5, 6), MM, atol=1e-5)  # of float32 sums
    assert (cube.times.start, cube.times.step) == (datetime(2001, 3, 1), timedelta(hours=3))


def test_characters_that_are_no_date_are_refused(tmp_path):
    wrf(tmp_path / "wrfout", [0, 3], MM[:2], xtime=False, written="2001-03-32_{:02}:00:00")
    with pytest.raises(SourceError, match="Times holds '2001-03-32_00:00:00'; dates such as"):
        open_dataset(str(tmp_path / "wrfout"))


def test_forecasts_of_several_runs_make_no_series():
    """Sums since 00 h and 12 h, at lead times of 3, 6, 9 and 12 h, as cfgrib writes them."""
    run = np.datetime64("2001-01-01", "ns") + np.arange(2) * np.timedelta64(12, "h")
    lead = np.arange(1, 5) * np.timedelta64(3, "h")
    sums = np.stack([MM, 2 * MM]).cumsum(axis=1)
    data = xr.Dataset(
        {"tp": (("time", "step", "lat", "lon"), sums, {"units": "mm"})},
        {"time": run, "step": np.arange(3, 13, 3), "lat": LAT, "lon": LON,
         "valid_time": (("time", "step"), run[:, None] + lead)},
    )  # fmt: skip
    with pytest.raises(SourceError, match=r"several runs.*time \(2: 2001-01-01T00:00, 2001-01-01T12:00\)"):
        read_coarse(data, "tp", Declared(time_label="end"))
    with pytest.raises(SourceError, match="several runs"):  # 3 hours are no amount of 12
        read_coarse(data, "tp", Declared(time_label="end", select={"step": 3}))
    assert lines(data)[0] == "select: {time: 2001-01-01T00:00}"
    cube = read_coarse(data, "tp", Declared(accumulated="run", select={"time": "2001-01-01T12:00"}))
    np.testing.assert_allclose(cube.amount, 2 * MM[1:], atol=1e-5)
    assert cube.times.start == datetime(2001, 1, 1, 15)
    whole = Declared(time_label="end", step_h=12.0, select={"step": 12})
    np.testing.assert_allclose(read_coarse(data, "tp", whole).amount, sums[:, 3], rtol=1e-6)


def test_models_may_lie_behind_the_places_and_places_are_never_proposed_for_selection():
    time = np.datetime64("2001-01-01", "ns") + np.arange(4) * np.timedelta64(1, "D")
    data = xr.Dataset(
        {"pr": (("time", "lat", "lon", "model", "run"), np.stack([MM, 2 * MM], -1)[..., None, :], {"units": "mm"})},
        {"time": time, "lat": LAT, "lon": LON, "model": ["CNRM"]},
    )
    data = xr.concat([data, data.assign_coords(model=["ECHAM"])], "model")
    assert lines(data) == ["select: {model: CNRM, run: 0}", "time_label: end"]
    cube = read_coarse(data, "pr", Declared(time_label="end", select={"model": "CNRM", "run": 1}))
    np.testing.assert_allclose(cube.amount, 2 * MM, rtol=1e-6)


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ("mm/3h", r"with brackets, as 'mm \(3 h\)-1'"),
        ("mm/3hr", "with brackets, as 'mm"),
        ("kg m-2 / 6 hours", r"with brackets, as 'kg m-2 \(6 h\)-1'"),
        ("mm 3h-1", r"with brackets, as 'mm \(3 h\)-1'"),
        ("mm*10", "with the number in front, as '0.1 mm'"),
        ("mm/s*86400", "with the number in front"),
    ],
)
def test_units_that_are_read_in_two_ways_are_refused(units, message):
    data = xr.DataArray(MM, (("time", np.arange(4)), ("lat", LAT), ("lon", LON)), name="pr").to_dataset()
    data["time"] = np.datetime64("2001-01-01", "ns") + np.arange(4) * np.timedelta64(3, "h")
    data["pr"].attrs["units"] = units
    with pytest.raises(SourceError, match=message):
        read_coarse(data, "pr", Declared(time_label="end"))
    cube = read_coarse(data, "pr", Declared(time_label="end", units="mm (3 h)-1"))
    np.testing.assert_allclose(cube.amount, MM, rtol=1e-6)


def write_days(path, days, units="days since 1850-01-01", calendar="standard", extra=None):
    """MM as a flux over bounds that are fractions of days, an hour each."""
    with netCDF4.Dataset(path, "w") as file:
        for name, values in (("time", days), ("lat", LAT), ("lon", LON)):
            file.createDimension(name, len(values))
            file.createVariable(name, "f8", (name,))[:] = values
        file.createDimension("bnds", 2)
        file.createVariable("time_bnds", "f8", ("time", "bnds"))[:] = np.stack([days - 1 / 48, days + 1 / 48], axis=1)
        file["time"].setncatts({"units": units, "calendar": calendar, "bounds": "time_bnds"})
        file.createVariable("pr", "f4", ("time", "lat", "lon"))[:] = MM / 3600
        file["pr"].units = "kg m-2 s-1"
        if extra is not None:
            file.createVariable("extra", "f8", ())[...] = 1e30
            file["extra"].units = extra
    return str(path)


@pytest.mark.parametrize("calendar", ["standard", "proleptic_gregorian", "noleap", "360_day", "julian"])
def test_hours_as_fractions_of_days_are_even(tmp_path, calendar):
    """50000 + 1/24 has no exact float64: as many days since 1850, stamps are off by a microsecond."""
    with open_dataset(write_days(tmp_path / "a.nc", 50_000 + (np.arange(5, 9) + 0.5) / 24, calendar=calendar)) as data:
        cube = read_coarse(data, "pr")
    np.testing.assert_allclose(cube.amount, MM, rtol=1e-6)
    assert cube.times.step == timedelta(hours=1)
    assert (cube.times.start.hour, cube.times.start.minute, cube.times.start.microsecond) == (5, 0, 0)


@pytest.mark.parametrize("extra", ["hours since analysis", "days since 1850-01-01"])
def test_dates_that_nobody_can_read_do_no_harm_in_other_variables(tmp_path, extra):
    with open_dataset(write_days(tmp_path / "a.nc", 50_000 + (np.arange(4) + 0.5) / 24, extra=extra)) as data:
        np.testing.assert_allclose(read_coarse(data, "pr").amount, MM, rtol=1e-6)


@pytest.mark.parametrize(
    ("units", "calendar"), [("months since 1850-01-01", "standard"), ("days since 1850-01-01", "lunar")]
)
def test_times_that_nobody_can_read_are_refused_with_what_they_are(tmp_path, units, calendar):
    message = f"time axis holds float64 values in '{units}' of the calendar {calendar}, not dates"
    path = write_days(tmp_path / "a.nc", np.arange(4.0), units, calendar)
    with open_dataset(path) as data, pytest.raises(SourceError, match=message):
        read_coarse(data, "pr")


def zipped(content):
    """A file in a zip, as the CDS sends several."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("data_stream-oper_stepType-accum.nc", content)
    return packed.getvalue()


@pytest.mark.parametrize(
    ("pack", "message"),
    [
        (gzip.compress, "gzip as a whole.*`gunzip`"),
        (bz2.compress, "bzip2 as a whole.*`bunzip2`"),
        (lzma.compress, "xz as a whole.*`unxz`"),
        (zipped, "zip as a whole.*`unzip`"),
    ],
)
def test_a_file_that_is_compressed_as_a_whole_is_to_be_unpacked(tmp_path, pack, message):
    path = write_days(tmp_path / "a.nc", np.arange(4.0))
    (tmp_path / "packed").write_bytes(pack((tmp_path / "a.nc").read_bytes()))
    with open_dataset(path), pytest.raises(SourceError, match=f"compressed by {message}"):
        open_dataset(str(tmp_path / "packed"))


def write_step(path, hour):
    """One hour of a forecast of two members as the Met Office writes it: times, bounds and lead time are scalars."""
    with netCDF4.Dataset(path, "w") as file:
        for name, size in {"realization": 2, "latitude": 5, "longitude": 6, "bnds": 2}.items():
            file.createDimension(name, size)
        for name, values in (("realization", (0, 1)), ("latitude", LAT), ("longitude", LON)):
            file.createVariable(name, "f8", (name,))[:] = values
        for name, value in (("time", hour), ("forecast_reference_time", 0)):
            file.createVariable(name, "f8", ())[...] = value
            file[name].setncatts({"standard_name": name, "units": "hours since 2001-01-01"})
        file.createVariable("forecast_period", "f8", ())[...] = hour
        file["forecast_period"].setncatts({"standard_name": "forecast_period", "units": "hours"})
        file["time"].bounds = "time_bnds"
        file.createVariable("time_bnds", "f8", ("bnds",))[:] = hour - 1, hour
        file.createVariable("rain", "f4", ("realization", "latitude", "longitude"))[:] = MM[hour - 1], 2 * MM[hour - 1]
        file["rain"].setncatts({"units": "mm", "coordinates": "time forecast_reference_time forecast_period"})


def test_files_of_one_step_of_a_forecast_join_along_time(tmp_path):
    for hour in (1, 2, 3):
        write_step(tmp_path / f"{hour}.nc", hour)
    with open_dataset(str(tmp_path / "?.nc")) as dataset:
        one, other = find(dataset, "rain").read_all()
    np.testing.assert_array_equal(one.amount, MM[:3])
    np.testing.assert_array_equal(other.amount, 2 * MM[:3])
    assert (one.times.start, one.times.label) == (datetime(2001, 1, 1), "end")
