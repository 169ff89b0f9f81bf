"""NetCDF3 on servers: what is read part by part is what the netCDF library reads, and no more than is needed."""

import tempfile
from pathlib import Path

import netCDF4
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from stsr_core.errors import SourceError
from stsr_core.sources.netcdf3 import HEADER_BYTES, open_netcdf3
from stsr_core.sources.ranges import NEAR_BYTES
from tests.counted import Counted

FORMATS = ("NETCDF3_CLASSIC", "NETCDF3_64BIT_OFFSET", "NETCDF3_64BIT_DATA")
KINDS = ("i1", "S1", "i2", "i4", "f4", "f8")
WIDE = ("u1", "u2", "u4", "i8", "u8")  # of CDF-5 alone
SIZES = {"time": None, "y": 3, "x": 5, "one": 1}


def values(rng, kind, shape):
    if kind == "S1":
        return rng.choice(np.array([b"a", b"b", b"c"]), shape)
    return (100 * rng.random(shape)).astype(kind)


@st.composite
def written(draw):
    """A file of any version with variables of any kind and shape, and its records."""
    form = draw(st.sampled_from(FORMATS))
    records = draw(st.integers(0, 4))
    kinds = st.sampled_from(KINDS + (WIDE if form == FORMATS[-1] else ()))
    shapes = st.sampled_from([(), ("y",), ("x",), ("y", "x"), ("time",), ("time", "y", "x"), ("time", "x", "one")])
    variables = draw(st.lists(st.tuples(kinds, shapes, st.booleans()), max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.nc"
        with netCDF4.Dataset(path, "w", format=form) as file:
            file.setncatts({"title": "é of any length"[: 1 + records], "numbers": np.arange(3, dtype="i2"), "none": ""})
            for name, size in SIZES.items():
                file.createDimension(name, size)
            for number, (kind, dims, described) in enumerate(variables):
                variable = file.createVariable(f"v{number}", kind, dims)
                if described:
                    variable.setncatts({"units": "mm", "scale": np.float32(0.5), "range": np.array([0.0, 9.0])})
                variable[...] = values(rng, kind, [SIZES[d] or records for d in dims])
        return path.read_bytes()


def parts(draw, size):
    """An index of one axis: a number, a slice in either direction, or any numbers."""
    stretches = st.tuples(st.integers(0, size), st.integers(0, size), st.integers(1, 2))
    ways = [stretches.map(lambda s: slice(*s))]
    if size:
        numbers = st.integers(0, size - 1)
        ways += [
            numbers,
            st.just(slice(None, None, -1)),
            st.lists(numbers, max_size=4).map(lambda n: np.array(n, dtype=int)),
        ]
    return draw(st.one_of(ways))


@settings(max_examples=150, deadline=None)
@given(written(), st.data())
def test_what_is_read_part_by_part_is_what_the_library_reads(content, data):
    found = open_netcdf3(Counted(content).file)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.nc"
        path.write_bytes(content)
        with xr.open_dataset(path, engine="netcdf4", decode_cf=False) as wanted:
            wanted.load()
    assert list(found.variables) == list(wanted.variables)
    np.testing.assert_equal(found.attrs, wanted.attrs)
    for name, variable in wanted.variables.items():
        assert found[name].dtype == variable.dtype
        np.testing.assert_equal(found[name].attrs, variable.attrs)
        some = {d: parts(data.draw, n) for d, n in variable.sizes.items()}
        xr.testing.assert_identical(found[name].variable.isel(some).load(), variable.isel(some))


@settings(max_examples=150, deadline=None)
@given(written(), st.data())
def test_of_a_damaged_file_comes_an_error_or_what_the_header_says(content, data):
    at = data.draw(st.integers(0, len(content) - 1))
    cut = content[: max(4, at)]
    damaged = bytearray(content)
    damaged[max(4, at) : at + 4] = data.draw(st.binary(min_size=4, max_size=4))
    for broken in (cut, bytes(damaged[: len(content)])):
        try:
            open_netcdf3(Counted(broken).file).load()
        except SourceError as e:
            assert "Fetch it again" in str(e)


@pytest.fixture(scope="module")
def year():
    """A year of days, record by record, on 200 x 200 cells, with temperatures in between; and how it was written."""
    rng = np.random.default_rng(1)
    days = np.datetime64("2001-01-01", "ns") + np.arange(365) * np.timedelta64(1, "D")
    data = xr.Dataset(
        {n: (("time", "lat", "lon"), rng.random((365, 200, 200), np.float32)) for n in ("pr", "tas")},
        {"time": days, "lat": np.linspace(40, 60, 200), "lon": np.linspace(0, 20, 200)},
    )
    with tempfile.TemporaryDirectory() as folder:
        data.to_netcdf(f"{folder}/year.nc", format="NETCDF3_64BIT", unlimited_dims=["time"])
        return data, Path(f"{folder}/year.nc").read_bytes()


def test_a_month_and_a_box_take_what_they_hold(year):
    data, content = year
    server = Counted(content)
    found = open_netcdf3(server.file)
    axes = server.bytes
    assert axes < HEADER_BYTES + 365 * (8 + NEAR_BYTES)
    box = {"time": slice(31, 59), "lat": slice(50, 100)}
    np.testing.assert_array_equal(found["pr"].isel(box), data["pr"].isel(box))
    assert server.bytes - axes == 28 * 50 * 200 * 4
    assert server.requests < 1 + 365 + 2 + 28 + 1


def test_a_long_header_is_read_to_its_end():
    with tempfile.TemporaryDirectory() as folder:
        xr.Dataset({"a": ("x", np.arange(3.0))}, attrs={"history": "h" * (3 * HEADER_BYTES)}).to_netcdf(
            f"{folder}/a.nc", format="NETCDF3_CLASSIC"
        )
        content = Path(f"{folder}/a.nc").read_bytes()
    found = open_netcdf3(Counted(content).file)
    np.testing.assert_array_equal(found["a"], np.arange(3.0))
    assert len(found.attrs["history"]) == 3 * HEADER_BYTES


def test_records_that_nobody_counted_are_counted(year):
    _, content = year
    streamed = content[:4] + b"\xff\xff\xff\xff" + content[8:]
    assert open_netcdf3(Counted(streamed).file).sizes["time"] == 365


def test_a_server_that_sends_less_is_an_error(year):
    server = Counted(year[1])
    found = open_netcdf3(server.file)
    server.replace(year[1][:1000])
    with pytest.raises(SourceError, match=r"gave 0 of \d+ bytes"):
        found["pr"][100].load()
