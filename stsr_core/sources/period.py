"""Periods: the steps of a source that lie between dates, in its calendar."""

from __future__ import annotations

import math
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING

import cftime

from stsr_core.errors import SourceError

if TYPE_CHECKING:
    from stsr_core.grids import TimeAxis
    from stsr_core.sources.times import Steps, Time

ROUNDING = 1e-6  # steps
DAY = len("2001-12-31")
ANY_DAY = datetime(2001, 1, 1)  # of this calendar, to read a time of day off


def whole_days(steps: Steps, first: date, last: date) -> Steps:
    """Return the steps that lie wholly within whole days of the source's calendar, `last` included.

    At either end of the days one step may be missing, as of running sums without their first stamp, but no day.

    Raises:
        SourceError: the source lacks more, no step lies within, or a day does not exist in the calendar.
    """
    axis, day = steps.axis, timedelta(days=1) / steps.axis.step
    before, after = ((moment(str(midnight), axis.start) - axis.start) / axis.step for midnight in (first, last))
    after += day
    start, stop = max(0, math.ceil(before - ROUNDING)), min(axis.size, math.floor(after + ROUNDING))
    missing = max(-before, after - axis.size)
    if stop <= start or missing > min(1 + ROUNDING, day - ROUNDING):
        raise SourceError(
            f"The source has {'no step within' if stop <= start else 'only a part of'} {first} to {last}; it covers "
            f"{axis.start} to {axis.start + axis.step * axis.size}. Ask for days within that."
        )
    return steps.within(start, stop)


def in_period(steps: Steps, period: tuple[str, str]) -> Steps:
    """Return the steps that lie wholly in a period of ISO dates or dates and times, in the calendar of the steps.

    Raises:
        SourceError: dates that are none, or no step between them.
    """
    axis = steps.axis
    first, stop = overlap(axis, period)
    if stop <= first:
        raise SourceError(
            f"No step lies between {period[0]} and {period[1]}; the source runs from {axis.start} to "
            f"{axis.start + axis.step * axis.size}. Change `period:` of the source in catalog.yaml."
        )
    return steps.within(first, stop)


def overlap(axis: TimeAxis, period: tuple[str, str]) -> tuple[int, int]:
    """First step that lies wholly in a period, and that after the last; there are none where it is not less.

    Raises:
        SourceError: dates that are none.
    """
    low, high = ((moment(text, axis.start) - axis.start) / axis.step for text in period)
    return max(0, math.ceil(low - ROUNDING)), min(axis.size, math.floor(high + ROUNDING))


def moment(text: str, like: Time) -> Time:
    """The moment that a date, or a date and time of day, names in the calendar of the source; UTC, as its steps are."""
    try:
        if not isinstance(like, cftime.datetime):
            return _in_utc(datetime.fromisoformat(text))
        day = cftime.datetime.strptime(text[:DAY], "%Y-%m-%d", calendar=like.calendar)
        return day + (_in_utc(datetime.fromisoformat(f"{ANY_DAY.date()}{text[DAY:]}")) - ANY_DAY)
    except ValueError as e:
        raise SourceError(
            f"{text!r} is no date of the calendar of the source ({e}). Name another, as 2001-12-31 or 2001-12-31T06:00."
        ) from e


def _in_utc(moment: datetime) -> datetime:
    return moment if moment.tzinfo is None else moment.astimezone(UTC).replace(tzinfo=None)
