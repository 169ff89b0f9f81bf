"""Time axes: each expected interval is written down by hand."""

from datetime import datetime, timedelta

import cftime
import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from stsr_core.errors import SourceError
from stsr_core.sources.declared import Declared
from stsr_core.sources.period import in_period
from stsr_core.sources.times import steps_of, with_written_times

DAY = datetime(2001, 1, 1)


def hours(*numbers):
    return [DAY + timedelta(hours=h) for h in numbers]


def bounds(*pairs):
    return [tuple(hours(a, b)) for a, b in pairs]


def summary(steps):
    first = (steps.axis.start - DAY) / timedelta(hours=1)
    return first, steps.axis.step / timedelta(hours=1), steps.axis.size, list(steps.record), list(steps.base)


@pytest.mark.parametrize(
    ("stamps", "pairs", "declared", "expected"),
    [
        # Plain intervals by bounds, stamped in the middle.
        ((3, 9), ((0, 6), (6, 12)), {}, (0, 6, 2, [0, 1], [-1, -1])),
        # Running sums since the start, by bounds: what is new in each is a difference.
        ((1, 2, 3), ((0, 1), (0, 2), (0, 3)), {}, (0, 1, 3, [0, 1, 2], [-1, 0, 1])),
        # A running sum that starts afresh.
        ((1, 2, 3, 4), ((0, 1), (0, 2), (2, 3), (2, 4)), {}, (0, 1, 4, [0, 1, 2, 3], [-1, 0, -1, 2])),
        # A running sum that begins with one over no time.
        ((0, 1, 2), ((0, 0), (0, 1), (0, 2)), {}, (0, 1, 2, [1, 2], [0, 1])),
        # Declared running sums: nobody says when the first began, so it is only subtracted.
        ((1, 2, 3), None, {"accumulated": "run"}, (1, 1, 2, [1, 2], [0, 1])),
        # Declared running sums of the day: 23-24 is a difference, 24-25 starts afresh.
        ((22, 23, 24, 25), None, {"accumulated": "day"}, (22, 1, 3, [1, 2, 3], [0, 1, -1])),
        # A file that begins at 00 h: its first record is all of the day before, which is no step.
        ((0, 1, 2), None, {"accumulated": "day"}, (0, 1, 2, [1, 2], [-1, 1])),
        # Declared labels.
        ((1, 2), None, {"time_label": "end"}, (0, 1, 2, [0, 1], [-1, -1])),
        ((1, 2), None, {"time_label": "start"}, (1, 1, 2, [0, 1], [-1, -1])),
        ((3,), None, {"time_label": "middle", "step_h": 6.0}, (0, 6, 1, [0], [-1])),
        # Bounds say more than a length that is declared alone.
        ((3, 9), ((0, 6), (6, 12)), {"step_h": 1.0}, (0, 6, 2, [0, 1], [-1, -1])),
        # Label and length together replace broken bounds.
        ((1, 2), ((0, 0), (0, 0)), {"time_label": "end", "step_h": 1.0}, (0, 1, 2, [0, 1], [-1, -1])),
    ],
)
def test_records_become_even_steps(stamps, pairs, declared, expected):
    given = None if pairs is None else bounds(*pairs)
    assert summary(steps_of(hours(*stamps), given, Declared(**declared))) == expected


@pytest.mark.parametrize(
    ("stamps", "pairs", "declared", "message"),
    [
        ((1, 2), None, {}, "Nothing says which time.*time_label"),
        ((1,), None, {"time_label": "end"}, "no length.*step_h"),
        ((1,), None, {"accumulated": "run"}, "whose start nobody states"),
        ((2, 1), None, {"time_label": "end"}, "not sorted"),
        ((1, 2, 4), None, {"time_label": "end"}, "uneven"),
        ((1, 2), ((0, 1), (0, 0)), {}, "have no length"),
        ((0, 1), ((0, 0), (1, 1)), {}, "have no length"),
        ((0,), ((0, 0),), {}, "have no length"),
        ((1, 5), ((0, 1), (1, 2)), {}, "lies outside its bounds"),
        ((1, 2, 4), ((0, 1), (1, 2), (3, 4)), {}, "ends at .* the next one starts at"),
        ((2, 3), ((0, 2), (1, 3)), {}, "ends at .* the next one starts at"),  # sums of the last two hours
        ((0, 6, 9, 12), None, {"accumulated": "run"}, "lasts 3:00:00, the first 6:00:00"),
        ((1, 3), ((0, 1), (1, 3)), {}, "lasts 2:00:00, the first 1:00:00"),
        ((1, 2, 5), ((0, 1), (0, 2), (0, 5)), {}, "lasts 3:00:00, the first 1:00:00"),
        ((1, 2), ((0, 1), (0, 2)), {"accumulated": "none"}, "those of a running sum.*declare `time_label:` and"),
        ((1, 2), None, {"accumulated": "day", "time_label": "start"}, "name the start .*leave `time_label:` out"),
    ],
)
def test_what_nobody_states_is_refused(stamps, pairs, declared, message):
    given = None if pairs is None else bounds(*pairs)
    with pytest.raises(SourceError, match=message):
        steps_of(hours(*stamps), given, Declared(**declared))


def test_stamps_of_running_sums_name_their_ends_wherever_they_lie_in_their_bounds():
    steps = steps_of(hours(0.5, 1, 1.5), bounds((0, 1), (0, 2), (0, 3)), Declared())
    assert list(steps.axis.labels) == [np.datetime64(h) for h in hours(1, 2, 3)]


@given(st.floats(0, 1), st.integers(1, 24))
def test_a_stamp_names_the_point_of_its_interval_that_it_is_nearest_to(share, length):
    start = DAY + timedelta(hours=5)
    stamp = start + timedelta(hours=length) * share
    axis = steps_of([stamp], [(start, start + timedelta(hours=length))], Declared()).axis
    distances = {"start": share, "middle": abs(share - 0.5), "end": 1 - share}
    assert distances[axis.label] == pytest.approx(min(distances.values()), abs=1e-6)


def test_files_with_times_of_their_own_keep_them_beside_a_variable_of_written_ones():
    data = xr.Dataset({"Times": ("time", ["2001-01-01_06:00:00", "x"])}, {"time": hours(1, 2)})
    assert with_written_times(data) is data


def test_a_period_keeps_whole_steps_of_the_calendar_of_the_source():
    start = cftime.Datetime360Day(2001, 2, 1)
    stamps = [start + timedelta(days=i) for i in range(60)]
    steps = in_period(steps_of(stamps, None, Declared(time_label="start")), ("2001-02-29", "2001-03-02"))
    assert [str(t)[:10] for t in steps.axis.labels] == ["2001-02-29", "2001-02-30", "2001-03-01"]
    np.testing.assert_array_equal(steps.record, [28, 29, 30])
    with pytest.raises(SourceError, match="No step lies between"):
        in_period(steps, ("2002-01-01", "2002-02-01"))
    with pytest.raises(SourceError, match="no date of the calendar"):
        in_period(steps, ("2001-13-01", "2002-02-01"))


@pytest.mark.parametrize(
    ("stamps", "hint"),
    [((0.5, 1.5, 2.5), True), ((12, 36), True), ((3, 9), True), ((1, 2, 3), False), ((0, 24), False), ((6, 30), False)],
)
def test_stamps_half_a_step_from_whole_ones_look_like_middles(stamps, hint):
    with pytest.raises(SourceError, match="Nothing says which time the stamp") as raised:
        steps_of(hours(*stamps), None, Declared())
    assert ("as middles do" in str(raised.value)) == hint


@pytest.mark.parametrize(
    ("label", "hourly", "three_hourly"),
    [("start", (1, 3), (8, 3)), ("middle", (0.5, 3), (9.5, 2)), ("end", (0, 4), (8, 3))],
)
def test_gaps_and_other_steps_outside_a_period_matter_to_nobody(label, hourly, three_hourly):
    stamps = hours(1, 2, 3, 4, 7, 8, 11, 14, 17)
    for period, length, (first, count) in ((("00", "04"), 1, hourly), (("08", "17"), 3, three_hourly)):
        days = (f"2001-01-01T{period[0]}:00", f"2001-01-01T{period[1]}:00")
        steps = steps_of(stamps, None, Declared(time_label=label, period=days))
        assert summary(steps)[:3] == (first, length, count)
    with pytest.raises(SourceError, match="uneven.* or declare the `period:` of a part without any"):
        steps_of(stamps, None, Declared(time_label=label))


def test_running_sums_are_read_in_a_period_of_even_steps():
    stamps = hours(1, 2, 3, 6, 9, 12)
    declared = Declared(accumulated="run", period=("2001-01-01T03:00", "2001-01-01T12:00"))
    steps = steps_of(stamps, None, declared)
    assert (steps.axis.size, steps.axis.step) == (3, timedelta(hours=3))
    assert steps.record.tolist() == [3, 4, 5]
    assert steps.base.tolist() == [2, 3, 4]
    with pytest.raises(SourceError, match="Declare the `period:` of a part"):
        steps_of(stamps, None, Declared(accumulated="run"))
