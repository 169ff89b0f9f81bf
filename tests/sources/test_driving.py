"""Driving members: sources that hold several realizations of the driving model."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr

from stsr_core.errors import SourceError
from stsr_core.sources.declared import ALL, Declared
from stsr_core.sources.driving import selected
from stsr_core.sources.harmonise import cubes_of, find, read_cube, read_cubes
from stsr_core.sources.open import open_dataset

END = Declared(time_label="end")
RAIN = np.random.default_rng(0).gamma(0.5, 2.0, (3, 6, 4, 5))


def ensemble(dim="member", labels=(1, 2, 5), values=RAIN, standard_name=None):
    coords = {"time": pd.date_range("2001-01-01 01:00", periods=values.shape[1], freq="1h"),
              "y": 1000.0 * np.arange(4), "x": 1000.0 * np.arange(5)}  # fmt: skip
    data = xr.DataArray(values, dims=(dim, "time", "y", "x"), coords=coords, attrs={"units": "mm"}, name="pr")
    if labels is not None:
        data = data.assign_coords({dim: (dim, list(labels), {"standard_name": standard_name} if standard_name else {})})
    return data


@pytest.mark.parametrize(
    ("dim", "labels", "standard_name", "expected"),
    [
        ("member", (1, 2, 5), None, ("1", "2", "5")),
        ("realization", (0.0, 1.0, 2.0), None, ("0", "1", "2")),
        ("number", None, None, ("0", "1", "2")),
        ("ensemble_member", ("r1i1p1f1", "r2i1p1f1", "r3i1p1f1"), None, ("r1i1p1f1", "r2i1p1f1", "r3i1p1f1")),
        ("m", (b"a", b"b", b"c"), "realization", ("a", "b", "c")),
    ],
)
def test_an_axis_of_realizations_is_known_by_its_name_or_by_cf_and_read_whole(dim, labels, standard_name, expected):
    cubes = cubes_of(ensemble(dim, labels, standard_name=standard_name), END)
    assert tuple(cube.driving for cube in cubes) == expected
    for cube, truth in zip(cubes, RAIN, strict=True):
        np.testing.assert_allclose(cube.amount, truth, rtol=1e-6)


def test_dimensions_may_come_in_any_order_and_labels_from_another_coordinate():
    data = ensemble("ens", None).transpose("time", "x", "ens", "y").to_dataset()
    data["realization"] = ("ens", ["p", "q", "s"])
    cubes = read_cubes(data, "pr", END)
    assert [cube.driving for cube in cubes] == ["p", "q", "s"]
    np.testing.assert_allclose(cubes[2].amount, RAIN[2], rtol=1e-6)


@pytest.mark.parametrize(("select", "expected"), [(ALL, (1, 2, 5)), ((5, 1), (5, 1)), ((2,), (2,)), (5, (5,))])
def test_some_driving_members_are_selected_by_label(select, expected):
    cubes = cubes_of(ensemble(), replace(END, select={"member": select}))
    assert [cube.driving for cube in cubes] == [str(label) for label in expected]
    for cube, label in zip(cubes, expected, strict=True):
        np.testing.assert_allclose(cube.amount, RAIN[(1, 2, 5).index(label)], rtol=1e-6)


def test_other_axes_are_driving_members_only_if_declared():
    models = ensemble("model", ("A", "B", "C"))
    with pytest.raises(SourceError, match=r"model \(3: A, B, C\).*`select: {NAME: all}` takes"):
        cubes_of(models, END)
    assert [cube.driving for cube in cubes_of(models, replace(END, select={"model": ALL}))] == ["A", "B", "C"]
    (one,) = cubes_of(models, replace(END, select={"model": "B"}))
    assert one.driving == ""


def test_one_entry_without_declaration_is_no_ensemble():
    (cube,) = cubes_of(ensemble(labels=(3,), values=RAIN[:1]), END)
    assert cube.driving == ""


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ({"member": 3}, "none of 1, 2, 5"),
        ({"member": (1, 1)}, "named twice"),
        ({"member": ()}, "names no entry"),
        ({"number": 1}, "which is no dimension"),
    ],
)
def test_entries_that_are_not_there_are_refused(select, message):
    with pytest.raises(SourceError, match=message):
        cubes_of(ensemble(), replace(END, select=select))


def test_what_cannot_be_driving_members_is_refused():
    with pytest.raises(SourceError, match="Driving members lie along model and member"):
        cubes_of(ensemble().expand_dims(model=["A", "B"]), replace(END, select={"model": ALL}))
    with pytest.raises(SourceError, match="same label: 1, 2, 1"):
        cubes_of(ensemble(labels=(1, 2, 1)), END)
    lost, negative = RAIN.copy(), RAIN.copy()
    lost[1], negative[2, 3, 0, 4] = np.nan, -3.0
    with pytest.raises(SourceError, match="All values are missing in driving member 2"):
        cubes_of(ensemble(values=lost), END)
    with pytest.raises(SourceError, match="-3 mm at step 3, cell 4 in driving member 5"):
        cubes_of(ensemble(values=negative), END)
    parts = xr.Dataset({"cp": ensemble(), "lsp": ensemble().isel(member=0, drop=True)})
    with pytest.raises(SourceError, match="different driving members"):
        read_cubes(parts, "cp + lsp", END)
    with pytest.raises(SourceError, match=r"3 driving members: member \(1, 2, 5\). One is needed"):
        read_cube(parts, "cp", END)


def test_bounds_that_joining_has_repeated_count_once_and_must_be_the_same():
    data = ensemble().to_dataset()
    ends = data["time"].values
    pairs = np.stack([ends - np.timedelta64(1, "h"), ends], axis=1)
    data["time"].attrs["bounds"] = "time_bnds"
    data["time_bnds"] = (("member", "time", "nv"), np.stack([pairs] * 3))
    assert read_cubes(data, "pr")[1].times.label == "end"
    data["time_bnds"][2] += np.timedelta64(1, "h")
    with pytest.raises(SourceError, match="time_bnds differs between the driving members"):
        read_cubes(data, "pr")


def test_running_sums_of_every_member_are_undone_and_each_chunk_is_read_once(tmp_path):
    sums = ensemble(values=RAIN.cumsum(axis=1)).to_dataset()
    sums.chunk(member=3, time=2).to_zarr(tmp_path / "sums.zarr", zarr_format=2, consolidated=True)
    with open_dataset(str(tmp_path / "sums.zarr")) as opened:
        with pytest.raises(SourceError, match="running sum"):
            read_cubes(opened, "pr", END)
        cubes = find(opened, "pr", Declared(accumulated="run")).read_all()
    for cube, truth in zip(cubes, RAIN, strict=True):
        np.testing.assert_allclose(cube.amount, truth[1:], atol=1e-5)


def test_files_with_bounds_join_along_driving_members(tmp_path):
    ends = pd.date_range("2001-01-02", periods=6, freq="1D")
    for number, values in enumerate(RAIN):
        data = ensemble(values=values[None], labels=None).isel(member=0).assign_coords(time=ends).to_dataset()
        data["time"].encoding["units"] = "hours since 2001-01-01"
        data["time"].attrs["bounds"] = "time_bnds"
        data["time_bnds"] = (("time", "nv"), np.stack([ends - pd.Timedelta("1D"), ends], axis=1))
        data.to_netcdf(tmp_path / f"pr_r{number}.nc")
    with open_dataset(str(tmp_path / "*.nc")) as opened:
        assert opened["time_bnds"].dims == ("time", "nv")
        cubes = read_cubes(opened, "pr")
    assert [cube.driving for cube in cubes] == ["r0", "r1", "r2"]
    np.testing.assert_allclose(cubes[1].amount, RAIN[1], rtol=1e-6)


def test_more_than_memory_holds_is_refused_before_it_is_read(tmp_path):
    group = zarr.open_group(tmp_path / "large.zarr", mode="w")
    sizes = {"member": 50, "time": 24, "lat": 36_000, "lon": 72_000}  # 12.4 TB, none of it written
    values = {
        "member": np.arange(50), "time": np.arange(24.0),
        "lat": -90 + 0.005 * (np.arange(36_000) + 0.5), "lon": 0.005 * np.arange(72_000),
    }  # fmt: skip
    units = {"time": "hours since 2001-01-01", "lat": "degrees_north", "lon": "degrees_east", "member": "1"}
    for name, along in values.items():
        group.create_array(name, data=along, dimension_names=(name,)).attrs["units"] = units[name]
    shape, chunks = tuple(sizes.values()), (1, 1, 1000, 1000)
    rain = group.create_array("pr", shape=shape, chunks=chunks, dtype="float32", dimension_names=tuple(sizes))
    rain.attrs["units"] = "mm"
    with open_dataset(str(tmp_path / "large.zarr")) as dataset:
        reading = find(dataset, "pr", END)
        with pytest.raises(SourceError, match=r"50 driving members x 24 steps x 2592000000 cells take 12441.6 GB; of "):
            reading.read_all()


@pytest.mark.parametrize("calendar", ["standard", "noleap"])
@pytest.mark.parametrize("wanted", ["2001-01-01", "2001-01-01T00:00", "2001-01-01 00:00:00"])
def test_runs_are_selected_by_dates_in_any_spelling(calendar, wanted):
    runs = xr.date_range("2000-12-31", periods=2, calendar=calendar, use_cftime=calendar != "standard")
    data = xr.Dataset({"pr": (("run", "time"), np.zeros((2, 3)))}, {"run": runs})
    found, _ = selected(data, "pr", Declared(select={"run": wanted}))
    assert str(found["run"].values).startswith("2001-01-01")
