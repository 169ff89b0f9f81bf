"""GRIB 1 and 2 with eccodes: messages become lazy variables with time bounds, which GRIB states for every message."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from xarray.backends import BackendArray
from xarray.core import indexing

from stsr_core.errors import SourceError
from stsr_core.sources.messages import MessageFile

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

MISSING = 1e35
GRID_KEYS = ("gridType", "Ni", "Nj", "Nx", "Ny", "md5GridSection")
CELL_METHODS = {"instant": "time: point", "avg": "time: mean", "accum": "time: sum"}  # by the GRIB step type
REDUCED = ("reduced_gg", "reduced_ll")  # rows of different lengths
EITHER_WAY = ("regular_ll", "rotated_ll", "regular_gg", "rotated_gg", *REDUCED)  # eccodes places them in any order
NORTHEAST = ("lambert", "polar_stereographic", "mercator")  # of these it counts points northward and eastward only
LEFT_OUT = "left_out"  # attribute: why variables of the file are not in the dataset
PACKING_STEP = "packing_step"  # attribute: distance of the numbers that the packing of a variable can tell apart
UNIT_STEPS = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "s": timedelta(seconds=1), "D": timedelta(days=1)}


@dataclass(frozen=True)
class Message:
    """Where a message is in the file, and what it holds."""

    offset: int
    length: int
    name: str
    title: str
    units: str
    standard_name: str
    run: datetime
    start: datetime
    end: datetime
    member: int
    level: str
    kind: str
    grid: tuple[object, ...]
    shape: tuple[int, ...]
    columns_first: bool
    zigzag: bool
    southwest: bool
    packing_error: float


def open_grib(file: MessageFile) -> xr.Dataset:
    """Open a GRIB file; values are read message by message when they are asked for.

    Returns:
        Variables (member, time, y, x), or (member, time, cell) on reduced grids, without member where there is one,
        named by their short name, with `time` at the end of its interval and `time_bnds` where the messages span time.
        Variables that make no array, or none along the times and places of those that span time, are left out; the
        attribute LEFT_OUT says why.

    Raises:
        SourceError: no GRIB messages, or none of one variable that make an array.
        WholeFileNeeded: it cannot be read in parts.
    """
    import xarray as xr

    groups: dict[str, list[Message]] = {}
    for offset, handle in file.headers():
        message = _message(offset, handle)
        groups.setdefault(message.name, []).append(message)
    if not groups:
        raise SourceError(f"{file.name} holds no GRIB message. Fetch it again.")
    data, left_out = xr.Dataset(), {}
    for name, found in sorted(groups.items(), key=lambda group: all(m.kind == "instant" for m in group[1])):
        try:
            data = xr.merge([data, _variable(file, name, found)], compat="equals", join="exact")
        except SourceError as e:
            left_out[name] = str(e)
        except ValueError:  # of xarray
            left_out[name] = f"{name!r} has other times, members or places than {', '.join(map(str, data.data_vars))}."
    if not data.data_vars:
        raise SourceError(next(iter(left_out.values())))
    return data.assign_attrs({LEFT_OUT: left_out} if left_out else {})


def _key(handle: int, key: str, default: Any = None) -> Any:
    import eccodes

    try:
        return eccodes.codes_get(handle, key)
    except eccodes.CodesInternalError:
        return default


def _size(handle: int, *keys: str) -> int:
    """Size of an axis; 0 where it has none, which GRIB writes as a number of all ones."""
    found = next((int(n) for n in (_key(handle, key) for key in keys) if n), 0)
    return found if found < 10**7 else 0


def _message(offset: int, handle: int) -> Message:
    reference = datetime.strptime(f"{_key(handle, 'dataDate'):08d}{_key(handle, 'dataTime'):04d}", "%Y%m%d%H%M")
    start, end = (reference + _step(handle, key) for key in ("startStep", "endStep"))
    shape: tuple[int, ...] = (_size(handle, "Nj", "Ny"), _size(handle, "Ni", "Nx"))
    if 0 in shape:
        shape = (int(_key(handle, "numberOfPoints", 0)),)
    return Message(
        offset=offset,
        length=int(_key(handle, "totalLength")),
        name=str(_key(handle, "shortName", "unknown")),
        title=str(_key(handle, "name", "unknown")),
        units=str(_key(handle, "units", "unknown")),
        standard_name=str(_key(handle, "cfName", "unknown")),
        run=reference,
        start=start,
        end=end,
        level=f"{_key(handle, 'typeOfLevel')} {_key(handle, 'level')}",
        kind=str(_key(handle, "stepType", "")),
        member=int(_key(handle, "perturbationNumber", 0)),
        grid=tuple(_key(handle, k) for k in GRID_KEYS),
        shape=shape,
        columns_first=bool(_key(handle, "jPointsAreConsecutive", 0)),
        zigzag=bool(_key(handle, "alternativeRowScanning", 0)),
        southwest=bool(_key(handle, "iScansNegatively", 0)) or not _key(handle, "jScansPositively", 1),
        packing_error=float(_key(handle, "packingError", 0.0) or 0.0),
    )


def _step(handle: int, key: str) -> timedelta:
    """A forecast step; newer eccodes writes units that are not hours behind the number."""
    import eccodes

    text = eccodes.codes_get_string(handle, key)
    if text[-1:] in UNIT_STEPS:
        return int(text[:-1]) * UNIT_STEPS[text[-1]]
    units = str(_key(handle, "stepUnits", 1))
    minutes = {"0": 1, "m": 1, "1": 60, "h": 60, "10": 180, "11": 360, "12": 720, "2": 1440, "13": 1 / 60, "s": 1 / 60}
    if units not in minutes:
        raise SourceError(f"Forecast steps in GRIB units {units!r} are not understood. Hours or minutes are needed.")
    return timedelta(minutes=int(text) * minutes[units])


def _variable(file: MessageFile, name: str, messages: list[Message]) -> xr.Dataset:
    import xarray as xr

    messages = _one_sum_each(file, sorted(_spanning(messages), key=lambda m: (m.member, m.end, m.start)))
    if len({(m.grid, m.units, m.level) for m in messages}) > 1:
        raise SourceError(f"Messages of {name!r} have several grids, levels or units. Split the file.")
    members, ends = sorted({m.member for m in messages}), sorted({m.end for m in messages})
    if len(messages) != len(members) * len(ends):
        raise SourceError(
            f"{len(messages)} messages of {name!r} are no array of {len(members)} members and {len(ends)} times: "
            "some are missing, or there are several levels or runs. Split the file."
        )
    first = messages[0]
    coordinates, dims = _coordinates(file, first)
    packing = max(m.packing_error for m in messages)
    attributes: dict[str, object] = {"units": first.units, PACKING_STEP: 2 * packing}
    if first.title != "unknown":
        attributes["long_name"] = first.title
    if first.standard_name != "unknown":
        attributes["standard_name"] = first.standard_name
    if first.kind in CELL_METHODS:
        attributes["cell_methods"] = CELL_METHODS[first.kind]
    lazy = indexing.LazilyIndexedArray(_Values(file, messages, (len(members), len(ends), *first.shape)))
    variable = xr.Variable(("member", "time", *dims), lazy, attributes)
    data = xr.Dataset({name: variable}, {"member": members, "time": np.array(ends, "datetime64[ns]"), **coordinates})
    spans = [(m.start, m.end) for m in messages[: len(ends)]]
    over_no_time = [m.kind == "accum" and m.start == m.end == m.run for m in messages[: len(ends)]]
    if all(a < b or none for (a, b), none in zip(spans, over_no_time, strict=True)):
        data["time_bnds"] = (("time", "nv"), np.array(spans, "datetime64[ns]"))
        data["time"].attrs["bounds"] = "time_bnds"
    return data.isel(member=0, drop=True) if len(members) == 1 else data


def _spanning(messages: list[Message]) -> list[Message]:
    """Leave out what spans no time where others do: the sums that forecasts begin with, rates beside mean rates."""
    return [m for m in messages if m.start < m.end] or messages


def _one_sum_each(file: MessageFile, messages: list[Message]) -> list[Message]:
    """One message for each member and end; of sums of one run that end together, the longest.

    Forecasts such as GFS hold both the sum since the start and the sum since the last reset, and where these are the
    same one twice. Others that end together are kept, to be refused.
    """
    kept: list[Message] = []
    for message in messages:
        before = kept[-1] if kept else None
        if (
            before is None
            or message.start == message.end
            or (message.member, message.end, message.run, message.level, message.kind)
            != (before.member, before.end, before.run, before.level, before.kind)
            or (message.start == before.start and not _same(file, before, message))
        ):
            kept.append(message)
    return kept


def _same(file: MessageFile, one: Message, other: Message) -> bool:
    return np.array_equal(_values(file, one), _values(file, other), equal_nan=True)


def _coordinates(file: MessageFile, message: Message) -> tuple[dict[str, Any], tuple[str, ...]]:
    """1-D latitudes and longitudes where they make a grid, else 2-D ones, which hold for any projection.

    Reduced grids have cells with outlines.
    """
    import eccodes

    kind = message.grid[0]
    without_outlines = SourceError(
        f"{file.name} has a grid of type {kind}, whose cells have no outlines in GRIB. Regrid the file first."
    )
    with file.message(message.offset, message.length) as handle:
        try:
            latitude, longitude = (eccodes.codes_get_double_array(handle, k) for k in ("latitudes", "longitudes"))
        except eccodes.CodesInternalError as e:  # of ICON's own grids, whose places are in another file
            raise without_outlines from e
        is_global = bool(_key(handle, "global", 0))
    north, east = (
        {"units": "degrees_north", "standard_name": "latitude"},
        {"units": "degrees_east", "standard_name": "longitude"},
    )
    if kind in REDUCED and latitude.size == np.prod(message.shape):
        south_north, west_east = _outlines(latitude, longitude, to_poles=is_global)
        return {
            "latitude": ("cell", latitude, {**north, "bounds": "latitude_bnds"}),
            "longitude": ("cell", longitude, {**east, "bounds": "longitude_bnds"}),
            "latitude_bnds": (("cell", "corner"), south_north),
            "longitude_bnds": (("cell", "corner"), west_east),
        }, ("cell",)
    if (message.columns_first and kind not in EITHER_WAY) or (message.southwest and kind in NORTHEAST):
        raise SourceError(
            f"{file.name} has a grid of type {kind} whose points run southward, westward or column by column, and "
            "eccodes would misplace them. Regrid the file first."
        )
    if len(message.shape) == 1 or latitude.size != np.prod(message.shape) or message.shape[0] == 1:
        raise without_outlines
    latitude, longitude = (_shaped(v, message) for v in (latitude, longitude))
    if (latitude == latitude[:, :1]).all() and (longitude == longitude[:1]).all():
        return {
            "latitude": ("latitude", latitude[:, 0], north),
            "longitude": ("longitude", longitude[0], east),
        }, ("latitude", "longitude")
    return {"latitude": (("y", "x"), latitude, north), "longitude": (("y", "x"), longitude, east)}, ("y", "x")


def _outlines(
    latitude: NDArray[np.float64], longitude: NDArray[np.float64], *, to_poles: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Corners (N, 4) of the cells of rows of different lengths, half way between rows and between points of a row.

    Returns:
        Latitudes and longitudes of the corners; the outer rows reach to the poles, or as far out as they are in.

    Raises:
        SourceError: a single row, or a row of one point, whose cells have no size.
    """
    starts = np.flatnonzero(np.diff(latitude, prepend=np.nan) != 0)
    lengths = np.diff(starts, append=latitude.size)
    if len(starts) < 2 or lengths.min() < 2:
        raise SourceError("A reduced grid with a single row, or a row of one point, has cells of no known size.")
    rows = latitude[starts]
    middle = (rows[:-1] + rows[1:]) / 2
    edges = np.concatenate(([2 * rows[0] - middle[0]], middle, [2 * rows[-1] - middle[-1]]))
    if to_poles:
        edges[[0, -1]] = np.copysign(90.0, rows[[0, -1]])
    row = np.repeat(np.arange(len(rows)), lengths)
    first, second = longitude[starts], longitude[starts + 1]
    half = np.repeat(((second - first) % 360.0) / 2, lengths)
    corners = np.stack((edges[row], edges[row], edges[row + 1], edges[row + 1]), axis=1)
    return np.clip(corners, -90.0, 90.0), longitude[:, None] + half[:, None] * np.array([-1.0, 1.0, 1.0, -1.0])


def _shaped(values: NDArray[np.float64], message: Message) -> NDArray[np.float64]:
    if len(message.shape) == 1:
        return values
    rows, columns = message.shape
    return values.reshape(columns, rows).T if message.columns_first else values.reshape(rows, columns)


def _values(file: MessageFile, message: Message) -> NDArray[np.float64]:
    """Values of a message in the order of its latitudes and longitudes; NaN is missing.

    These run the same way in all rows, though in some files, such as those of NDFD, every second row is turned.
    """
    import eccodes

    with file.message(message.offset, message.length) as handle:
        eccodes.codes_set(handle, "missingValue", MISSING)
        values = eccodes.codes_get_values(handle)
    values = np.where(values == MISSING, np.nan, values)
    if message.zigzag and len(message.shape) == 2:
        rows = values.reshape(-1, message.shape[0 if message.columns_first else 1])
        rows[1::2] = rows[1::2, ::-1].copy()
    return values


class _Values(BackendArray):
    """Values of messages, (member, time, y, x) or (member, time, cell), decoded when they are indexed."""

    def __init__(self, file: MessageFile, messages: list[Message], shape: tuple[int, ...]) -> None:
        self.file, self.messages, self.shape, self.dtype = file, messages, shape, np.dtype(np.float64)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> NDArray[np.float64]:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> NDArray[np.float64]:
        members, times = (
            np.atleast_1d(np.arange(size)[part]) for size, part in zip(self.shape[:2], key[:2], strict=True)
        )
        fields = [[self._field(self.messages[m * self.shape[1] + t], key[2:]) for t in times] for m in members]
        values = np.array(fields)
        if isinstance(key[1], int | np.integer):
            values = values[:, 0]
        return values[0] if isinstance(key[0], int | np.integer) else values

    def _field(self, message: Message, key: tuple[Any, ...]) -> NDArray[np.float64]:
        field = _shaped(_values(self.file, message), message)
        for axis, part in reversed(list(enumerate(key))):  # from the last, for a number takes its axis away
            field = field[(slice(None),) * axis + (part,)]
        return field
