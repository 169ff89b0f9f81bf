"""GRIB on servers: the heads of messages say what a disk would, and only messages that are needed are read."""

from contextlib import suppress
from pathlib import Path

import eccodes
import fsspec
import numpy as np
import pytest
import xarray as xr

from stsr_core.errors import SourceError
from stsr_core.sources.grib import open_grib
from stsr_core.sources.messages import HEAD_BYTES, OnDisk, OnServer
from stsr_core.sources.open import open_dataset
from stsr_core.sources.ranges import WholeFileNeeded
from tests.counted import Counted
from tests.grib_files import REGULAR, write_grib

ODDITIES = Path(__file__).parents[3] / "shared/data/oddities"
KINDS = (
    ("regular_ll_sfc_grib1", {}),
    ("regular_ll_sfc_grib1", {"packingType": "grid_second_order"}),
    (REGULAR, {}),
    (REGULAR, {"packingType": "grid_ccsds"}),
    (REGULAR, {"bitmapPresent": 0}),
    ("reduced_gg_pl_32_grib1", {}),
    ("reduced_gg_pl_320_grib2", {}),
    ("polar_stereographic_sfc_grib2", {"jScansPositively": 1}),
)


def messages(sample, steps, **settings):
    """Amounts of steps that follow each other, some of them missing."""
    size = settings["Ni"] * settings["Nj"] if "Ni" in settings else size_of(sample)
    rng = np.random.default_rng(5)
    for step in range(steps):
        values = rng.gamma(0.5, 4.0, size)
        values[rng.random(size) < 0.1 * settings.get("bitmapPresent", 1)] = 9999.0
        keys = {
            "dataDate": 20010101, "dataTime": 0, "shortName": "tp", "stepType": "accum", "startStep": step,
            "endStep": step + 1, "bitmapPresent": 1, "missingValue": 9999.0, "bitsPerValue": 16, **settings,
        }  # fmt: skip
        if "grib2" in sample:
            keys = {"productDefinitionTemplateNumber": 8, **keys}
        yield sample, keys, values


def size_of(sample):
    handle = eccodes.codes_grib_new_from_samples(sample)
    size = eccodes.codes_get_size(handle, "values")
    eccodes.codes_release(handle)
    return size


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    """24 steps on 500 x 400 cells: half a megabyte each."""
    path = tmp_path_factory.mktemp("grib") / "day.grib2"
    grid = {
        "Ni": 500, "Nj": 400, "latitudeOfFirstGridPointInDegrees": 60.0, "latitudeOfLastGridPointInDegrees": 20.1,
        "longitudeOfFirstGridPointInDegrees": 0.0, "longitudeOfLastGridPointInDegrees": 49.9,
        "iDirectionIncrementInDegrees": 0.1, "jDirectionIncrementInDegrees": 0.1,
    }  # fmt: skip
    write_grib(path, *messages(REGULAR, 24, **grid))
    return path


@pytest.mark.parametrize(("sample", "settings"), KINDS)
def test_a_server_is_read_like_a_disk(tmp_path, sample, settings):
    write_grib(tmp_path / "any.grib", *messages(sample, 3, **settings))
    assert_same(tmp_path / "any.grib")


@pytest.mark.skipif(not ODDITIES.is_dir(), reason="needs files of producers beside the checkout")
@pytest.mark.parametrize("name", ["arpege_PRECIP_SE.grib", "MRMS_GaugeCorr_QPE_01H_00.00_20160922-040000.grib2"])
def test_a_server_is_read_like_a_disk_in_files_of_producers(name):
    assert_same(ODDITIES / name)


def assert_same(path):
    found = open_grib(OnServer(Counted(path.read_bytes()).file, least=0))
    xr.testing.assert_identical(found.load(), open_grib(OnDisk(str(path))).load())


def test_only_heads_and_the_messages_of_a_period_are_read(day):
    server = Counted(day.read_bytes())
    found = open_grib(OnServer(server.file))
    length = server.file.size / 24
    assert server.bytes < 24 * (HEAD_BYTES + 16) + length  # and a message for its coordinates
    heads = server.bytes
    some = found["tp"].isel(time=slice(5, 8))
    xr.testing.assert_identical(some.load(), open_grib(OnDisk(str(day)))["tp"].isel(time=slice(5, 8)).load())
    assert server.bytes - heads == pytest.approx(3 * length, rel=0.01)


def test_short_messages_and_odd_files_are_read_whole(tmp_path, day):
    short = tmp_path / "short.grib"
    write_grib(short, *messages(REGULAR, 3))
    with pytest.raises(WholeFileNeeded):
        open_grib(OnServer(Counted(short.read_bytes()).file))
    content = day.read_bytes()
    for odd in (content[:-1], content + b"\0" * 3, b"TTAAii" + content, content + content[:100], b"GRIB"):
        with pytest.raises(WholeFileNeeded):
            open_grib(OnServer(Counted(odd).file))
    fsspec.filesystem("memory").pipe_file("/padded.grib", content + b"\0" * 3)
    with open_dataset("memory://padded.grib") as found:
        xr.testing.assert_identical(found.load(), open_grib(OnDisk(str(day))).load())


def test_damaged_heads_are_read_whole_where_they_lead_astray(day):
    content = day.read_bytes()
    rng = np.random.default_rng(2)
    for _ in range(200):
        at = int(rng.integers(4, 400))
        damaged = bytearray(content)
        damaged[at] ^= int(rng.integers(1, 256))
        with suppress(WholeFileNeeded, eccodes.CodesInternalError):
            list(OnServer(Counted(bytes(damaged)).file, least=0).headers())


def test_a_file_that_is_replaced_meanwhile_is_an_error(day):
    server = Counted(day.read_bytes())
    found = open_grib(OnServer(server.file))
    server.replace(b"\0" * server.file.size)
    with pytest.raises(SourceError, match="no GRIB message at byte"):
        found["tp"].isel(time=2).load()
