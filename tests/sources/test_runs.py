"""Forecasts by starts and lead times, as cfgrib, the CDS and archives of forecasts write them."""

from datetime import datetime, timedelta

import cftime
import numpy as np
import pytest
import xarray as xr

from stsr_core.errors import SourceError
from stsr_core.sources.declared import Declared
from stsr_core.sources.harmonise import find
from tests.reading import read_coarse

RAIN = np.random.default_rng(0).gamma(0.5, 2.0, (2, 4, 3, 5))  # of two runs, 12 h apart
HOURS = np.arange(1, 5) * 3  # of their lead times
END = Declared(time_label="end")
START_OF = {"standard_name": "forecast_reference_time"}


def forecasts(run="time", lead="step", *, runs=2, dates=True, delta=False, named=START_OF, calendar="standard"):
    """Amounts of 3 hours along starts and lead times, with or without their valid times."""
    starts = xr.date_range("2001-01-01", periods=runs, freq="12h", calendar=calendar, use_cftime=calendar != "standard")
    leads = (lead, HOURS * np.timedelta64(3600, "s")) if delta else (lead, HOURS, {"units": "hours"})
    coords = {run: (run, starts, named), lead: leads, "lat": 43.0 + np.arange(3), "lon": 4.0 + np.arange(5)}
    data = xr.Dataset({"tp": ((run, lead, "lat", "lon"), RAIN[:runs], {"units": "mm"})}, coords)
    if not dates:
        return data
    valid = starts.values[:, None] + HOURS * np.timedelta64(3600, "s")
    return data.assign_coords(valid_time=((run, lead), valid, {"standard_name": "time"}))


SPELLINGS = [
    {},  # cfgrib
    {"run": "forecast_reference_time", "lead": "forecast_period"},  # CDS
    {"run": "init_time", "lead": "lead_time", "named": {}, "delta": True},
    {"dates": False, "delta": True},  # WeatherBench
    {"run": "forecast_initial_time", "lead": "forecast_hour", "dates": False, "named": {}},  # ERA5 of RDA
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_one_run_or_one_lead_time_of_several_is_selected_and_its_dates_are_start_plus_lead(spelling):
    data = forecasts(**spelling)
    run, lead = map(str, data["tp"].dims[:2])
    second = "6:00:00" if data[lead].dtype.kind == "m" else 6
    for declared in (END, Declared(time_label="end", select={lead: second})):  # 3 h are no amount of 12
        message = rf"{run} and {lead}: there are forecasts of several runs.*{run} \(2: 2001-01-01T00:00, 2001-01-01T12"
        with pytest.raises(SourceError, match=message):
            find(data, "tp", declared)
    cube = read_coarse(data, "tp", Declared(time_label="end", select={run: "2001-01-01T12:00"}))
    np.testing.assert_allclose(cube.amount, RAIN[1], rtol=1e-6)
    assert (cube.times.start, cube.times.step) == (datetime(2001, 1, 1, 12), timedelta(hours=3))
    cube = read_coarse(data, "tp", Declared(time_label="end", step_h=12.0, select={lead: second}), first_steps=1)
    np.testing.assert_allclose(cube.amount[0], RAIN[0, 1], rtol=1e-6)
    assert cube.times.start == datetime(2001, 1, 1, 6) - timedelta(hours=12)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_only_run_needs_no_selection(spelling):
    cube = read_coarse(forecasts(runs=1, **spelling), "tp", END)
    np.testing.assert_allclose(cube.amount, RAIN[0], rtol=1e-6)
    assert cube.times.start == datetime(2001, 1, 1)


def test_a_start_without_a_dimension_and_lead_times_give_dates_in_every_calendar():
    data = forecasts(dates=False, calendar="noleap").isel(time=1)
    assert read_coarse(data, "tp", END).times.start == cftime.DatetimeNoLeap(2001, 1, 1, 12)


def test_what_are_no_lead_times_give_no_dates():
    data = forecasts(dates=False, named={})
    for units in ("1", "months", "K"):
        data["step"].attrs["units"] = units
        with pytest.raises(SourceError, match="were found.*(none with dates|Choose one entry of the others)"):
            read_coarse(data, "tp", END)
