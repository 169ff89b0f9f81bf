"""Whole days of a source."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import date, datetime, timedelta
from typing import TypeVar

import cftime

from stsr_core.errors import SourceError
from stsr_core.grids import TimeAxis
from stsr_core.sources.cube import Coarse

C = TypeVar("C", bound=Coarse)
ROUNDING = 1e-6  # steps


def within(coarse: C, first: date, last: date) -> C:
    """Return the steps that lie wholly within whole days of the source's calendar, `last` included.

    Raises:
        SourceError: no step does, or a day does not exist in the calendar.
    """
    start = max(0, math.ceil(_position(coarse.times, first) - ROUNDING))
    after = _position(coarse.times, last) + timedelta(days=1) / coarse.times.step
    stop = min(coarse.times.size, math.floor(after + ROUNDING))
    if stop <= start:
        bounds = coarse.times.bounds
        raise SourceError(
            f"The source has no step within {first} to {last}; it covers {bounds[0, 0]} to {bounds[-1, 1]}. "
            "Ask for days within that."
        )
    return replace(coarse, amount=coarse.amount[start:stop], times=coarse.times.isel(start, stop))


def _position(times: TimeAxis, day: date) -> float:
    """Steps from the start of an axis to the midnight that begins a day."""
    if not isinstance(times.start, cftime.datetime):
        return (datetime(day.year, day.month, day.day) - times.start) / times.step
    calendar = times.start.calendar
    try:
        midnight = cftime.datetime(day.year, day.month, day.day, calendar=calendar)
    except ValueError as e:
        raise SourceError(f"{day} is no day of the source's calendar {calendar}. Name another day.") from e
    return float((midnight - times.start) / times.step)
