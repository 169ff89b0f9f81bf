from datetime import date, datetime, timedelta

import cftime
import numpy as np
import pytest

from stsr_core.errors import SourceError
from stsr_core.grids import TimeAxis
from stsr_core.sources.period import within
from stsr_core.sources.times import Steps


def steps(start, step_h=6, size=12):
    axis = TimeAxis(start, timedelta(hours=step_h), size)
    return Steps(axis, np.arange(size), np.full(size, -1), np.full(size, step_h * 3600.0))


def test_whole_days_are_cut_out_the_last_one_included():
    cut = within(steps(datetime(2020, 1, 1)), date(2020, 1, 2), date(2020, 1, 3))
    assert cut.record.tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert cut.axis.start == datetime(2020, 1, 2)


def test_steps_that_reach_over_midnight_are_left_out():
    cut = within(steps(datetime(2020, 1, 1, 3)), date(2020, 1, 2), date(2020, 1, 2))
    assert cut.record.tolist() == [4, 5, 6]  # 03-09, 09-15, 15-21; 21-03 reaches over


def test_calendars_without_leap_days():
    start = cftime.datetime(2020, 2, 28, calendar="noleap")
    cut = within(steps(start), date(2020, 3, 1), date(2020, 3, 1))
    assert cut.record.tolist() == [4, 5, 6, 7]
    with pytest.raises(SourceError, match="no day of the source's calendar noleap"):
        within(steps(start), date(2020, 2, 29), date(2020, 2, 29))


def test_days_outside_the_source_are_refused():
    with pytest.raises(SourceError, match="covers 2020-01-01.* to 2020-01-04"):
        within(steps(datetime(2020, 1, 1)), date(2021, 1, 1), date(2021, 1, 2))
