import tarfile

import numpy as np
import pytest
import rasterio
import xarray as xr
from pyproj import CRS
from rasterio.transform import from_origin

from stsr_core.errors import SourceError
from stsr_core.sources import remote
from stsr_core.sources.declared import Declared
from stsr_core.sources.fine import fine_runs, places_of
from stsr_core.sources.open import open_dataset

TENTHS = Declared(units="0.1 mm", missing_values=(65535.0,))


@pytest.fixture(scope="module")
def hours(tmp_path_factory):
    """Five hourly GeoTIFFs as weather services publish them, one hour missing between the third and the fourth."""
    folder = tmp_path_factory.mktemp("geotiff")
    profile = {
        "driver": "GTiff", "width": 6, "height": 4, "count": 1, "dtype": "uint16", "crs": "EPSG:2154",
        "transform": from_origin(600_000, 6_800_000, 1000, 1000),
    }  # fmt: skip
    for number, hour in enumerate((1, 2, 3, 5, 6)):
        values = np.full((4, 6), 10 * number, np.uint16)
        values[0, 0] = 65535
        for variable in ("RR", "ERR"):
            with rasterio.open(folder / f"20180501{hour:02d}_{variable}.gtif", "w", **profile) as file:
                file.write(values if variable == "RR" else values // 2, 1)
    return folder


def test_geotiffs_in_a_tar_are_read_without_unpacking_and_split_at_gaps(hours, tmp_path):
    path = tmp_path / "H_COMEPHORE_201805.tar"
    with tarfile.open(path, "w") as tar:
        for file in sorted(hours.iterdir()):
            tar.add(file, arcname=f"201805/{file.name}")
    runs = fine_runs(str(path), "RR", TENTHS)
    assert [run.steps for run in runs] == [3, 2]
    amount = runs[1].read()
    assert amount.shape == (2, 4, 6)
    assert np.isnan(amount[:, 0, 0]).all()
    np.testing.assert_allclose(amount[:, 1, 1], [3.0, 4.0])  # tenths of a millimetre
    np.testing.assert_allclose(runs[0].read(1, 2)[0, 3, 5], 1.0)


def test_a_glob_of_geotiffs_is_one_series(hours):
    url = f"{hours}/*_RR.gtif"
    assert places_of([url]) == [url]
    data = open_dataset(url)
    assert dict(data.sizes) == {"time": 5, "y": 4, "x": 6}
    assert str(data["time"].values[3]) == "2018-05-01T05:00:00.000000000"
    assert data["y"].values[0] == 6_799_500


PROFILE = {
    "driver": "GTiff", "width": 6, "height": 4, "count": 1, "dtype": "int16", "crs": "EPSG:2154",
    "transform": from_origin(600_000, 6_800_000, 1000, 1000), "nodata": -1,
}  # fmt: skip


def hourly(folder, scale=1.0, offset=0.0, units="mm", **later):
    """Two hours on 4 x 6 cells, the second with another profile; the glob of both."""
    for hour, profile in ((1, PROFILE), (2, PROFILE | later)):
        with rasterio.open(folder / f"201805010{hour}_RR.tif", "w", **profile) as file:
            values = np.arange(-1, profile["width"] * profile["height"] - 1).reshape(profile["height"], -1)
            file.write(np.stack([values] * profile["count"]).astype(profile["dtype"]))
            file.scales, file.offsets = (scale,) * profile["count"], (offset,) * profile["count"]
            file.units = (units if hour == 2 else "mm",) * profile["count"]
    return f"{folder}/*_RR.tif"


def test_values_are_scaled_as_the_bands_of_each_file_say(tmp_path):
    amount = open_dataset(hourly(tmp_path, scale=0.1, offset=0.5))["RR"].values
    assert amount.dtype == np.float32
    assert np.isnan(amount[:, 0, 0]).all()
    np.testing.assert_allclose(amount[:, 0, 1:4], [[0.5, 0.6, 0.7]] * 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("later", "message"),
    [
        ({"width": 5}, r"02_RR\.tif has cells \(4, 5\); the first file has cells \(4, 6\)"),
        (
            {"transform": from_origin(600_500, 6_800_000, 1000, 1000)},
            r"corner \(600500.*first file has corner \(600000",
        ),
        ({"transform": from_origin(600_000, 6_800_000, 1000, 1001)}, r"step \(1000\.0, -1001\.0\); the first file"),
        ({"crs": "EPSG:3035"}, r"has wkt 'PROJCS\[.*the first file has wkt"),
        ({"units": "0.1 mm"}, "has units '0.1 mm'; the first file has units 'mm'"),
        ({"count": 2}, "has 2 bands. One is needed"),
    ],
)
def test_a_file_that_differs_from_the_first_of_its_series_is_refused(tmp_path, later, message):
    data = open_dataset(hourly(tmp_path, **later))
    assert not np.isnan(data["RR"][0, 1]).any()
    with pytest.raises(SourceError, match=message):
        data["RR"][1].load()


@pytest.mark.parametrize(("crs", "size"), [("EPSG:2263", 3280.0), ("EPSG:4326", 0.01)])
def test_axes_of_geotiffs_are_in_feet_and_degrees_where_their_crs_is(tmp_path, monkeypatch, crs, size):
    monkeypatch.setitem(PROFILE, "crs", crs)
    monkeypatch.setitem(PROFILE, "transform", from_origin(30, 50, size, size))
    grid = fine_runs(hourly(tmp_path), "RR")[0].grid
    assert (grid.x.step, grid.y.step) == (pytest.approx(size), pytest.approx(-size))
    assert CRS.from_wkt(grid.crs_wkt) == CRS.from_user_input(crs)


def test_units_are_never_guessed(hours):
    with pytest.raises(SourceError, match="no units"):
        fine_runs(f"{hours}/*_RR.gtif", "RR")[0].read()


def test_servers_that_do_not_answer_are_errors_that_tell_no_password(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    for url in ("http://ann:pw@127.0.0.1:9/*.nc", "http://ann:pw@127.0.0.1:9/archive"):
        with pytest.raises(SourceError, match="http://127.0.0.1:9/.* cannot be read"):
            places_of([url])


@pytest.mark.parametrize(("variable", "change"), [("snow", {}), ("rain", {"accumulated": "run"}), ("orog", {})])
def test_messages_hold_no_password(archive, site, variable, change):
    folder, address = site
    with xr.open_dataset(archive()) as data:
        data.assign(orog=data["y"]).to_netcdf(folder / "a.nc")
    url = address.replace("://", "://ann:pw@") + "/a.nc"
    with pytest.raises(SourceError) as refused:
        fine_runs(url, variable, Declared(**change))
    assert f"{address}/a.nc" in str(refused.value)
    assert "pw" not in str(refused.value)


def test_bad_names_and_files_are_errors(hours, tmp_path):
    bad = tmp_path / "rain.tif"
    bad.write_bytes((hours / "2018050101_RR.gtif").read_bytes())
    with pytest.raises(SourceError, match=r"rain\.tif names no time"):
        open_dataset(str(bad))
    short = tmp_path / "2018050101_RR.tif"
    short.write_bytes((hours / "2018050101_RR.gtif").read_bytes()[:60])
    with pytest.raises(SourceError, match="cannot be read"):
        open_dataset(str(short))
    empty = tmp_path / "empty.tar"
    with tarfile.open(empty, "w"):
        pass
    with pytest.raises(SourceError, match="holds no GeoTIFF"):
        open_dataset(str(empty))
    with pytest.raises(SourceError, match=r"No variable 'rain' in .*_RR.gtif; it has RR, crs"):
        fine_runs(f"{hours}/*_RR.gtif", "rain")
    with pytest.raises(SourceError, match="Nothing is at"):
        places_of([str(tmp_path / "nothing" / "*.nc")])


@pytest.fixture
def archive(tmp_path):
    """96 hours from 01 h on, whose amounts are their numbers; the stamps are changed as asked for."""

    def write(change=lambda stamps: stamps):
        stamps = change(np.datetime64("2018-05-01T01", "ns") + np.arange(96) * np.timedelta64(1, "h"))
        values = np.broadcast_to(np.arange(len(stamps), dtype=np.float32)[:, None, None], (len(stamps), 3, 4))
        axes = {"y": 47.0 - np.arange(3), "x": 3.0 + np.arange(4)}
        data = xr.Dataset({"rain": (("time", "y", "x"), values, {"units": "mm"})}, {"time": stamps, **axes})
        data["y"].attrs["units"], data["x"].attrs["units"] = "degrees_north", "degrees_east"
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.nc"
        data.to_netcdf(path)
        return str(path)

    return write


def test_a_period_leaves_its_steps_however_they_are_read(archive):
    (run,) = fine_runs(archive(), "rain", Declared(period=("2018-05-02", "2018-05-04T12:00")))
    assert run.steps == 60
    np.testing.assert_array_equal(run.read()[:, 0, 0], np.arange(24, 84))
    np.testing.assert_array_equal(run.read(48, 96)[:, 0, 0], np.arange(72, 84))
    with pytest.raises(SourceError, match="No step lies between 2017-01-01 and 2017-02-01"):
        fine_runs(archive(), "rain", Declared(period=("2017-01-01", "2017-02-01")))


def test_an_odd_stamp_splits_an_archive_where_it_is(archive):
    late = archive(lambda stamps: np.concatenate((stamps[:50], stamps[50:] + np.timedelta64(30, "m"))))
    assert [run.steps for run in fine_runs(late, "rain")] == [50, 46]
    odd = archive(lambda stamps: np.sort(np.append(stamps, stamps[10] + np.timedelta64(30, "m"))))
    assert max(run.steps for run in fine_runs(odd, "rain")) > 80


@pytest.mark.parametrize("change", [lambda stamps: stamps[::-1], lambda stamps: np.append(stamps, stamps[-1])])
def test_stamps_of_an_archive_that_do_not_increase_are_refused(archive, change):
    with pytest.raises(SourceError, match="not sorted.*Sort it, drop duplicates"):
        fine_runs(archive(change), "rain")


def test_running_sums_are_no_archive(archive):
    with pytest.raises(SourceError, match="Sums since the start of the day.*archives hold amounts per step"):
        fine_runs(archive(), "rain", Declared(accumulated="day"))


@pytest.mark.parametrize("stamp", ["20180501010000", "201805010100", "2018050101"])
def test_names_of_geotiffs_give_their_times_to_the_second(hours, tmp_path, stamp):
    path = tmp_path / f"{stamp}_RR.tif"
    path.write_bytes((hours / "2018050101_RR.gtif").read_bytes())
    assert str(open_dataset(str(path))["time"].values[0]) == "2018-05-01T01:00:00.000000000"


def test_more_digits_than_a_stamp_has_name_no_time(hours, tmp_path):
    path = tmp_path / "7201805010100.tif"
    path.write_bytes((hours / "2018050101_RR.gtif").read_bytes())
    with pytest.raises(SourceError, match="names no time"):
        open_dataset(str(path))


def test_blocks_and_the_grid_of_a_run_may_lack_all_values(archive, tmp_path):
    data = xr.load_dataset(archive())

    def without(steps):
        path = tmp_path / f"without-{steps.start}-{steps.stop}.nc"
        data.where(~data["time"].isin(data["time"][steps])).to_netcdf(path)
        (run,) = fine_runs(str(path), "rain")
        return run

    for steps in (slice(0, 1), slice(48, 96)):
        run = without(steps)
        assert run.grid == fine_runs(archive(), "rain")[0].grid
        read = np.concatenate([amount for _, amount in run.blocks()])
        assert np.isnan(read[steps]).all()
        assert np.isnan(read).sum() == read[steps].size
    with pytest.raises(SourceError, match="All values of without-0-96 from 2018-05-01 01:00:00 to .* are missing"):
        list(without(slice(0, 96)).blocks())
