from datetime import date, datetime, timedelta

import cftime
import numpy as np
import pytest

from stsr_core.errors import SourceError
from stsr_core.grids import Axis, Grid, TimeAxis
from stsr_core.sources.cube import Cube
from stsr_core.sources.period import within

GRID = Grid(Axis(1.5, 1.0, 2), Axis(1.5, 1.0, 2))


def cube(start, step_h=6, size=12):
    amount = np.arange(size, dtype=np.float32)[:, None, None] * np.ones((1, 2, 2), np.float32)
    return Cube(amount, TimeAxis(start, timedelta(hours=step_h), size), GRID, {})


def test_whole_days_are_cut_out_the_last_one_included():
    cut = within(cube(datetime(2020, 1, 1)), date(2020, 1, 2), date(2020, 1, 3))
    assert cut.amount[:, 0, 0].tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert cut.times.start == datetime(2020, 1, 2)


def test_steps_that_reach_over_midnight_are_left_out():
    cut = within(cube(datetime(2020, 1, 1, 3)), date(2020, 1, 2), date(2020, 1, 2))
    assert cut.amount[:, 0, 0].tolist() == [4, 5, 6]  # 03-09, 09-15, 15-21; 21-03 reaches over


def test_calendars_without_leap_days():
    start = cftime.datetime(2020, 2, 28, calendar="noleap")
    cut = within(cube(start), date(2020, 3, 1), date(2020, 3, 1))
    assert cut.amount[:, 0, 0].tolist() == [4, 5, 6, 7]
    with pytest.raises(SourceError, match="no day of the source's calendar noleap"):
        within(cube(start), date(2020, 2, 29), date(2020, 2, 29))


def test_days_outside_the_source_are_refused():
    with pytest.raises(SourceError, match="covers 2020-01-01.* to 2020-01-04"):
        within(cube(datetime(2020, 1, 1)), date(2021, 1, 1), date(2021, 1, 2))
