"""Fuzz over headers and axes: a file is built from known rain, written in some convention, and perhaps damaged.

What is read must be that rain, at its place and in its time; or the file is refused with an error of ours. The slow
independent reading is the construction itself: no line of the reader is used to make or to compare it.
"""

from datetime import timedelta

import cftime
import numpy as np
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stsr_core.errors import StsrError
from stsr_core.sources.cube import Cube
from stsr_core.sources.declared import Declared
from stsr_core.sources.harmonise import find
from stsr_core.sources.remote import patiently

CALENDARS = ("standard", "proleptic_gregorian", "noleap", "360_day", "julian")
AMOUNTS = {"mm": 1.0, "kg m-2": 1.0, "m": 1000.0, "cm": 10.0, "kg m**-2": 1.0, "inch": 25.4}
RATES = {
    "kg m-2 s-1": 1.0,
    "mm s-1": 1.0,
    "mm/h": 1 / 3600,
    "mm day-1": 1 / 86400,
    "m s-1": 1000.0,
    "mm hr^-1": 1 / 3600,
}
DAMAGE = (
    "none", "no units", "odd units", "wrong name", "time shuffled", "time doubled", "time gap", "time missing", "no "
    "time units",
    "bounds reversed", "bounds empty", "bounds shifted", "negative", "infinite", "fill", "axis missing", "axis "
    "unsorted",
    "axis nan", "axis uneven", "latitudes off", "no bounds", "all missing", "wrong dims", "empty", "other units",
)  # fmt: skip


@st.composite
def files(draw):
    """Return an encoded dataset, what is declared of it, the damage, and the truth behind it."""
    kind = draw(st.sampled_from(["amount", "rate", "sum"]))
    units = draw(st.sampled_from(sorted(RATES if kind == "rate" else AMOUNTS)))
    nt, ny, nx = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(2, 5))
    hours = draw(st.sampled_from([1, 3, 6, 12, 24]))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    truth = rng.gamma(0.5, 3.0, (nt, ny, nx))
    start = draw(st.integers(0, 90_000)) * 24 + draw(st.sampled_from([0, 6, 12]))
    lat0, lon0 = draw(st.integers(-60, 40)), draw(st.integers(-180, 350))
    spacing = draw(st.sampled_from([0.1, 0.25, 1.0, 2.5]))
    label = draw(st.sampled_from(["start", "middle", "end"]))
    calendar = draw(st.sampled_from(CALENDARS))
    lat = lat0 + spacing * np.arange(ny)
    lon = lon0 + spacing * np.arange(nx)
    edges = start + hours * np.arange(nt + 1.0)
    stamps = edges[1:] if kind == "sum" else edges[:-1] + {"start": 0.0, "middle": 0.5, "end": 1.0}[label] * hours
    lower = np.full(nt, edges[0]) if kind == "sum" else edges[:-1]
    values = truth.cumsum(axis=0) if kind == "sum" else truth
    values = values / (AMOUNTS[units] if kind != "rate" else RATES[units] * hours * 3600)
    order = draw(st.permutations(["time", "lat", "lon"]))
    time_units = f"hours since 1800-01-01{draw(st.sampled_from(['', ' 00:00:00', 'T00:00:00']))}"
    data = xr.Dataset(
        {"pr": (("time", "lat", "lon"), values, {"units": units}),
         "time_bnds": (("time", "nv"), np.stack([lower, edges[1:]], axis=1))},
        {"time": ("time", stamps, {"units": time_units, "calendar": calendar, "bounds": "time_bnds"}),
         "lat": ("lat", lat, {"units": "degrees_north"}),
         "lon": ("lon", lon % 360 if draw(st.booleans()) else lon, {"units": "degrees_east"})},
    )  # fmt: skip
    if draw(st.booleans()):
        data = data.isel(lat=slice(None, None, -1))
    if draw(st.booleans()):
        data["lat"].attrs, data["lon"].attrs = {}, {}
    data["pr"] = data["pr"].transpose(*order)
    driving = draw(st.sampled_from([(), (), (4, 7, 9)]))
    if driving:  # realizations: the rain once, twice and three times
        data["pr"] = xr.concat([data["pr"] * k for k in (1, 2, 3)], "number", combine_attrs="override").transpose(
            *draw(st.permutations(["number", *order]))
        )
        data["pr"].attrs["units"] = units
        data = data.assign_coords(number=("number", list(driving)))
    declared = {}
    damage = draw(st.sampled_from(DAMAGE))
    if damage == "no bounds" and draw(st.booleans()) and kind != "sum":
        declared["time_label"] = label
    return spoiled(data, damage, rng), Declared(**declared), damage, (truth, lat, lon, edges, calendar, hours, driving)


def spoiled(data, damage, rng):
    """Damage a dataset."""
    for part in (spoiled_values, spoiled_time, spoiled_bounds, spoiled_axes):
        data = part(data, damage, rng)
    return data


def spoiled_values(data, damage, rng):
    pr = data["pr"]
    if damage == "no units":
        del pr.attrs["units"]
    elif damage in ("odd units", "other units"):
        pr.attrs["units"] = str(
            rng.choice(["", "1", "K", "mm/3h", "bananas", "mm mm", "kg", "%", "m2", "Pa", "unknown"])
        )
    elif damage == "wrong name":
        rate = (
            "s-1" in pr.attrs["units"]
            or "/h" in pr.attrs["units"]
            or "day" in pr.attrs["units"]
            or "hr" in pr.attrs["units"]
        )
        pr.attrs["standard_name"] = "precipitation_amount" if rate else "precipitation_flux"
    elif damage in ("negative", "infinite", "fill", "all missing"):
        value = {"negative": -1e4, "infinite": np.inf, "fill": 1e20, "all missing": np.nan}[damage]
        where = np.ones(pr.shape, bool) if damage == "all missing" else rng.random(pr.shape) < 0.3
        where.flat[0] = True
        data["pr"] = pr.copy(data=np.where(where, value, pr.values))
    return data


def spoiled_time(data, damage, rng):
    time, attrs = data["time"].values, data["time"].attrs
    if damage == "time shuffled":
        data = data.assign_coords(time=("time", time[::-1], attrs))
    elif damage == "time doubled":
        data = data.assign_coords(time=("time", np.full_like(time, time[0]), attrs))
    elif damage == "time gap" and len(time) > 2:
        data = data.isel(time=[i for i in range(len(time)) if i != 1])
    elif damage == "time missing":
        data = data.assign_coords(time=("time", np.where(np.arange(len(time)) == 0, np.nan, time), attrs))
    elif damage == "no time units":
        del data["time"].attrs["units"]
    return data


def spoiled_bounds(data, damage, rng):
    if damage == "bounds reversed":
        data["time_bnds"] = data["time_bnds"].isel(nv=slice(None, None, -1))
    elif damage == "bounds empty":
        data["time_bnds"] = data["time_bnds"] * 0 + data["time"].values[0]
    elif damage == "bounds shifted":
        data["time_bnds"] = data["time_bnds"] + 1000.0
    elif damage == "no bounds":
        data = data.drop_vars("time_bnds")
        del data["time"].attrs["bounds"]
    return data


def spoiled_axes(data, damage, rng):
    if damage == "axis missing":
        data = data.drop_vars(str(rng.choice(["lat", "lon"])))
    elif damage == "axis unsorted" and data.sizes["lon"] > 2:
        data = data.assign_coords(lon=("lon", np.roll(data["lon"].values, 1), data["lon"].attrs))
    elif damage == "axis nan":
        data = data.assign_coords(lat=("lat", data["lat"].values * np.nan, data["lat"].attrs))
    elif damage == "axis uneven":
        data = data.assign_coords(
            lon=("lon", data["lon"].values[0] + np.arange(data.sizes["lon"]) ** 2.0, data["lon"].attrs)
        )
    elif damage == "latitudes off":
        data = data.assign_coords(lat=("lat", data["lat"].values + 160.0, data["lat"].attrs))
    elif damage == "wrong dims":
        data = data.rename(lat="station")
    elif damage == "empty":
        data = data.isel(time=slice(0, 0))
    return data


# Damage that may leave the rain as it was: with it, and without damage, the file must read, unless it has one row only.
HARMLESS = ("none",)


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(files())
def test_what_is_read_is_the_rain_or_the_file_is_refused(made):
    data, declared, damage, (truth, lat, lon, edges, calendar, hours, driving) = made
    try:
        decoded = patiently(lambda: xr.decode_cf(data, decode_timedelta=False), "the file")
        members = find(decoded, "pr", declared).read_all()
    except StsrError as e:
        assert len(str(e)) > 30
        assert "the coordinates cannot be read" not in str(e)  # what is in memory can: an error of the code
        assert damage not in HARMLESS or len(lat) == 1, f"refused though nothing is wrong: {e}"
        return
    assert [member.driving for member in members] == ([str(label) for label in driving] or [""])
    for times, coarse in enumerate(members, 1):
        check(coarse, damage, (times * truth, lat, lon, edges, calendar, hours))


def check(coarse, damage, expected):
    """Compare one driving member with the rain it was made of."""
    truth, lat, lon, edges, calendar, hours = expected
    begin = cftime.datetime(1800, 1, 1, calendar=calendar) + timedelta(hours=edges[0])
    if damage == "axis uneven":
        return  # other places than those of the rain: amounts are compared below for all others
    assert str(coarse.times.start)[:16] == begin.strftime("%Y-%m-%d %H:%M")
    assert coarse.times.step == timedelta(hours=hours)
    assert isinstance(coarse, Cube)
    assert coarse.amount.shape == truth.shape
    for i, y in enumerate(coarse.grid.y.centres):
        for j, x in enumerate(coarse.grid.x.centres):
            row = int(np.argmin(np.abs(lat - y)))
            column = int(np.argmin(np.abs((lon - x + 180) % 360 - 180)))
            assert abs(lat[row] - y) < 1e-6
            assert abs((lon[column] - x + 180) % 360 - 180) < 1e-6
            np.testing.assert_allclose(coarse.amount[:, i, j], truth[:, row, column], rtol=1e-4, atol=1e-4)
