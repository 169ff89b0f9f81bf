"""Every kind of input from a real S3 server, and what it does when the server, the keys or the line fail."""

import http.server
import json
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import s3fs
import xarray as xr
from pyproj import CRS

from stsr_core.errors import ConfigurationError, SourceError
from stsr_core.evaluation.truth import read_truth
from stsr_core.factors import Factor
from stsr_core.settings import Settings
from stsr_core.sources.declared import Declared
from stsr_core.sources.open import fingerprint, open_dataset
from stsr_core.training.command import Data
from tests.grib_files import REGULAR, write_grib
from tests.reading import read_coarse

START = Declared(time_label="start", accumulated="none")
SOME_DAYS = ("2001-01-11", "2001-01-13")  # of the large files, their steps 10 and 11
VALUES = np.arange(6 * 3 * 4, dtype=np.float32).reshape(6, 3, 4) % 11


def asked(name):
    """Variable of a file, and what is declared of it; GRIB says all itself."""
    return ("tp", Declared()) if name.endswith("grib2") else ("pr", START)


def upward(cube):
    """Amounts from south to north."""
    return cube.amount[:, :: -1 if cube.grid.y.step < 0 else 1]


def days(first=0, count=6):
    time = np.datetime64("2001-01-01", "ns") + np.arange(first, first + count) * np.timedelta64(1, "D")
    coords = {"time": time, "lat": 45.0 + np.arange(3), "lon": 3.0 + np.arange(4)}
    data = xr.Dataset({"pr": (("time", "lat", "lon"), VALUES[first : first + count], {"units": "mm"})}, coords)
    data["time"].encoding.update(units="days since 2001-01-01", dtype="int32")
    return data


def message(step):
    """Metres from the start of the forecast to the end of a day."""
    return REGULAR, {
        "dataDate": 20010101, "dataTime": 0, "Ni": 4, "Nj": 3, "latitudeOfFirstGridPointInDegrees": 47.0,
        "latitudeOfLastGridPointInDegrees": 45.0, "longitudeOfFirstGridPointInDegrees": 3.0,
        "longitudeOfLastGridPointInDegrees": 6.0, "iDirectionIncrementInDegrees": 1.0,
        "jDirectionIncrementInDegrees": 1.0, "productDefinitionTemplateNumber": 8, "shortName": "tp",
        "startStep": 0, "endStep": 24 * (step + 1), "bitsPerValue": 24,
    }, VALUES[: step + 1].sum(axis=0, dtype=np.float64)[::-1] / 1000  # fmt: skip


@pytest.fixture(scope="module")
def bucket(s3, tmp_path_factory):
    """A bucket with one input of each kind."""
    folder = tmp_path_factory.mktemp("inputs")
    days().to_netcdf(folder / "hdf.nc", engine="h5netcdf")
    days().to_netcdf(folder / "classic.nc", format="NETCDF3_CLASSIC")
    days(0, 2).to_netcdf(folder / "part-a.nc")
    days(2, 4).to_netcdf(folder / "part-b.nc")
    days().to_zarr(folder / "v2.zarr", zarr_format=2, consolidated=True)
    days().to_zarr(folder / "v3.zarr", zarr_format=3, consolidated=False)
    write_grib(folder / "sums.grib2", *map(message, range(6)))
    url = s3.make_bucket("inputs")
    fs = s3fs.S3FileSystem(**s3.options, skip_instance_cache=True)
    fs.put(str(folder) + "/", url + "/", recursive=True)
    fs.pipe_file(f"{url}/refs.json", json.dumps(references(folder, url)).encode())
    return url


@pytest.fixture(scope="module")
def large(s3, tmp_path_factory):
    """Days on 400 x 500 cells in files of a record each day; their URL, and what they hold."""
    folder = tmp_path_factory.mktemp("large")
    rain = np.random.default_rng(4).gamma(0.2, 5.0, (40, 400, 500)).astype(np.float32)
    days = np.datetime64("2001-01-01", "ns") + np.arange(40) * np.timedelta64(1, "D")
    axes = {"time": days, "lat": 20 + 0.1 * np.arange(400), "lon": 0.1 * np.arange(500)}
    data = xr.Dataset({n: (("time", "lat", "lon"), rain, {"units": "mm"}) for n in ("pr", "other")}, axes)
    data.to_netcdf(folder / "classic.nc", format="NETCDF3_64BIT", unlimited_dims=["time"])
    data.to_netcdf(folder / "hdf.nc", encoding={n: {"chunksizes": (1, 400, 500)} for n in data.data_vars})
    by_day = {n: {"chunks": (1, 400, 500)} for n in data.data_vars}
    data.to_zarr(folder / "v3.zarr", zarr_format=3, consolidated=False, encoding=by_day)
    grid = {
        "Ni": 500, "Nj": 400, "latitudeOfFirstGridPointInDegrees": 59.9, "latitudeOfLastGridPointInDegrees": 20.0,
        "longitudeOfFirstGridPointInDegrees": 0.0, "longitudeOfLastGridPointInDegrees": 49.9,
        "iDirectionIncrementInDegrees": 0.1, "jDirectionIncrementInDegrees": 0.1, "dataDate": 20010101, "dataTime": 0,
        "productDefinitionTemplateNumber": 8, "shortName": "tp", "bitsPerValue": 24,
    }  # fmt: skip
    steps = [{**grid, "startStep": 24 * i, "endStep": 24 * (i + 1)} for i in range(40)]
    write_grib(folder / "days.grib2", *((REGULAR, s, r[::-1] / 1000) for s, r in zip(steps, rain, strict=True)))
    url = s3.make_bucket("large")
    s3fs.S3FileSystem(**s3.options, skip_instance_cache=True).put(str(folder) + "/", url + "/", recursive=True)
    return url, rain


def references(folder, url):
    """Kerchunk references of the chunks of the Zarr v2 store."""
    root = folder / "v2.zarr"
    refs = {}
    for file in sorted(p for p in root.rglob("*") if p.is_file() and p.name != ".zmetadata"):
        key = str(file.relative_to(root))
        chunk = f"{url}/v2.zarr/{key}", 0, file.stat().st_size
        refs[key] = file.read_text() if file.name.startswith(".z") else list(chunk)
    return {"version": 1, "refs": refs}


@pytest.mark.parametrize("name", ["hdf.nc", "classic.nc", "part-?.nc", "v2.zarr", "v3.zarr", "sums.grib2", "refs.json"])
def test_one_of_each_kind_reads_from_a_bucket(s3, bucket, name):
    with open_dataset(f"{bucket}/{name}", storage_options=s3.options) as dataset:
        cube = read_coarse(dataset, *asked(name))
    np.testing.assert_allclose(upward(cube), VALUES, atol=1e-4)
    assert str(cube.times.bounds[0, 0])[:10] == "2001-01-01"
    first = fingerprint(f"{bucket}/{name}", storage_options=s3.options)
    assert first == fingerprint(f"{bucket}/{name}", storage_options=s3.options)


@pytest.mark.parametrize("name", ["classic.nc", "hdf.nc", "v3.zarr", "days.grib2"])
def test_of_a_large_file_two_days_are_fetched(s3, large, name):
    url, rain = large
    variable, declared = asked(name)
    with unreliable(s3) as options, open_dataset(f"{url}/{name}", storage_options=options) as dataset:
        cube = read_coarse(dataset, variable, replace(declared, period=SOME_DAYS))
        sent = Faults.sent
    np.testing.assert_allclose(upward(cube), rain[10:12], atol=1e-4)
    assert sent < 0.15 * rain.nbytes  # two of 40 days (0.05), what describes them, and what is read ahead


def test_a_fingerprint_of_a_bucket_follows_its_objects(s3, bucket):
    fs = s3fs.S3FileSystem(**s3.options, skip_instance_cache=True)
    fs.pipe_file(f"{bucket}/new.bin", b"one")
    before = fingerprint(f"{bucket}/new.bin", storage_options=s3.options)
    fs.pipe_file(f"{bucket}/new.bin", b"two")
    assert fingerprint(f"{bucket}/new.bin", storage_options=s3.options) != before


def test_wrong_keys_and_missing_places_are_said_without_the_keys(s3, bucket):
    wrong = {**s3.options, "secret": "not-the-secret-of-anyone"}
    for options in (wrong, {**s3.options, "key": "NOBODY"}):
        for action in (open_dataset, fingerprint):
            with pytest.raises(SourceError, match="cannot be read.*credentials") as caught:
                action(f"{bucket}/hdf.nc", storage_options=options)
            assert caught.value.__suppress_context__
            for secret in ("not-the-secret-of-anyone", s3.key, s3.secret, "NOBODY"):
                assert secret not in str(caught.value)
    with pytest.raises(SourceError, match=r"Nothing is at s3://no-such-bucket/a\.nc"):
        open_dataset("s3://no-such-bucket/a.nc", storage_options=s3.options)
    with pytest.raises(SourceError, match="cannot be read"):
        fingerprint("s3://no-such-bucket/a.nc", storage_options=s3.options)


def test_a_profile_of_the_users_own_is_as_good_as_keys(s3, bucket, tmp_path, monkeypatch):
    credentials = tmp_path / "credentials"
    credentials.write_text(f"[nightly]\naws_access_key_id = {s3.key}\naws_secret_access_key = {s3.secret}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    monkeypatch.setenv("STSR_SOURCE_S3_ENDPOINT", s3.endpoint)
    monkeypatch.setenv("STSR_SOURCE_S3_PROFILE", "nightly")
    options = {**Settings().source_options(bucket), "skip_instance_cache": True}
    with open_dataset(f"{bucket}/hdf.nc", storage_options=options) as dataset:
        np.testing.assert_array_equal(read_coarse(dataset, "pr", START).amount, VALUES)
    with pytest.raises(SourceError, match="cannot be read"):
        open_dataset(f"{bucket}/hdf.nc", storage_options={**options, "profile": "nobody"})


def test_archives_and_static_fields_are_read_with_the_settings_too(s3, bucket, tmp_path, monkeypatch):
    hours = np.datetime64("2018-05-01T01", "ns") + np.arange(30) * np.timedelta64(1, "h")
    axes = {n: (n, 1000.0 * np.arange(40), {"units": "m", "standard_name": f"projection_{n}_coordinate"}) for n in "yx"}
    rain = np.random.default_rng(0).gamma(0.5, 2.0, (30, 40, 40)).round(2)
    data = xr.Dataset({"precipitation": (("time", "y", "x"), rain, {"units": "mm"})}, {"time": hours, **axes})
    data["orography"] = (("y", "x"), rain[0], {"units": "m"})
    data["crs"] = ((), 0, {"crs_wkt": CRS.from_epsg(2154).to_wkt()})
    for name in ("precipitation", "orography"):
        data[name].attrs["grid_mapping"] = "crs"
    data.to_netcdf(tmp_path / "radar.nc", engine="h5netcdf")
    url = f"{bucket}/archive/radar.nc"
    s3fs.S3FileSystem(**s3.options, skip_instance_cache=True).put_file(str(tmp_path / "radar.nc"), url)
    for name, value in (("ENDPOINT", s3.endpoint), ("ACCESS_KEY_ID", s3.key), ("SECRET_ACCESS_KEY", s3.secret)):
        monkeypatch.setenv(f"STSR_S3_{name}", value)
    found = Data.of(None, [f"{bucket}/archive/*.nc"], [url], tmp_path, [f"orography={url}"], Settings().source_options)
    with pytest.raises(ConfigurationError, match="radar.nc is in the data to fit on and in those to validate on"):
        found.require_apart()
    (region,) = found.regions(found.train, tmp_path / "kept")
    np.testing.assert_array_equal(region.quanta, (rain * 100).round())
    np.testing.assert_allclose(region.statics[0], rain[0], rtol=1e-6)
    truth = read_truth(
        [url], Factor(space=4, time=1), hours=6, cells=32, variable="precipitation", options_of=found.options_of
    )
    assert truth.fine.shape == (1, 6, 32, 32)


class Faults(http.server.BaseHTTPRequestHandler):
    """Passes requests on to the real server, counts what it sends; `plan` says what goes wrong with objects first."""

    plan: list[str] = []  # noqa: RUF012
    behind = ""
    served = sent = 0

    def _pass_on(self):
        fault = Faults.plan.pop(0) if Faults.plan and self.path.endswith((".nc", ".grib2")) else ""
        Faults.served += 1
        if fault == "503":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        request = urllib.request.Request(Faults.behind + self.path, headers=dict(self.headers), method=self.command)
        try:
            with urllib.request.urlopen(request) as answer:
                status, headers, body = answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as e:
            status, headers, body = e.code, e.headers, e.read()
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        Faults.sent += len(body)
        if fault == "cut":
            self.close_connection = True

    do_GET = _pass_on  # noqa: N815
    do_HEAD = _pass_on  # noqa: N815

    def log_message(self, *arguments):
        """Say nothing."""


@contextmanager
def unreliable(s3, *plan):
    """The same server through a line that fails as planned."""
    Faults.plan, Faults.behind, Faults.served, Faults.sent = list(plan), s3.endpoint, 0, 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Faults)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield {**s3.options, "endpoint_url": f"http://127.0.0.1:{server.server_port}", "skip_instance_cache": True}
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class WholeFiles(http.server.SimpleHTTPRequestHandler):
    """A web server as it comes with Python: it sends files from their beginning to their end."""

    def log_message(self, *arguments):
        """Say nothing."""


@pytest.mark.parametrize("name", ["hdf.nc", "classic.nc", "sums.grib2"])
def test_a_web_server_that_sends_whole_files_only_serves_too(bucket, s3, tmp_path, name):
    s3fs.S3FileSystem(**s3.options, skip_instance_cache=True).get_file(f"{bucket}/{name}", str(tmp_path / name))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(WholeFiles, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with open_dataset(f"http://127.0.0.1:{server.server_port}/{name}") as dataset:
            cube = read_coarse(dataset, *asked(name))
    finally:
        server.shutdown()
        server.server_close()
    np.testing.assert_allclose(upward(cube), VALUES, atol=1e-4)


@pytest.mark.parametrize("plan", [("503", "503"), ("", "cut"), ("", "", "cut", "503")], ids=str)
def test_a_server_that_fails_for_a_moment_is_asked_again(s3, bucket, plan):
    with unreliable(s3, *plan) as options, open_dataset(f"{bucket}/hdf.nc", storage_options=options) as dataset:
        np.testing.assert_array_equal(read_coarse(dataset, "pr", START).amount, VALUES)
        assert Faults.plan == []


@pytest.mark.parametrize("name", ["classic.nc", "days.grib2"])
def test_so_it_is_when_parts_of_a_large_file_are_read(s3, large, name):
    url, rain = large
    variable, declared = asked(name)
    with unreliable(s3) as options, open_dataset(f"{url}/{name}", storage_options=options) as dataset:
        Faults.plan = ["cut", "503", "", "cut"]
        cube = read_coarse(dataset, variable, replace(declared, period=SOME_DAYS))
        assert Faults.plan == []
    np.testing.assert_allclose(upward(cube), rain[10:12], atol=1e-4)


def test_a_server_that_keeps_failing_is_a_clear_error(s3, bucket):
    with (
        unreliable(s3, *["503"] * 1000) as options,
        pytest.raises(SourceError, match=r"hdf.nc cannot be read \(.*the server answers"),
    ):
        open_dataset(f"{bucket}/hdf.nc", storage_options=options)
