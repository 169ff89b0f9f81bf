"""Time: stamps, bounds and declarations become even steps, and what has to be subtracted from what."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeVar

import cftime
import numpy as np

from stsr_core.errors import SourceError
from stsr_core.grids import BEFORE, TimeAxis, TimeLabel
from stsr_core.sources.declared import Declared
from stsr_core.sources.period import moment

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

Time: TypeAlias = datetime | cftime.datetime
Record = TypeVar("Record")
START = "forecast_reference_time"
VALID = "valid_time"  # name of dates that are start plus lead
ABSOLUTE = "day as %Y%m%d.%f"  # units that CDO and ICON give to dates written as numbers, such as 20500131.5
WRITTEN, WRITTEN_AS = "Times", "%Y-%m-%d_%H:%M:%S"  # variable of WRF files, and the dates that it holds
STANDARD = ("standard", "gregorian", "proleptic_gregorian")
MEND_GAP = (
    "Fill the gap with missing steps, or declare the `period:` of a part without any of the source in catalog.yaml, "
    "or by --declare."
)
MIDDLES = "They lie half a step from whole multiples of it, as middles do."
SECOND, MINUTE = timedelta(seconds=1), timedelta(minutes=1)


@dataclass(frozen=True)
class Interval:
    """What one record of a file holds: an amount over a stretch of time; `start` is None where nobody says it."""

    start: Time | None
    end: Time


class _Piece(NamedTuple):
    """A step from records: the amount of `record`, less that of `base` where it is not -1."""

    start: Time
    end: Time
    record: int
    base: int

    @property
    def length(self) -> timedelta:
        length: timedelta = self.end - self.start
        return length


@dataclass(frozen=True)
class Steps:
    """Even steps made of records.

    Attributes:
        axis: the steps.
        record: record that each step ends with, (T,).
        base: record to subtract from it, (T,); -1 where there is none.
        record_seconds: length of every record of the file, (records,), float64; NaN where nobody says it.
    """

    axis: TimeAxis
    record: NDArray[np.int64]
    base: NDArray[np.int64]
    record_seconds: NDArray[np.float64]

    @property
    def differenced(self) -> bool:
        """Whether any step is a difference of records."""
        return bool((self.base >= 0).any())

    def within(self, first: int, stop: int) -> Steps:
        """Return steps first..stop."""
        return Steps(self.axis.isel(first, stop), self.record[first:stop], self.base[first:stop], self.record_seconds)


def has_dates(coordinate: xr.DataArray) -> bool:
    """Whether a coordinate holds dates."""
    return bool(np.issubdtype(coordinate.dtype, np.datetime64)) or (
        coordinate.dtype == object and coordinate.size > 0 and hasattr(coordinate.values.flat[0], "calendar")
    )


def is_start(coordinate: xr.DataArray) -> bool:
    """Whether a coordinate is known to hold when forecasts started, which is no time of their values."""
    return str(coordinate.attrs.get("standard_name", "")) == START


def is_time(coordinate: xr.DataArray) -> bool:
    """Whether a coordinate holds times of values, or claims to."""
    named = coordinate.name == "time" or (coordinate.ndim == 1 and coordinate.attrs.get("standard_name") == "time")
    return not is_start(coordinate) and (named or has_dates(coordinate))


def times_among(coordinates: Iterable[xr.DataArray], dims: Sequence[Hashable]) -> list[str]:
    """Names of coordinates that may hold the times of steps, the likeliest first: a 1-D one before a scalar one."""
    found = {str(c.name): c.ndim == 0 for c in coordinates if c.ndim <= 1 and is_time(c)}
    return sorted(found, key=lambda n: (found[n], n != VALID, n not in dims, n != "time"))


def with_time_named(dataset: xr.Dataset) -> xr.Dataset:
    """Name the times of steps `time`, as files are joined along it, where they are called otherwise, as in ERA5.

    What was called `time`, the start of a forecast of one step, is START then.
    """
    names = times_among((dataset[n] for n in dataset.coords), tuple(dataset.dims))
    if "time" in dataset.dims or not names or names[0] == "time" or dataset[names[0]].dims not in ((), (names[0],)):
        return dataset
    return dataset.rename(({"time": START} if "time" in dataset.coords else {}) | {names[0]: "time"})


def is_lead(coordinate: xr.DataArray) -> bool:
    """Whether a coordinate is known to hold how long after its start a forecast is for."""
    return str(coordinate.attrs.get("standard_name", "")) == "forecast_period"


def stamps_of(coordinate: xr.DataArray) -> list[Time]:
    """Dates of a time coordinate, as `datetime` (standard calendars) or cftime objects, to the millisecond.

    Raises:
        SourceError: numbers without CF units, or missing stamps.
    """
    values, units = coordinate.values.ravel(), str(coordinate.attrs.get("units", ""))
    calendar = str(coordinate.attrs.get("calendar", STANDARD[0]))
    if units == ABSOLUTE:
        return [_date_of(float(number), calendar) for number in values]
    if np.issubdtype(values.dtype, np.datetime64):
        if np.isnat(values).any():
            raise SourceError("The time axis holds missing stamps. Every step needs its time.")
        return [_rounded(t) for t in values.astype("datetime64[us]").astype(datetime)]
    if values.dtype == object and all(isinstance(v, cftime.datetime) for v in values):
        return [_rounded(t) for t in values]
    written = f" in {units!r} of the calendar {calendar}" if units else ""
    raise SourceError(
        f"The time axis holds {values.dtype} values{written}, not dates. Give it CF units such as 'hours since "
        "2000-01-01', and a calendar that CF knows."
    )


def with_written_times(dataset: xr.Dataset) -> xr.Dataset:
    """Give a dataset the time axis that its variable Times writes in characters, as every WRF file does.

    Raises:
        SourceError: characters that are no date.
    """
    written = dataset.get(WRITTEN)
    if written is None or written.ndim != 1 or written.dtype.kind not in "SUO" or "time" in dataset.variables:
        return dataset  # the axis of other files that have such a variable is their own
    stamps = [_date_written(v.decode() if isinstance(v, bytes) else str(v)) for v in written.values]
    along = dataset.drop_vars(WRITTEN).rename({str(written.dims[0]): "time"})
    return along.assign_coords(time=("time", np.array(stamps, "datetime64[ns]"), {"axis": "T"}))


def _date_written(text: str) -> datetime:
    try:
        return datetime.strptime(text, WRITTEN_AS)
    except ValueError as e:
        raise SourceError(f"{WRITTEN} holds {text!r}; dates such as 2001-01-31_06:00:00 are needed. Mend it.") from e


def _rounded(time: Time) -> Time:
    """A time without the rounding errors of files that count fractions of days."""
    if time.microsecond % 1000 == 0:
        return time  # most are, and there are many
    return time + timedelta(microseconds=1000 * round(time.microsecond / 1000) - time.microsecond)


def _date_of(number: float, calendar: str) -> Time:
    day, share = divmod(number, 1.0)
    parts = int(day) // 10_000, int(day) // 100 % 100, int(day) % 100
    try:
        midnight = datetime(*parts) if calendar in STANDARD else cftime.datetime(*parts, calendar=calendar)
    except ValueError as e:
        raise SourceError(f"The time axis holds {number:.10g}, which is no {ABSOLUTE} of calendar {calendar}.") from e
    return midnight + timedelta(seconds=round(86_400 * share))


def steps_of(stamps: Sequence[Time], bounds: list[tuple[Time, Time]] | None, declared: Declared) -> Steps:
    """Even steps of a time axis, by its bounds, else by what is declared; never by a guess.

    Raises:
        SourceError: stamps that do not increase, uneven steps, gaps, or an interval that nobody states.
    """
    check_increasing(stamps)
    complete = declared.time_label is not None and declared.step_h is not None
    if declared.accumulated in ("run", "day"):
        if declared.time_label not in (None, "end"):
            raise SourceError(
                f"Sums since the start of the {declared.accumulated} are declared, and stamps that name the "
                f"{declared.time_label} of their time. A running sum ends at its stamp: leave `time_label:` out."
            )
        return _joined(_accumulated(stamps, declared.accumulated), "end", declared.period)
    if bounds is not None and not complete:
        _check_bounds(stamps, bounds)
        if declared.accumulated == "none":
            _check_no_sums(bounds)
        intervals = [Interval(start, end) for start, end in bounds]
        return _joined(intervals, _label(stamps[-1], *bounds[-1]), declared.period)
    return _from_stamps(stamps, declared)


def _from_stamps(stamps: Sequence[Time], declared: Declared) -> Steps:
    if declared.time_label is None:
        raise SourceError(
            f"Nothing says which time the stamp {stamps[0]} stands for: there are no time bounds. Declare "
            f"`time_label: start`, `middle` or `end` of the source in catalog.yaml, or by --declare.{_hint(stamps)}"
        )
    inside = _in_period(stamps, declared.period, lambda stamp: (stamp, stamp))
    read = inside if len(inside) > 1 else stamps
    if declared.step_h is not None:
        step = timedelta(hours=declared.step_h)
    elif len(read) < 2:
        raise SourceError(
            "One time step without time bounds has no length. Declare `step_h:` of the source in catalog.yaml, or by "
            "--declare."
        )
    else:
        step = read[1] - read[0]
    starts = [s - step * BEFORE[declared.time_label] for s in stamps]
    intervals = [Interval(s, s + step) for s in starts]
    _check_even(read, step)
    return _joined(intervals, declared.time_label, declared.period)


def _hint(stamps: Sequence[Time]) -> str:
    """What the stamps suggest that they stand for; nothing where they may stand for anything."""
    if len(stamps) < 2:
        return ""
    step, since = stamps[1] - stamps[0], stamps[0] - stamps[0].replace(hour=0, minute=0, second=0, microsecond=0)
    return f" {MIDDLES}" if 2 * (since % step) == step else ""


def _accumulated(stamps: Sequence[Time], since: str) -> list[Interval]:
    """Intervals of running sums: since an unknown start of the run, or since 00 h of the day."""
    if since == "run":
        return [Interval(None, s) for s in stamps]
    return [Interval(_midnight_before(s), s) for s in stamps]


def _midnight_before(stamp: Time) -> Time:
    midnight = stamp.replace(hour=0, minute=0, second=0, microsecond=0)
    return midnight if midnight < stamp else midnight - timedelta(days=1)


def _in_period(
    records: Sequence[Record], period: tuple[str, str] | None, spans: Callable[[Record], tuple[Time, Time]]
) -> Sequence[Record]:
    """Records that lie wholly in a period, so that gaps elsewhere matter to nobody; all where none do."""
    if period is None:
        return records
    low, high = (moment(text, spans(records[0])[0]) for text in period)
    return [r for r in records if low <= spans(r)[0] and spans(r)[1] <= high] or records


def _joined(intervals: list[Interval], label: TimeLabel, period: tuple[str, str] | None) -> Steps:
    """Subtract what began at the same time, keep what follows on; in the period it must be even and without gaps."""
    pieces: list[_Piece] = []
    for i, now in enumerate(intervals):
        before = intervals[i - 1] if i else None
        if before is not None and now.start == before.start:
            pieces.append(_Piece(before.end, now.end, i, i - 1))
        elif now.start is not None and now.start < now.end:
            pieces.append(_Piece(now.start, now.end, i, -1))
    sums = any(piece.base >= 0 for piece in pieces)
    if len(pieces) > 1 and sums and pieces[0].base < 0 and pieces[0].length > pieces[1].length:
        pieces = pieces[1:]  # a running sum whose earlier part is not in the file is no amount of a step
    if not pieces:
        raise SourceError(
            "One running sum whose start nobody states is no amount of a step. Give at least two time steps."
        )
    pieces = list(_in_period(pieces, period, lambda piece: (piece.start, piece.end)))
    if any(piece.base >= 0 for piece in pieces):
        label = "end"
    _check_chain(pieces)
    axis = TimeAxis(pieces[0].start, pieces[0].length, len(pieces), label)
    seconds = np.array([np.nan if i.start is None else (i.end - i.start).total_seconds() for i in intervals])
    return Steps(axis, np.array([p.record for p in pieces]), np.array([p.base for p in pieces]), seconds)


def _check_chain(pieces: list[_Piece]) -> None:
    step = pieces[0].length
    for i, piece in enumerate(pieces):
        if piece.length != step:
            raise SourceError(
                f"Step {i} ({piece.start} to {piece.end}) lasts {piece.length}, the first {step}. Even steps are "
                "needed: months, and forecasts that change their cadence, have none. Declare the `period:` of a part "
                "that has them, of the source in catalog.yaml, or by --declare."
            )
    for before, after in itertools.pairwise(pieces):
        if after.start != before.end:
            raise SourceError(
                f"A step ends at {before.end} and the next one starts at {after.start}. Intervals without gap or "
                f"overlap are needed. {MEND_GAP}"
            )


def check_increasing(stamps: Sequence[Time]) -> None:
    """Refuse stamps that do not increase; raises SourceError."""
    for before, after in itertools.pairwise(stamps):
        if after <= before:
            raise SourceError(f"The time axis is not sorted: {after} comes after {before}. Sort it, drop duplicates.")


def _check_even(stamps: Sequence[Time], step: timedelta) -> None:
    for before, after in itertools.pairwise(stamps):
        if after - before != step:
            raise SourceError(
                f"The time axis is uneven: {before} to {after} is not {step} like the first step. Even steps are "
                f"needed, which months are not. {MEND_GAP}"
            )


def _check_bounds(stamps: Sequence[Time], bounds: list[tuple[Time, Time]]) -> None:
    if len(bounds) > 1 and bounds[0][0] == bounds[0][1] == bounds[1][0]:
        stamps, bounds = stamps[1:], bounds[1:]  # running sums may begin with one over no time
    apart = "" if len(stamps) < 2 else f" {(stamps[1] - stamps[0]) / timedelta(hours=1):g}"
    for stamp, (start, end) in zip(stamps, bounds, strict=True):
        if end <= start:
            raise SourceError(
                f"Time bounds {start} to {end} have no length. Mend them, or declare `time_label:` and "
                f"`step_h:{apart}` of the source in catalog.yaml, or by --declare, which then replace them."
            )
        if timedelta(0) < (short := -(end - start) % MINUTE) <= SECOND:
            hours = (end - start + short) / timedelta(hours=1)
            raise SourceError(
                f"Time bounds {start} to {end} leave out the last second. If steps last {hours:g} h, declare "
                f"`time_label: {_label(stamp, start, end)}` and `step_h: {hours:g}` of the source in catalog.yaml, or "
                "by --declare, which then replace them."
            )
        if not start <= stamp <= end:
            raise SourceError(
                f"The time {stamp} lies outside its bounds {start} to {end}. Mend the bounds, or declare `time_label:` "
                f"and `step_h:{apart}` of the source in catalog.yaml, or by --declare, which then replace them."
            )


def _check_no_sums(bounds: list[tuple[Time, Time]]) -> None:
    """Refuse bounds of running sums where amounts per step are declared."""
    for before, after in itertools.pairwise(bounds):
        if before[0] == after[0]:
            raise SourceError(
                f"Amounts per step are declared (`accumulated: none`), but time bounds {before[0]} to {before[1]} and "
                f"{after[0]} to {after[1]} are those of a running sum. If the values are amounts per step, declare "
                "`time_label:` and `step_h:` too, which replace the bounds; else leave `accumulated:` out."
            )


def _label(stamp: Time, start: Time, end: Time) -> TimeLabel:
    offset = (stamp - start) / (end - start)
    return "start" if offset < 0.25 else "middle" if offset < 0.75 else "end"
