import json
import os
from dataclasses import replace
from datetime import timedelta

import fsspec
import h5py
import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr
from fsspec.implementations.local import LocalFileSystem
from pyproj import CRS

from stsr_core.errors import SourceError
from stsr_core.sources.box import Box
from stsr_core.sources.declared import Declared
from stsr_core.sources.harmonise import find
from stsr_core.sources.open import fingerprint, open_dataset
from tests.reading import read_coarse

SAMPLE = "package:samples/arpege_fc1h_20180501_SE.nc"


@pytest.fixture
def data():
    return xr.Dataset({"p": (("time", "y", "x"), np.ones((2, 3, 4)))})


def test_netcdf_and_zarr_open_by_path(tmp_path, data):
    data.to_netcdf(tmp_path / "a.nc")
    data.to_zarr(tmp_path / "a.zarr", zarr_format=3, consolidated=False)
    data.to_zarr(tmp_path / "b.zarr", zarr_format=2)
    for name in ("a.nc", "a.zarr", "b.zarr"):
        with open_dataset(name, base=tmp_path) as opened:
            np.testing.assert_array_equal(opened["p"].values, data["p"].values)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_zarr_group_of_groups_names_them(tmp_path, zarr_format):
    data = days(0, 2)
    for group in ("surface", "levels"):
        data.to_zarr(tmp_path / "a.zarr", group=group, zarr_format=zarr_format, consolidated=False)
    with pytest.raises(SourceError, match=r"no variables but in groups \(levels, surface\). Name that of the precip"):
        open_dataset(str(tmp_path / "a.zarr"))
    with open_dataset(str(tmp_path / "a.zarr" / "surface")) as opened:
        np.testing.assert_array_equal(opened["pr"].values, data["pr"].values)


def test_memory_urls_open_like_any_other_filesystem(tmp_path, data):
    data.to_netcdf(tmp_path / "a.nc")
    with fsspec.open("memory://bucket/a.nc", "wb") as f:
        f.write((tmp_path / "a.nc").read_bytes())
    with open_dataset("memory://bucket/a.nc") as opened:
        np.testing.assert_array_equal(opened["p"].values, data["p"].values)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", r"is empty \(0 bytes\)"), (b"not a netcdf file at all", "cannot be read"), (None, "Nothing is at")],
)
def test_what_is_no_dataset_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.nc").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        open_dataset(str(tmp_path / "a.nc"))


@pytest.mark.parametrize("unlimited", [(), ("time",)])
@pytest.mark.parametrize("url", ["a.nc", "?.nc"])
def test_a_netcdf3_file_that_lost_its_end_is_refused_not_read_as_zeros(tmp_path, data, unlimited, url):
    data.to_netcdf(tmp_path / "a.nc", format="NETCDF3_CLASSIC", unlimited_dims=unlimited)
    with open_dataset(url, base=tmp_path) as opened:
        np.testing.assert_array_equal(opened["p"].values, data["p"].values)
    whole = (tmp_path / "a.nc").read_bytes()
    (tmp_path / "a.nc").write_bytes(whole[:-1])
    with pytest.raises(SourceError, match=rf"has {len(whole) - 1} bytes, but 'p' .* its end at byte {len(whole)}"):
        open_dataset(url, base=tmp_path)


def test_a_plain_folder_and_an_unknown_scheme_are_refused(tmp_path):
    with pytest.raises(SourceError, match="folder without a Zarr store"):
        open_dataset(str(tmp_path))
    with pytest.raises(SourceError, match="scheme"):
        open_dataset("gopher://host/a.nc")


def test_an_unreachable_server_is_an_error_not_a_traceback():
    with pytest.raises(SourceError, match="cannot be read|Nothing is at"):
        open_dataset("http://127.0.0.1:9/a.nc")


def test_fingerprints_follow_the_content(tmp_path, data):
    assert fingerprint(SAMPLE) == fingerprint(SAMPLE)
    a, b = tmp_path / "a.bin", tmp_path / "b.bin"
    a.write_bytes(b"1")
    b.write_bytes(b"1")
    assert fingerprint(str(a)) == fingerprint(str(b))
    b.write_bytes(b"2")
    assert fingerprint(str(a)) != fingerprint(str(b))
    data.to_zarr(tmp_path / "c.zarr", zarr_format=3, consolidated=False)
    before = fingerprint(str(tmp_path / "c.zarr"))
    (tmp_path / "c.zarr" / "p" / "c" / "0" / "0" / "0").write_bytes(b"changed")
    assert fingerprint(str(tmp_path / "c.zarr")) != before


@pytest.mark.parametrize("pattern", ["memory://fingerprints/*.nc", "site/*.nc", "site/a.nc"])
def test_fingerprints_follow_files_that_listings_say_nothing_of(site, pattern):
    folder, address = site
    (folder / "index.html").write_text('<a href="a.nc">a.nc</a>')
    found = []
    for number, content in enumerate((b"one", b"two")):
        (folder / "a.nc").write_bytes(content)
        os.utime(folder / "a.nc", (number, number))
        fsspec.filesystem("memory").pipe_file("/fingerprints/a.nc", content)
        found += [fingerprint(pattern.replace("site", address)) for _ in range(2)]
    assert found[0] == found[1] != found[2] == found[3]


def test_the_fingerprint_of_a_glob_of_stores_follows_their_chunks(tmp_path, data):
    data.to_zarr(tmp_path / "a.zarr", zarr_format=3, consolidated=False)
    before = fingerprint(str(tmp_path / "*.zarr"))
    assert fingerprint(str(tmp_path / "*.zarr")) == before
    (tmp_path / "a.zarr" / "p" / "c" / "0" / "0" / "0").write_bytes(b"changed")
    assert fingerprint(str(tmp_path / "*.zarr")) != before


def test_a_missing_source_has_no_fingerprint(tmp_path):
    with pytest.raises(SourceError, match="cannot be read"):
        fingerprint(str(tmp_path / "none.nc"))


def days(first, count, offset=0.0):
    """Daily rain in mm with bounds, 3 x 4 cells whose amount is the number of the day."""
    time = np.datetime64("2001-01-01", "ns") + np.arange(first, first + count) * np.timedelta64(1, "D")
    values = np.broadcast_to(np.arange(first, first + count)[:, None, None] + offset, (count, 3, 4)).astype(np.float32)
    data = xr.Dataset({"pr": (("time", "lat", "lon"), values, {"units": "mm"})},
                      {"time": time, "lat": 45.0 + np.arange(3), "lon": 3.0 + np.arange(4)})  # fmt: skip
    data["time"].encoding.update(units="days since 2001-01-01", dtype="int32")
    return data


START = Declared(time_label="start", accumulated="none")


def test_files_of_a_glob_join_along_time_in_any_order(tmp_path):
    for name, part in (("b", days(0, 3)), ("a", days(3, 2)), ("c", days(5, 4))):
        part.to_netcdf(tmp_path / f"{name}.nc")
    with open_dataset(str(tmp_path / "*.nc")) as opened:
        cube = read_coarse(opened, "pr", START)
    np.testing.assert_array_equal(cube.amount[:, 0, 0], np.arange(9))
    before = fingerprint(str(tmp_path / "*.nc"))
    days(9, 1).to_netcdf(tmp_path / "d.nc")
    assert fingerprint(str(tmp_path / "*.nc")) != before
    (tmp_path / "c.nc").unlink()
    with pytest.raises(SourceError, match="uneven"), open_dataset(str(tmp_path / "*.nc")) as opened:
        read_coarse(opened, "pr", START)


def test_files_of_the_same_times_are_driving_members_named_by_what_tells_them_apart(tmp_path):
    for name, offset in (("r1i1p1f1", 0.0), ("r12i1p1f1", 100.0)):
        days(0, 3, offset).to_netcdf(tmp_path / f"pr_day_{name}_gn.nc")
    with open_dataset(str(tmp_path / "*.nc")) as opened:
        with pytest.raises(SourceError, match=r"2 driving members: member \(r12i1p1f1, r1i1p1f1\).*select: {member"):
            read_coarse(opened, "pr", START)
        one, other = find(opened, "pr", START).read_all()
        assert (one.driving, other.driving) == ("r12i1p1f1", "r1i1p1f1")
        np.testing.assert_array_equal(one.amount, other.amount + 100)
        declared = replace(START, select={"member": "r12i1p1f1"})
        np.testing.assert_array_equal(read_coarse(opened, "pr", declared).amount[:, 0, 0], [100, 101, 102])


def test_files_whose_times_are_called_otherwise_join_along_them(tmp_path):
    """ERA5 as the new CDS gives it."""
    for first in (0, 3):
        days(first, 3).rename(time="valid_time").to_netcdf(tmp_path / f"{first}.nc")
    with open_dataset(str(tmp_path / "*.nc")) as opened:
        np.testing.assert_array_equal(read_coarse(opened, "pr", START).amount[:, 0, 0], np.arange(6))


@pytest.mark.filterwarnings("ignore:Unable to decode time axis")
def test_files_on_both_sides_of_2262_join(tmp_path):
    """Nanoseconds since 1970 end there, and xarray has later dates as other objects."""
    for first in (0, 3):
        data = days(0, 3).drop_vars("time").assign_coords(time=np.arange(first, first + 3))
        data["time_bnds"] = (("time", "nv"), np.stack([data["time"].values, data["time"].values + 1], axis=1))
        data["time"].attrs.update(units="days since 2262-04-09", bounds="time_bnds")
        data.to_netcdf(tmp_path / f"{first}.nc")
    with open_dataset(str(tmp_path / "*.nc")) as opened:
        times = read_coarse(opened, "pr").times
    assert (times.size, times.step, times.start.isoformat()) == (6, timedelta(days=1), "2262-04-09T00:00:00")


def forecast_of_a_day(path, run, lead):
    """One step of a forecast as cfgrib writes it: start, lead and time of the values are scalars."""
    names = {"time": "forecast_reference_time", "step": "forecast_period", "valid_time": "time"}
    data = days(run + lead, 1).isel(time=0).rename(time="valid_time")
    data = data.assign_coords(time=np.datetime64("2001-01-01", "ns") + np.timedelta64(run, "D"), step=24.0 * lead)
    for name, standard in names.items():
        data[name].attrs["standard_name"] = standard
    data.to_netcdf(path)


@pytest.mark.parametrize("of", [lambda i: (0, i), lambda i: (i, 1)], ids=["one run", "one lead of every run"])
def test_files_of_one_step_of_forecasts_join_along_the_times_of_their_values(tmp_path, of):
    for i in range(1, 4):
        forecast_of_a_day(tmp_path / f"{i}.nc", *of(i))
    with open_dataset(str(tmp_path / "*.nc")) as opened:
        amount = read_coarse(opened, "pr", START).amount
    np.testing.assert_array_equal(amount[:, 0, 0], [sum(of(i)) for i in range(1, 4)])


def test_files_of_several_runs_and_leads_make_no_series(tmp_path):
    for i, (run, lead) in enumerate(((0, 1), (1, 2))):
        forecast_of_a_day(tmp_path / f"{i}.nc", run, lead)
    with pytest.raises(SourceError, match="several runs and lead times.*Name files of one run"):
        open_dataset(str(tmp_path / "*.nc"))


def test_metadata_that_say_they_are_not_consolidated_are_not_looked_for(tmp_path, data):
    data.to_zarr(tmp_path / "a.zarr", zarr_format=3, consolidated=False)
    root = tmp_path / "a.zarr" / "zarr.json"
    root.write_text(json.dumps(json.loads(root.read_text()) | {"consolidated_metadata": None}))
    with open_dataset(str(tmp_path / "a.zarr")) as opened:
        assert set(opened.data_vars) == set(data.data_vars)


def test_files_of_different_calendars_do_not_fit_together(tmp_path):
    days(0, 3).to_netcdf(tmp_path / "a.nc")
    later = days(3, 3)
    later["time"].encoding.update(units="days since 2001-01-01", calendar="standard")
    later.convert_calendar("noleap").to_netcdf(tmp_path / "b.nc")
    with pytest.raises(SourceError, match=r"the calendar is standard in .*a.nc, noleap in .*b.nc. Name files of one"):
        open_dataset(str(tmp_path / "*.nc"))


def test_files_that_do_not_fit_together_are_refused(tmp_path):
    days(0, 3).to_netcdf(tmp_path / "a.nc")
    days(2, 3).to_netcdf(tmp_path / "b.nc")
    with pytest.raises(SourceError, match="hold the same time twice: 2001-01-03"):
        open_dataset(str(tmp_path / "*.nc"))
    days(3, 3).assign_coords(lat=np.arange(3.0)).to_netcdf(tmp_path / "b.nc")
    with pytest.raises(SourceError, match="do not fit together along time"):
        open_dataset(str(tmp_path / "*.nc"))
    for change, message in (
        ({"units": "m"}, "'pr' is mm in some, m in .*b.nc"),
        ({"units": "mm", "cell_methods": "time: mean"}, "mm, time: mean in .*b.nc"),
    ):
        for first in (0, 3):  # of the same times, and of later ones
            days(first, 3).assign(pr=days(first, 3)["pr"].assign_attrs(change)).to_netcdf(tmp_path / "b.nc")
            with pytest.raises(SourceError, match=message):
                open_dataset(str(tmp_path / "*.nc"))
    days(0, 3).rename(pr="lsp").to_netcdf(tmp_path / "b.nc")
    with pytest.raises(SourceError, match="lsp, pr is not in all of them"):
        open_dataset(str(tmp_path / "*.nc"))
    for first, name in ((0, "a"), (3, "b")):
        days(first, 3).assign_attrs(variant_label=f"r{name}i1p1f1").to_netcdf(tmp_path / f"{name}.nc")
    with pytest.raises(SourceError, match="several realizations.*variant_label is rai1p1f1 in .*a.nc, rbi1p1f1 in"):
        open_dataset(str(tmp_path / "*.nc"))
    bounded = days(0, 3)
    bounded["time"].attrs["bounds"] = "time_bnds"
    bounded["time_bnds"] = (("time", "nv"), np.stack([bounded["time"].values] * 2, axis=1))
    bounded.to_netcdf(tmp_path / "a.nc")
    days(3, 3).to_netcdf(tmp_path / "b.nc")
    with pytest.raises(SourceError, match="there are time bounds in .*a.nc, none in .*b.nc"):
        open_dataset(str(tmp_path / "*.nc"))
    with pytest.raises(SourceError, match="Nothing matches"):
        open_dataset(str(tmp_path / "*.grib"))


def references(path, url):
    """Kerchunk references of the chunks of `pr` in an HDF5 file, put together from what h5py knows."""
    refs = {".zgroup": json.dumps({"zarr_format": 2})}
    with h5py.File(path) as file:
        for name in ("pr", "time", "lat", "lon"):
            d = file[name]
            dims = {"pr": ["time", "lat", "lon"]}.get(name, [name])
            meta = {"zarr_format": 2, "shape": d.shape, "chunks": d.chunks or d.shape, "dtype": d.dtype.str,
                    "compressor": None, "filters": None, "fill_value": None, "order": "C"}  # fmt: skip
            refs[f"{name}/.zarray"] = json.dumps(meta)
            attributes = {k: d.attrs[k].decode() for k in ("units", "calendar") if isinstance(d.attrs.get(k), bytes)}
            attributes |= {k: d.attrs[k] for k in ("units", "calendar") if isinstance(d.attrs.get(k), str)}
            refs[f"{name}/.zattrs"] = json.dumps({"_ARRAY_DIMENSIONS": dims, **attributes})
            if d.chunks is None:
                refs[f"{name}/" + ".".join("0" * d.ndim)] = [url, d.id.get_offset(), d.id.get_storage_size()]
            for i in range(d.id.get_num_chunks() if d.chunks else 0):
                chunk = d.id.get_chunk_info(i)
                key = ".".join(str(o // c) for o, c in zip(chunk.chunk_offset, d.chunks, strict=True))
                refs[f"{name}/{key}"] = [url, chunk.byte_offset, chunk.size]
    return {"version": 1, "refs": refs}


def test_kerchunk_references_read_like_the_file_they_refer_to(tmp_path):
    days(0, 5).to_netcdf(tmp_path / "a.nc", encoding={"pr": {"chunksizes": (2, 3, 4)}}, engine="h5netcdf")
    (tmp_path / "refs.json").write_text(json.dumps(references(tmp_path / "a.nc", str(tmp_path / "a.nc"))))
    with open_dataset(str(tmp_path / "refs.json")) as opened:
        cube = read_coarse(opened, "pr", START)
    np.testing.assert_array_equal(cube.amount[:, 2, 3], np.arange(5))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SourceError, match="holds no kerchunk references"):
        open_dataset(str(tmp_path / "other.json"))


def test_references_in_parquet_read_like_those_in_json(tmp_path):
    """As kerchunk writes them: .zmetadata with the length of records, and a table of references for each variable."""
    days(0, 5).to_netcdf(tmp_path / "a.nc", encoding={"pr": {"chunksizes": (2, 3, 4)}}, engine="h5netcdf")
    refs = references(tmp_path / "a.nc", str(tmp_path / "a.nc"))["refs"]
    store = tmp_path / "refs.parq"
    for name in ("pr", "time", "lat", "lon"):
        (store / name).mkdir(parents=True)
        found = [v for k, v in sorted(refs.items()) if k.startswith(f"{name}/") and not k.endswith(("array", "attrs"))]
        table = {k: [v[i] for v in found] for i, k in enumerate(("path", "offset", "size"))} | {
            "raw": [None] * len(found)
        }
        pd.DataFrame(table).to_parquet(store / name / "refs.0.parq", engine="pyarrow")
    metadata = {k: json.loads(v) for k, v in refs.items() if isinstance(v, str)}
    (store / ".zmetadata").write_text(json.dumps({"metadata": metadata, "record_size": 1000}))
    with open_dataset(str(store)) as opened:
        np.testing.assert_array_equal(read_coarse(opened, "pr", START).amount[:, 2, 3], np.arange(5))


def test_a_zarr2_fill_value_of_0_is_no_mark_of_missing_cells(tmp_path):
    data = days(0, 4)
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    for name, values in (
        ("pr", data["pr"].values),
        ("time", np.arange(4)),
        ("lat", 45.0 + np.arange(3)),
        ("lon", np.arange(4.0)),
    ):
        array = group.create_array(name, shape=values.shape, dtype=values.dtype, fill_value=0)
        array[:] = values
        array.attrs["_ARRAY_DIMENSIONS"] = ["time", "lat", "lon"] if name == "pr" else [name]
    group["pr"].attrs["units"] = "mm"
    group["time"].attrs["units"] = "days since 2001-01-01"
    with open_dataset(str(tmp_path / "a.zarr")) as opened:
        np.testing.assert_array_equal(read_coarse(opened, "pr", START).amount, data["pr"].values)


class Counting(LocalFileSystem):
    """Local files that count the bytes read from them."""

    protocol = "counting"
    total = 0

    def _open(self, path, mode="rb", block_size=None, **kwargs):
        opened = open(self._strip_protocol(path), mode)  # noqa: PTH123, SIM115
        read = opened.read
        outer = self

        class Reader:
            def __getattr__(self, name):
                return getattr(opened, name)

            def read(self, size=-1):
                data = read(size)
                type(outer).total += len(data)
                return data

            def readinto(self, buffer):
                data = read(len(buffer))
                buffer[: len(data)] = data
                type(outer).total += len(data)
                return len(data)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                opened.close()

        return Reader()


@pytest.mark.parametrize("kind", ["zarr2", "zarr3", "hdf5"])
def test_only_the_period_and_the_box_are_read(tmp_path, kind):
    fsspec.register_implementation("counting", Counting, clobber=True)
    nt, n, c = 96, 240, 20
    values = np.random.default_rng(0).random((nt, n, n), np.float32)
    time = np.datetime64("2001-01-01", "ns") + np.arange(nt) * np.timedelta64(1, "h")
    coords = {"time": time, "lat": ("lat", 50 - 0.1 * np.arange(n), {"units": "degrees_north"}),
              "lon": ("lon", 0.1 * np.arange(n), {"units": "degrees_east"})}  # fmt: skip
    data = xr.Dataset({"pr": (("time", "lat", "lon"), values, {"units": "mm"})}, coords)
    data["time"].encoding.update(units="hours since 2001-01-01", dtype="int32")
    path = tmp_path / "store"
    if kind == "hdf5":
        data.to_netcdf(path, engine="h5netcdf", encoding={"pr": {"chunksizes": (12, c, c)}})
    else:
        encoding = {"pr": {"chunks": (12, c, c), "compressors": None}}
        data.to_zarr(path, zarr_format=int(kind[-1]), encoding=encoding, consolidated=kind == "zarr2")
    box = Box(6.0, 44.0, 9.0, 46.0, CRS.from_epsg(4326).to_wkt())
    declared = Declared(time_label="start", period=("2001-01-02", "2001-01-03"))
    Counting.total = 0
    with open_dataset(f"counting://{path}") as opened:
        cube = read_coarse(opened, "pr", declared, near=box)
    first_row, first_column = round((50 - cube.grid.y.first) / 0.1), round(cube.grid.x.first / 0.1)
    wanted = values[24:48, first_row : first_row + cube.grid.y.size, first_column : first_column + cube.grid.x.size]
    np.testing.assert_array_equal(cube.amount, wanted)
    # Two chunks in time, and in place those that the box and its margin touch: 3 by 3 of 12 by 12.
    chunk = 12 * c * c * 4
    margin = 1.5e6 if kind == "hdf5" else 3e4  # headers; HDF5 is read ahead in blocks of 1 MiB
    assert cube.amount.nbytes <= Counting.total <= 2 * 3 * 3 * chunk + margin
    assert values.nbytes > 22e6
