import threading
from datetime import timedelta

import cftime
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from stsr_core.errors import GridError, SourceError
from stsr_core.sources.declared import Declared
from stsr_core.sources.harmonise import find, read_cube
from stsr_core.sources.open import open_dataset
from tests.reading import cube_of, read_coarse

END = Declared(time_label="end")
SAMPLE = "package:samples/arpege_fc1h_20180501_SE.nc"


def array(units="mm", nt=4, **changes):
    time = changes.pop("time", pd.date_range("2001-01-01 01:00", periods=nt, freq="1h"))
    values = changes.pop("values", np.ones((nt, 3, 5)))
    dims = changes.pop("dims", ("time", "y", "x"))
    coords = {dims[0]: time, dims[1]: 1000.0 * np.arange(3), dims[2]: 1000.0 * np.arange(5)}
    return xr.DataArray(values, dims=dims, coords=coords, attrs={"units": units} if units else {})


def test_the_shipped_sample_reads_as_its_file_says():
    with open_dataset(SAMPLE) as dataset:
        cube = read_cube(dataset, "precipitation")
        expected = dataset["precipitation"].values
    np.testing.assert_allclose(cube.amount, expected, rtol=1e-6)
    assert cube.times.step == timedelta(hours=1)
    assert cube.times.label == "end"
    assert cube.grid.y.step == pytest.approx(-0.1)
    assert "WGS 84" in cube.grid.crs_wkt
    assert "Etalab" in cube.attributes["license"]


@pytest.mark.parametrize(
    ("units", "value", "amount"),
    [
        ("mm", 2.0, 2.0),
        ("m", 0.002, 2.0),
        ("kg m-2", 2.0, 2.0),
        ("kg m-2 s-1", 2.0 / 3600, 2.0),
        ("mm/h", 2.0, 2.0),
        ("mm day-1", 48.0, 2.0),
        ("mm hr^-1", 2.0, 2.0),
        ("kg m**-2", 2.0, 2.0),
        ("inches", 2.0 / 25.4, 2.0),
        ("inch/hour", 2.0 / 25.4, 2.0),
        ("mm s-1", 2.0 / 3600, 2.0),
        ("m of water equivalent", 0.002, 2.0),
        ("mm of water", 2.0, 2.0),
    ],
)
def test_units_become_mm_per_step(units, value, amount):
    cube = cube_of(array(units, values=np.full((4, 3, 5), value)), END)
    np.testing.assert_allclose(cube.amount, amount, rtol=1e-6)
    assert cube.amount.dtype == np.float32


@pytest.mark.parametrize(
    ("units", "attributes", "message"),
    [
        (
            "kg m-2 s-1",
            {"cell_methods": "time: point"},
            "'time: point' is none over a step.*declare `units: kg m-2 s-1`",
        ),
        ("mm", {"cell_methods": "time: mean"}, "does not say over which time"),
        ("mm", {"standard_name": "precipitation_flux"}, "those of an amount, but .* that of a rate"),
        ("mm 3h-1", {}, "may mean 'per so many'.*brackets"),
        ("mm/month", {}, "have a month, whose length nobody states"),
        ("mm yr-1", {}, "have a yr, whose length nobody states"),
        ("mm", {"cell_methods": "area: mean time: maximum"}, "those of the maximum over time.*declare `units: mm`"),
        ("mm/h", {"cell_methods": "time: mean within hours time: maximum over hours"}, "of the maximum over time"),
        ("mm", {"cell_methods": "time: sum within years time: mean over years"}, "those of a climatology"),
        ("mm", {"cell_methods": "time: sum within days time: mean over days"}, "those of a climatology"),
        ("mm", {"cell_methods": "time: lat: lon: maximum"}, "those of the maximum over time"),
        ("mm", {"cell_methods": "time: lat: lon: mean"}, "does not say over which time"),
        ("mm day-1", {"cell_methods": "area: mean time: sum"}, "may be a sum of rates, or an amount"),
    ],
)
def test_units_that_may_mean_something_else_are_refused_until_declared(units, attributes, message):
    data = array(units).assign_attrs(attributes)
    with pytest.raises(SourceError, match=message):
        cube_of(data, END)
    assert cube_of(data, Declared(time_label="end", units="mm")).amount[0, 0, 0] == 1.0


def test_units_in_other_letters_are_proposed_as_udunits_has_them():
    with pytest.raises(SourceError, match="'Kg/m.2/s' are not understood.*declare `units: kg/m.2/s`"):
        cube_of(array("Kg/m^2/s"), END)
    with pytest.raises(SourceError) as raised:
        cube_of(array("MB"), END)
    assert "small letters" not in str(raised.value)


@pytest.mark.parametrize("since", ["run", "day"])
def test_a_rate_is_no_running_sum(since):
    with pytest.raises(SourceError, match=f"start of the {since} are declared, but 'mm/h' is a rate"):
        cube_of(array("mm/h"), Declared(accumulated=since))


def test_a_climatology_is_refused():
    data = array().to_dataset(name="pr")
    data["time"].attrs["climatology"] = "climatology_bnds"
    with pytest.raises(SourceError, match="time is the time of a climatology"):
        read_cube(data, "pr", END)


def test_bounds_decide_what_a_stamp_names():
    data = array(time=pd.date_range("2001-01-01 03:00", periods=4, freq="6h"))
    starts = data["time"].values - np.timedelta64(3, "h")
    bounds = xr.DataArray(np.stack([starts, starts + np.timedelta64(6, "h")], axis=1), dims=("time", "nv"))
    cube = cube_of(data, bounds=bounds)
    assert cube.times.label == "middle"
    np.testing.assert_array_equal(cube.times.bounds[:, 0], starts)
    np.testing.assert_array_equal(cube.times.labels, data["time"].values)


def test_what_a_stamp_names_is_declared_never_guessed():
    with pytest.raises(SourceError, match="Nothing says which time .* stands for.*time_label"):
        cube_of(array())
    for label, start in (("start", "01:00"), ("middle", "00:30"), ("end", "00:00")):
        cube = cube_of(array(), Declared(time_label=label))
        assert cube.times.bounds[0, 0] == np.datetime64(f"2001-01-01T{start}")
        assert cube.times.labels[0] == np.datetime64("2001-01-01T01:00")


def test_a_360_day_calendar_is_kept():
    time = xr.date_range("2001-02-28", periods=4, freq="D", calendar="360_day", use_cftime=True)
    cube = cube_of(array("mm", time=time), END)
    assert cube.times.labels[2] == cftime.Datetime360Day(2001, 2, 30)


def test_axes_are_kept_as_they_run_and_latitudes_imply_their_crs():
    data = array(dims=("time", "lat", "lon"))
    data = data.assign_coords(lat=[50.0, 49.5, 49.0], lon=np.float32([7.1, 7.2, 7.3, 7.4, 7.5]))
    cube = cube_of(data, END)
    assert cube.grid.y.step == -0.5
    assert cube.grid.x.step == pytest.approx(0.1, abs=1e-12)
    assert "WGS 84" in cube.grid.crs_wkt


def test_anomalies_are_no_amounts():
    data = array().assign_attrs(long_name="Precipitation anomaly against 1991-2020")
    with pytest.raises(SourceError, match="is an anomaly .Precipitation anomaly against 1991-2020., no amount"):
        cube_of(data, END)


def test_small_negative_amounts_are_rounding_and_missing_stays_missing():
    values = np.ones((4, 3, 5))
    values[0, 0, 0], values[1, 1, 1] = -0.005, np.nan
    cube = cube_of(array(values=values), END)
    assert cube.amount[0, 0, 0] == 0.0
    assert np.isnan(cube.amount[1, 1, 1])
    assert np.isnan(cube.amount).sum() == 1


def test_negative_amounts_within_half_a_packing_step_are_counted_and_set_to_zero():
    data = array(values=np.where(np.arange(60).reshape(4, 3, 5) % 7 == 0, -0.04, 1.0))
    with pytest.raises(SourceError, match="Negative precipitation"):
        cube_of(data, END)
    data.encoding["scale_factor"] = 0.1
    assert cube_of(data, END).attributes["negatives_set_to_zero"] == "9"


@pytest.mark.parametrize(
    ("units", "scale", "quantum", "declared", "quanta"),
    [
        ("mm", 0.1, 0.1, END, 0.5),
        ("m", 1e-4, 0.1, END, 0.5),
        ("mm s-1", 1e-4, 0.36, END, 0.5),
        ("mm", 0.1, 0.1, Declared(accumulated="run"), 1.0),
        ("m", 1e-4, 0.1, Declared(accumulated="run"), 1.0),
    ],
)
def test_negatives_are_packing_error_down_to_half_a_quantum_and_of_differences_to_a_whole_one(
    units, scale, quantum, declared, quanta
):
    for excess, refused in ((0.9, False), (1.1, True)):
        amounts = values_with(-excess * quanta * quantum)
        stored = (amounts.cumsum(axis=0) if declared.accumulated else amounts) * scale / quantum
        data = array(units, values=stored)
        data.encoding["scale_factor"] = scale
        if refused:
            with pytest.raises(SourceError, match="Negative precipitation"):
                cube_of(data, declared)
        else:
            assert cube_of(data, declared).attributes["negatives_set_to_zero"] == "1"


def test_differences_of_large_float32_sums_dip_below_0_by_their_rounding():
    sums = np.full((4, 3, 5), 2e5, np.float32)
    sums[2, 1, 3] = np.nextafter(sums[0, 0, 0], np.float32(0))  # 0.0156 mm less
    assert cube_of(array(values=sums), Declared(accumulated="run")).attributes["negatives_set_to_zero"] == "1"
    sums[2, 1, 3] -= 0.05
    with pytest.raises(SourceError, match="Negative precipitation"):
        cube_of(array(values=sums), Declared(accumulated="run"))


def test_differences_of_float32_sums_lose_no_digits():
    sums = (5 + np.random.default_rng(0).gamma(0.5, 2e-3, (4, 3, 5)).cumsum(axis=0)).astype(np.float32)
    cube = cube_of(array("m", values=sums), Declared(accumulated="run"))
    np.testing.assert_allclose(cube.amount, 1000 * np.diff(sums.astype(np.float64), axis=0), rtol=1e-6)


def test_means_since_the_start_become_the_amounts_of_each_step_in_any_block(monkeypatch):
    monkeypatch.setattr("stsr_core.sources.harmonise.BLOCK_VALUES", 15)  # one step a block
    rain = np.random.default_rng(0).gamma(0.5, 2.0, (4, 3, 5))
    data = array("mm/h", values=rain.cumsum(axis=0) / np.arange(1, 5)[:, None, None])
    ends = data["time"].values
    start = np.full(4, ends[0] - np.timedelta64(1, "h"))
    cube = cube_of(data, bounds=xr.DataArray(np.stack([start, ends], axis=1), dims=("time", "nv")))
    np.testing.assert_allclose(cube.amount, rain, rtol=1e-5)


@pytest.mark.parametrize(("hours", "largest"), [(1, 844.0), (24, 844.0 * 24**0.475)])
def test_more_than_twice_the_record_of_its_time_is_no_amount_of_a_step(hours, largest):
    times = pd.date_range("2001-01-01", periods=4, freq=f"{hours}h")
    assert cube_of(array(time=times, values=values_with(0.99 * largest)), END).amount.max() > 0.9 * largest
    with pytest.raises(SourceError, match=f"more than {largest:.0f} mm, twice the record"):
        cube_of(array(time=times, values=values_with(1.01 * largest)), END)


def test_less_than_packing_error_cannot_be_asked_for():
    small = Declared(time_label="end", max_negative_mm=0.001)
    assert cube_of(array(values=values_with(-0.005)), small).attributes["negatives_set_to_zero"] == "1"


def test_rain_that_falls_off_in_two_steps_on_end_only_is_no_running_sum():
    rain = np.array([1, 2, 3, 4, 5, 6, 7, 8, 5, 2, 3, 4, 5, 6], float)[:, None, None] * np.ones((3, 5))
    np.testing.assert_array_equal(cube_of(array(nt=14, values=rain), END).amount, rain)


def test_a_valid_range_is_packed_with_the_offset_that_values_have(tmp_path):
    values = values_with(150.0)
    values[0, 0, 0] = 50.0
    data = array(values=values).assign_attrs(valid_max=np.int16(2000)).to_dataset(name="pr")
    data["pr"].encoding.update(scale_factor=0.01, add_offset=100.0, dtype="int16", _FillValue=-32768)  # to 120 mm
    data.to_netcdf(tmp_path / "packed.nc")
    with open_dataset(str(tmp_path / "packed.nc")) as opened:
        assert np.isnan(read_cube(opened, "pr", END).amount).sum() == 1


def test_both_parts_of_a_sum_count_their_negatives_and_must_lie_on_the_same_cells():
    data = array(values=values_with(-0.005)).to_dataset(name="cp").assign(lsp=array(values=values_with(-0.005)))
    assert read_cube(data, "cp + lsp", END).attributes["negatives_set_to_zero"] == "2"
    data["other"] = data["lsp"].rename(x="lon").assign_coords(lon=7000.0 + 1000 * np.arange(5))
    with pytest.raises(SourceError, match="different times or cells"):
        read_cube(data, "cp + other", END)


def test_a_declared_missing_value_is_found_as_float32_holds_it():
    data = array(values=values_with(-99.9).astype(np.float32))
    assert np.isnan(cube_of(data, Declared(time_label="end", missing_values=(-99.9,))).amount).sum() == 1


@pytest.mark.parametrize(
    "stated",
    [{"valid_max": np.int16(9000)}, {"valid_max": np.float32(90)}, {"valid_range": np.array([0.0, 90.0], np.float32)}],
)
def test_what_lies_above_the_valid_range_of_the_file_is_missing(tmp_path, stated):
    data = array(values=values_with(99.99)).assign_attrs(valid_range=np.array([0.0, 90.0]))
    assert np.isnan(cube_of(data, END).amount).sum() == 1
    packed = array(values=values_with(99.99)).assign_attrs(stated).to_dataset(name="pr")  # integers are packed
    packed["pr"].encoding.update(scale_factor=0.01, dtype="int16", _FillValue=-1)
    packed.to_netcdf(tmp_path / "packed.nc")
    with open_dataset(str(tmp_path / "packed.nc")) as opened:
        amount = read_cube(opened, "pr", END).amount
    assert np.isnan(amount).sum() == 1
    np.testing.assert_allclose(amount[~np.isnan(amount)], 1.0)
    with pytest.raises(SourceError, match="ends at .*, which is no number"):
        cube_of(array().assign_attrs(valid_range="0 to 90"), END)


@pytest.mark.parametrize("encoding", [{"_FillValue": 0.0}, {"dtype": "int16", "scale_factor": 0.01, "_FillValue": 0}])
def test_a_fill_value_of_0_that_hides_dry_cells_is_refused_until_it_is_declared(tmp_path, encoding):
    data = array(values=values_with(0.0)).to_dataset(name="pr")
    data["pr"].encoding.update(encoding)
    data.to_netcdf(tmp_path / "zero.nc")
    with open_dataset(str(tmp_path / "zero.nc")) as opened:
        with pytest.raises(SourceError, match=r"fill value of the file is 0.*`missing_values: \[0.0\]`"):
            read_cube(opened, "pr", END)
        declared = Declared(time_label="end", missing_values=(0.0,))
        assert np.isnan(read_cube(opened, "pr", declared).amount).sum() == 1


@pytest.mark.parametrize(("reset", "steps"), [(24, 48), (6, 30), (2, 12)])
def test_running_sums_that_begin_anew_are_not_taken_for_amounts(reset, steps):
    rain = np.random.default_rng(0).gamma(0.5, 2.0, (steps, 3, 5))
    sums = np.concatenate([rain[i : i + reset].cumsum(axis=0) for i in range(0, steps, reset)])
    data = array(nt=steps, values=sums)
    with pytest.raises(SourceError, match="look like a running sum.*`accumulated: run`, `day`"):
        cube_of(data, END)
    np.testing.assert_allclose(cube_of(array(nt=steps, values=rain), END).amount, rain, rtol=1e-6)
    if reset == 24:
        cube = cube_of(data, Declared(accumulated="day"))
        np.testing.assert_allclose(cube.amount, rain[-cube.times.size :], atol=1e-4)


def values_with(value):
    values = np.ones((4, 3, 5))
    values[2, 1, 3] = value
    return values


STAMPS = pd.to_datetime(["2001-01-01 01:00", "2001-01-01 02:00", "2001-01-01 04:00", "2001-01-01 05:00"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (array(None), "no units.*--declare"),
        (array("widget"), "'widget' are not understood; known are such as mm"),
        (array(values=values_with(-1.0)), r"Negative precipitation: -1 mm at step 2, cell 8"),
        (array(values=values_with(np.inf)), "1 values are infinite"),
        (array(values=np.full((4, 3, 5), np.nan)), "All values are missing"),
        (array(time=STAMPS), "uneven: 2001-01-01 02:00:00 to 2001-01-01 04:00:00"),
        (array(time=STAMPS[[1, 0, 2, 3]]), "not sorted: 2001-01-01 01:00:00 comes after 2001-01-01 02:00:00"),
        (array(time=STAMPS[[0, 0, 1, 2]]), "not sorted"),
        (array(nt=1), "One time step without time bounds"),
        (array(time=np.arange(4)), "not dates.*hours since"),
        (array(dims=("time", "station", "x")), r"\('station', 'x'\) were found beside time"),
        (array().isel(time=0), "One time step without time bounds"),
        (array().isel(y=slice(0, 0)), "is empty"),
        (array().drop_vars("x"), "Dimension x has no coordinate"),
    ],
)
def test_what_cannot_be_read_safely_is_refused_with_the_reason(data, message):
    with pytest.raises(SourceError, match=message):
        cube_of(data, END)


def test_an_irregular_axis_is_refused():
    with pytest.raises(GridError, match="Axis x is not regular, and the file has no CRS"):
        cube_of(array().assign_coords(x=[0.0, 1.0, 2.0, 3.5, 4.0]), END)


def test_a_missing_variable_names_those_that_are_there():
    with pytest.raises(SourceError, match="No variable 'rain' in the file; it has precipitation"):
        read_cube(array().to_dataset(name="precipitation"), "rain")


def test_blocks_are_read_ahead_yet_come_in_order_until_one_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr("stsr_core.sources.harmonise.BLOCK_VALUES", 15)  # one step a block
    values = np.random.default_rng(0).gamma(0.3, 4.0, (40, 3, 5))
    running = array(values=values, nt=40).copy(data=values.cumsum(axis=0))
    found = cube_of(running, Declared(time_label="end", accumulated="run")).amount
    np.testing.assert_allclose(found, values[1:], rtol=1e-4, atol=1e-4)
    values[20, 1, 2] = np.inf
    seen, others = [], set(threading.enumerate())
    with array(values=values, nt=40).to_dataset(name="pr") as dataset:
        blocks = find(dataset, "pr", END).blocks()
        with pytest.raises(SourceError, match="1 values are infinite"):
            seen.extend(float(block.amount.sum()) for (block,) in blocks)
    np.testing.assert_allclose(seen, values[:20].sum(axis=(1, 2)), rtol=1e-6)
    assert not [t for t in set(threading.enumerate()) - others if t.name.startswith("ThreadPoolExecutor")]


def test_what_is_missing_at_the_end_only_is_no_missing_source(monkeypatch):
    monkeypatch.setattr("stsr_core.sources.harmonise.BLOCK_VALUES", 15)  # one step a block
    values = np.ones((4, 3, 5))
    values[2:] = np.nan
    assert np.isnan(cube_of(array(values=values), END).amount).sum() == 30
    assert find(array(values=values).to_dataset(name="pr"), "pr", END, first_steps=3).times.size == 3


def curvilinear():
    """Rain on 2-D latitudes and longitudes."""
    lon, lat = np.meshgrid(np.arange(0.0, 8.0, 0.5), np.arange(40.0, 46.0, 0.5))
    time = pd.date_range("2001-01-01 01:00", periods=2, freq="h")
    places = {"lat": (("y", "x"), lat, {"units": "degrees_north"}), "lon": (("y", "x"), lon, {"units": "degrees_east"})}
    return xr.Dataset({"pr": (("time", "y", "x"), np.ones((2, *lat.shape)), {"units": "mm"})}, {"time": time, **places})


def test_coordinates_on_a_server_are_asked_for_again(cuts):
    curvilinear().to_zarr("memory://cuts/a.zarr", zarr_format=3, mode="w", consolidated=False)
    cuts["lat/c"] = 2
    with open_dataset("memory://cuts/a.zarr") as opened:
        assert read_coarse(opened, "pr", END).amount.shape == (2, 192)
    assert cuts == {"lat/c": 0}
    cuts["lon/c"] = 99
    with (
        open_dataset("memory://cuts/a.zarr") as opened,
        pytest.raises(SourceError, match=r"the coordinates cannot be read \(ConnectionResetError"),
    ):
        read_coarse(opened, "pr", END)


def test_damaged_coordinates_are_an_error_not_a_traceback(tmp_path):
    curvilinear().to_zarr(tmp_path / "a.zarr", zarr_format=2)
    chunk = tmp_path / "a.zarr" / "lat" / "0.0"
    content = chunk.read_bytes()
    chunk.write_bytes(content[:4] + b"\xff" * 16 + content[20:])
    with (
        open_dataset(str(tmp_path / "a.zarr")) as opened,
        pytest.raises(SourceError, match="the coordinates cannot be read"),
    ):
        read_coarse(opened, "pr", END)
