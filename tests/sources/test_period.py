from datetime import date, datetime, timedelta

import cftime
import numpy as np
import pytest

from stsr_core.errors import SourceError
from stsr_core.grids import TimeAxis
from stsr_core.sources.period import in_period, whole_days
from stsr_core.sources.times import Steps


def steps(start, step_h=6, size=12):
    axis = TimeAxis(start, timedelta(hours=step_h), size)
    return Steps(axis, np.arange(size), np.full(size, -1), np.full(size, step_h * 3600.0))


def test_whole_days_are_cut_out_the_last_one_included():
    cut = whole_days(steps(datetime(2020, 1, 1)), date(2020, 1, 2), date(2020, 1, 3))
    assert cut.record.tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert cut.axis.start == datetime(2020, 1, 2)


def test_steps_that_reach_over_midnight_are_left_out():
    cut = whole_days(steps(datetime(2020, 1, 1, 3)), date(2020, 1, 2), date(2020, 1, 2))
    assert cut.record.tolist() == [4, 5, 6]  # 03-09, 09-15, 15-21; 21-03 reaches over


def test_calendars_without_leap_days():
    start = cftime.datetime(2020, 2, 28, calendar="noleap")
    cut = whole_days(steps(start), date(2020, 3, 1), date(2020, 3, 1))
    assert cut.record.tolist() == [4, 5, 6, 7]
    with pytest.raises(SourceError, match="'2020-02-29' is no date of the calendar of the source .*noleap"):
        whole_days(steps(start), date(2020, 2, 29), date(2020, 2, 29))


def test_days_outside_the_source_are_refused():
    with pytest.raises(SourceError, match="no step within 2021-01-01 to .*covers 2020-01-01.* to 2020-01-04"):
        whole_days(steps(datetime(2020, 1, 1)), date(2021, 1, 1), date(2021, 1, 2))


@pytest.mark.parametrize(
    ("start", "step_h", "size", "kept"),
    [
        (datetime(2020, 1, 1), 6, 12, 12),
        (datetime(2020, 1, 1, 6), 6, 11, 11),  # running sums without their first stamp
        (datetime(2020, 1, 1), 6, 11, 11),
        (datetime(2020, 1, 1, 12), 6, 10, None),
        (datetime(2020, 1, 1), 6, 10, None),
        (datetime(2019, 12, 31, 6), 24, 4, 2),  # days from 06 h; two reach over midnight
        (datetime(2020, 1, 1, 6), 24, 2, 2),
        (datetime(2020, 1, 1), 24, 3, 3),
        (datetime(2020, 1, 2), 24, 2, None),  # one step, but a day
        (datetime(2020, 1, 1), 24, 2, None),
        (cftime.datetime(2020, 1, 1, 6, calendar="360_day"), 6, 11, 11),
        (cftime.datetime(2020, 1, 1, 12, calendar="360_day"), 6, 100, None),
        (datetime(2019, 12, 31), 48, 3, 1),  # two of the steps reach beyond the days
        (datetime(2020, 1, 2), 48, 3, None),
    ],
)
def test_days_of_which_the_source_has_a_part_are_refused(start, step_h, size, kept):
    if kept is not None:
        assert whole_days(steps(start, step_h, size), date(2020, 1, 1), date(2020, 1, 3)).axis.size == kept
        return
    with pytest.raises(SourceError, match="only a part of 2020-01-01 to 2020-01-03; it covers .*Ask for days within"):
        whole_days(steps(start, step_h, size), date(2020, 1, 1), date(2020, 1, 3))


@pytest.mark.parametrize("calendar", ["standard", "noleap", "360_day"])
@pytest.mark.parametrize(
    ("period", "records"),
    [
        (("2001-01-01", "2001-01-02"), [0, 1, 2, 3]),
        (("2001-01-01T06:00", "2001-01-01 18"), [1, 2]),
        (("2001-01-01T05", "2001-01-01T19"), [1, 2]),
        (("2001-01-01T07", "2001-01-02T05"), [2, 3]),
        (("2001-01-01T06:00Z", "2001-01-01T18:00Z"), [1, 2]),
        (("2001-01-01T06:00+06:00", "2001-01-01T18:00-06:00"), [0, 1, 2, 3]),
        (("2001-01-02T02:00+02:00", "2001-01-02T10:00:00+02:00"), [4]),
    ],
)
def test_periods_have_hours_and_offsets_from_utc_in_every_calendar(calendar, period, records):
    start = datetime(2001, 1, 1) if calendar == "standard" else cftime.datetime(2001, 1, 1, calendar=calendar)
    assert in_period(steps(start), period).record.tolist() == records


def test_periods_name_days_of_the_calendar():
    start = cftime.datetime(2001, 2, 29, calendar="360_day")
    assert in_period(steps(start), ("2001-02-30", "2001-03-01")).record.tolist() == [4, 5, 6, 7]
    for text in ("2001-01-31", "2001-01-30T25:00", "2001-01"):
        with pytest.raises(SourceError, match=f"'{text}' is no date of the calendar .*Name another, as 2001-12-31"):
            in_period(steps(start), (text, "2001-03-01"))
