"""Harmonising: what a dataset says becomes mm per step on known axes, or an error that says what is missing."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from stsr_core.errors import GridError, SourceError
from stsr_core.grids import Cells, Grid, TimeAxis
from stsr_core.memory import available
from stsr_core.sources.box import Box, Part, part_of
from stsr_core.sources.cube import CellCube, Coarse, Cube
from stsr_core.sources.declared import ALL, Declared
from stsr_core.sources.driving import Driving, labels_of, selected
from stsr_core.sources.grib import LEFT_OUT
from stsr_core.sources.period import period_of, within
from stsr_core.sources.places import Place, is_horizontal, place_of, repeating
from stsr_core.sources.remote import patiently
from stsr_core.sources.times import ABSOLUTE, Steps, stamps_of, steps_of
from stsr_core.sources.units import check_agreement, measured

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

    from stsr_core.sources.times import Time

Made = TypeVar("Made")
ROUNDING_MM = 0.01  # negative amounts down to this are packing error
FLOAT32_ROUNDING = 2.0**-23
HELD_SHARE = 0.5  # of the free memory that coarse amounts may take: while their cadence changes they are there twice
SAME = 1e-5  # relative difference of values that are the same but for packing
PROVENANCE = ("title", "source", "institution", "license", "attribution", "references", "comment")
ZEROED = "negatives_set_to_zero"
NOTHING = Declared()
PACKING = "packing_error"  # attribute in which `grib.py` states the packing error of a variable
SAMPLE_STEPS, SAMPLE_CELLS = 128, 1 << 14  # that are looked at for running sums
MANY_CELLS = 10  # that rise together by no accident
BLOCK_VALUES = 1 << 23  # values that are read and converted at a time
READERS = 2  # blocks that are read and converted while one is worked on


def read_cube(
    dataset: xr.Dataset,
    variable: str,
    declared: Declared = NOTHING,
    *,
    near: Box | None = None,
) -> Cube:
    """Read a variable of a dataset as a coarse cube on a regular grid, see `read_coarse`.

    Raises:
        SourceError: what cannot be read without guessing, or several driving members.
        GridError: places that make no regular grid.
    """
    return _regular(read_coarse(dataset, variable, declared, near=near), variable)


def read_cubes(dataset: xr.Dataset, variable: str, declared: Declared = NOTHING) -> tuple[Cube, ...]:
    """Read a variable as coarse cubes on a regular grid, one for each driving member; raises like `read_cube`."""
    return tuple(_regular(one, variable) for one in find(dataset, variable, declared).read_all())


def _regular(coarse: Coarse, variable: str) -> Cube:
    if isinstance(coarse, CellCube):
        raise GridError(
            f"The {coarse.cells.size} cells of {variable!r} make no regular grid. Put the file on a target grid: "
            "declare it as a source of a product in catalog.yaml."
        )
    return coarse


def read_coarse(
    dataset: xr.Dataset,
    variable: str,
    declared: Declared = NOTHING,
    *,
    near: Box | None = None,
    first_steps: int | None = None,
) -> Coarse:
    """Read a variable of a dataset as coarse amounts on whatever cells it has; see `find` and `Reading.read`."""
    return find(dataset, variable, declared, near=near, first_steps=first_steps).read()


def find(
    dataset: xr.Dataset,
    variable: str,
    declared: Declared = NOTHING,
    *,
    near: Box | None = None,
    days: tuple[date, date] | None = None,
    first_steps: int | None = None,
) -> Reading:
    """Find out all about precipitation that needs none of its values.

    Args:
        dataset: as `open_dataset` returns it.
        variable: name of the precipitation, or names joined by +, whose amounts are added up.
        declared: what the file does not say itself.
        near: only cells near this box are read; None reads all.
        days: only steps that lie wholly within these days are read, the last one included; None reads all.
        first_steps: only so many steps are read; None reads all.

    Raises:
        SourceError: no such variable, units, dimensions or time axis that can be read safely.
        GridError: coordinates or a CRS that make no cells, or cells that are not near the box.
    """
    names = names_of(dataset, variable)
    found = []
    for name in names:
        layout = layout_of(dataset, name, declared)
        steps = layout.steps if declared.period is None else period_of(layout.steps, declared.period)
        steps = steps if days is None else within(steps, *days)
        steps = steps.within(0, min(steps.axis.size, first_steps or steps.axis.size))
        horizontal = tuple(layout.array.shape[-len(layout.place.dims) :])
        found.append(_Variable(layout, steps, part_of(layout.place.grid, horizontal, near)))
    for name, one in zip(names[1:], found[1:], strict=True):
        if one.layout.labels != found[0].layout.labels:
            raise SourceError(f"{name!r} and {names[0]!r} have different driving members; only like ones add up.")
        if one.steps.axis != found[0].steps.axis or _key(one.part.grid) != _key(found[0].part.grid):
            raise SourceError(f"{name!r} and {names[0]!r} have different times or cells; only like ones add up.")
    attributes = {k: str(dataset.attrs[k]) for k in PROVENANCE if k in dataset.attrs}
    return Reading(tuple(found), declared, attributes)


def names_of(dataset: xr.Dataset, variable: str) -> list[str]:
    """Names of the variables that `variable` joins by +.

    Raises:
        SourceError: one of them is not there.
    """
    names = [variable] if variable in dataset.data_vars else [n.strip() for n in variable.split("+")]
    for name in names:
        if name not in dataset.data_vars:
            have = ", ".join(sorted(map(str, dataset.data_vars))) or "none"
            why = dataset.attrs.get(LEFT_OUT, {}).get(name)
            raise SourceError(why or f"No variable {name!r} in the file; it has {have}. Name one of these.")
    return names


def _key(grid: Grid | Cells) -> object:
    return grid.digest if isinstance(grid, Cells) else grid


def cube_of(array: xr.DataArray, declared: Declared = NOTHING, *, bounds: xr.DataArray | None = None) -> Cube:
    """Make a coarse cube of an array in memory, see `read_cube` and `cubes_of`."""
    (cube,) = cubes_of(array, declared, bounds=bounds)
    return cube


def cubes_of(
    array: xr.DataArray, declared: Declared = NOTHING, *, bounds: xr.DataArray | None = None
) -> tuple[Cube, ...]:
    """Make coarse cubes of an array in memory, one for each driving member, see `read_cubes`.

    Args:
        array: precipitation with units, a time dimension, two horizontal ones, and perhaps one of driving members.
        declared: what the array does not say itself.
        bounds: time bounds (time, 2).
    """
    dataset = array.rename("precipitation").to_dataset()
    if bounds is not None:
        dataset = dataset.assign(time_bnds=bounds)
        dataset["time"].attrs["bounds"] = "time_bnds"
    return read_cubes(dataset, "precipitation", declared)


@dataclass(frozen=True)
class Layout:
    """A variable before its values are read: where and when its records are.

    `array` has the dimensions of the driving members, if any, of time, and of the place, in this order. `seam` are its
    first column and one that repeats it a full circle on, which `array` leaves out; None where the file has none.
    """

    array: xr.DataArray
    driving: Driving | None
    time_dim: str
    place: Place
    steps: Steps
    units: str
    seam: xr.DataArray | None

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the driving members, one "" where the source is no ensemble."""
        return ("",) if self.driving is None else self.driving.labels


def layout_of(dataset: xr.Dataset, name: str, declared: Declared = NOTHING) -> Layout:
    """Find out all about a variable that needs none of its values; raises like `read_coarse`."""
    _check_runs(dataset, name, declared)
    dataset, driving = selected(dataset, name, declared)
    array = dataset[name]
    time = _time_name(dataset, array)
    array, dataset = _with_time(array, dataset, time)
    time_dim = str(array[time].dims[0])
    leading = (time_dim,) if driving is None else (driving.dim, time_dim)
    horizontal = tuple(str(d) for d in array.dims if d not in leading)
    array, horizontal = _without_singles(dataset, array, horizontal)
    if 0 in array.shape:
        raise SourceError(f"The variable is empty: {dict(array.sizes)}. At least one step and one cell are needed.")
    if len(horizontal) not in (1, 2):
        raise SourceError(_too_many(dataset, array, horizontal))
    steps = steps_of(stamps_of(array[time]), _bounds(dataset, time, time_dim), declared)
    seam, around = None, repeating(dataset, horizontal) if len(horizontal) == 2 else None
    if around is not None:
        seam = array.isel({around: [0, -1]})
        array, dataset = array.isel({around: slice(0, -1)}), dataset.isel({around: slice(0, -1)})
    place = place_of(dataset, array, horizontal, declared.crs)
    order = (*leading, *place.dims)
    seam = None if seam is None else seam.transpose(*order)
    return Layout(array.transpose(*order), driving, time_dim, place, steps, _units(array, declared), seam)


def _check_runs(dataset: xr.Dataset, name: str, declared: Declared) -> None:
    """Refuse forecasts of several runs, whose dates lie along two dimensions, until one run is selected.

    One lead time of every run makes a series too, if it is declared how long its steps are.
    """
    for key, coordinate in dataset[name].coords.items():
        runs = [str(d) for d in coordinate.dims if d in dataset.coords and _is_time(str(d), dataset[d])]
        if coordinate.ndim != 2 or len(runs) != 1 or not _is_time(str(key), coordinate):
            continue
        (lead,) = (str(d) for d in coordinate.dims if d != runs[0])
        if runs[0] not in declared.select and (lead not in declared.select or declared.step_h is None):
            raise SourceError(
                f"Times lie along {runs[0]} and {lead}: there are forecasts of several runs. Choose one entry of "
                f"{runs[0]} with `select: {{NAME: VALUE}}` of the source in catalog.yaml, or by --declare: "
                f"{_entries(dataset, runs[0])}. Or choose one of {lead}, and declare with time_label and step_h what "
                "it stands for."
            )


def _time_name(dataset: xr.Dataset, array: xr.DataArray) -> str:
    """Name of the coordinate that holds the times of the steps: a 1-D one before a scalar one."""
    found = [str(n) for n, c in array.coords.items() if c.ndim <= 1 and _is_time(str(n), c)]
    found.sort(key=lambda n: (array[n].ndim == 0, n != "valid_time", n not in array.dims, n != "time"))
    if found:
        return found[0]
    raise SourceError(
        f"Dimensions {tuple(map(str, array.dims))} were found, none with dates. (time, y, x) are needed; time needs CF "
        "units such as 'hours since 2000-01-01'."
    )


def _is_time(name: str, coordinate: xr.DataArray) -> bool:
    dates = np.issubdtype(coordinate.dtype, np.datetime64) or (
        coordinate.dtype == object and coordinate.size > 0 and hasattr(coordinate.values.flat[0], "calendar")
    )
    if str(coordinate.attrs.get("standard_name", "")) == "forecast_reference_time":
        return False
    return dates or name == "time" or (coordinate.ndim == 1 and coordinate.attrs.get("standard_name") == "time")


def _with_time(array: xr.DataArray, dataset: xr.Dataset, time: str) -> tuple[xr.DataArray, xr.Dataset]:
    if array[time].ndim == 1:
        return array, dataset
    return array.expand_dims(time), dataset.assign_coords({time: dataset[time]})


def _without_singles(
    dataset: xr.Dataset, array: xr.DataArray, dims: tuple[str, ...]
) -> tuple[xr.DataArray, tuple[str, ...]]:
    """Drop dimensions of size 1 while there are more than two besides time."""
    for dim in dims:
        if len(dims) > 2 and array.sizes[dim] == 1:
            array, dims = array.isel({dim: 0}), tuple(d for d in dims if d != dim)
    return array, dims


def _too_many(dataset: xr.Dataset, array: xr.DataArray, dims: tuple[str, ...]) -> str:
    others = [d for d in dims if not is_horizontal(dataset, d)]
    entries = "; ".join(_entries(dataset, d) for d in (others if len(others) == len(dims) - 2 else dims))
    return (
        f"Dimensions {tuple(map(str, array.dims))} were found; (time, y, x) are needed. Choose one entry of the others "
        f"with `select: {{NAME: VALUE}}` of the source in catalog.yaml, or by --declare: {entries}. "
        f"`select: {{NAME: {ALL}}}` takes the entries of one for driving members."
    )


def _entries(dataset: xr.Dataset, dim: str) -> str:
    labels = labels_of(dataset, dim)
    return f"{dim} ({len(labels)}: {', '.join(labels[:6])}{', ...' if len(labels) > 6 else ''})"


def _bounds(dataset: xr.Dataset, time: str, time_dim: str) -> list[tuple[Time, Time]] | None:
    coordinate = dataset[time]
    name = coordinate.attrs.get("bounds") or coordinate.encoding.get("bounds")
    if name not in dataset.variables:
        return None
    bounds = dataset[name]
    if bounds.ndim == 1 and coordinate.ndim == 0 and bounds.size == 2:
        bounds = bounds.expand_dims(time_dim)
    if bounds.ndim != 2 or time_dim not in bounds.dims or bounds.shape[bounds.get_axis_num(time_dim) - 1] != 2:
        raise SourceError(f"Time bounds {name} have the shape {dict(bounds.sizes)}; ({time_dim}, 2) is needed.")
    pairs = bounds.transpose(time_dim, ...).assign_attrs({**coordinate.attrs, **bounds.attrs})
    if pairs.dtype.kind not in "MO" and pairs.attrs.get("units") != ABSOLUTE:
        raise SourceError(f"Time bounds {name} hold {pairs.dtype} values, not dates. Give them the units of time.")
    return list(zip(stamps_of(pairs[:, 0]), stamps_of(pairs[:, 1]), strict=True))


def _units(array: xr.DataArray, declared: Declared) -> str:
    if declared.units is not None:
        return declared.units
    units = str(array.attrs.get("units", "")).strip()
    if not units or units == "unknown":
        raise SourceError(
            "The variable has no units. Declare `units:` of the source in catalog.yaml (mm, kg m-2 s-1, mm/h, ...), "
            "or by --declare."
        )
    called = " ".join(str(array.attrs.get(key, "")) for key in ("standard_name", "long_name", "description"))
    if "anomal" in called.lower():
        raise SourceError(f"{array.name!r} is an anomaly ({called.strip()}), no amount. Name the amounts themselves.")
    check_agreement(units, str(array.attrs.get("standard_name", "")), str(array.attrs.get("cell_methods", "")))
    return units


@dataclass(frozen=True)
class _Variable:
    """One variable: how its records make steps, and which of its cells are read."""

    layout: Layout
    steps: Steps
    part: Part


@dataclass(frozen=True)
class Reading:
    """Precipitation that is found and not read yet.

    Attributes:
        variables: the variables that add up.
        declared: what the file does not say itself.
        attributes: provenance, as in `Cube`.
    """

    variables: tuple[_Variable, ...]
    declared: Declared
    attributes: Mapping[str, str]

    @property
    def times(self) -> TimeAxis:
        """Steps that are read."""
        return self.variables[0].steps.axis

    @property
    def place(self) -> Grid | Cells:
        """Cells that are read."""
        return self.variables[0].part.grid

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the driving members, one "" where the source is no ensemble."""
        return self.variables[0].layout.labels

    def read(self) -> Coarse:
        """Read all steps of a source with one driving member, see `read_all`.

        Raises:
            SourceError: values that cannot be read safely, or several driving members.
        """
        if len(self.labels) > 1:
            driving = self.variables[0].layout.driving
            assert driving is not None
            raise SourceError(
                f"There are {len(self.labels)} driving members: {driving.dim} ({', '.join(self.labels[:6])}"
                f"{', ...' if len(self.labels) > 6 else ''}). One is needed here: choose it with `select: "
                f"{{{driving.dim}: VALUE}}` in catalog.yaml, or by --declare."
            )
        return self.read_all()[0]

    def read_all(self) -> tuple[Coarse, ...]:
        """Read all steps of every driving member.

        Returns:
            `Cube` on regular grids, else `CellCube`. The attribute `negatives_set_to_zero` counts what was rounded.

        Raises:
            SourceError: values that cannot be read safely.
        """
        size = self.variables[0].part.size
        out, negatives = self.gathered((size,), lambda one: one.amount.reshape(-1, size))
        return self._coarse(out, self.times, negatives)

    def gathered(
        self, shape: tuple[int, ...], values: Callable[[Coarse], NDArray[np.float32]]
    ) -> tuple[NDArray[np.float32], list[int]]:
        """Gather what is made of every block.

        Args:
            shape: of one step of what is made.
            values: makes (T, *shape) of a block of one driving member.

        Returns:
            (R, T, *shape), and how many negatives became 0 in each driving member.

        Raises:
            SourceError: more than memory holds.
        """
        _check_memory(len(self.labels), self.times.size, math.prod(shape))
        out = np.empty((len(self.labels), self.times.size, *shape), np.float32)
        first, negatives = 0, [0] * len(out)
        for block in self.blocks():
            stop = first + block[0].times.size
            for i, one in enumerate(block):
                out[i, first:stop] = values(one)
                negatives[i] += negatives_of(one)
            first = stop
        return out, negatives

    def blocks(self) -> Iterator[tuple[Coarse, ...]]:
        """Read the steps of all driving members block by block, so that memory does not grow with the period.

        While a block is worked on, the next ones are read. Raises like `read_all`.
        """
        size, known, samples = self._block_steps(), np.zeros(len(self.labels), bool), []
        spans = [(first, min(first + size, self.times.size)) for first in range(0, self.times.size, size)]
        for (first, stop), (out, negatives) in zip(spans, _ahead(self._amount, spans), strict=True):
            if not known.all():
                known |= ~np.isnan(out).all(axis=(1, 2))
            if stop == self.times.size and not known.all():
                member = self._of(int(known.argmin()))
                raise SourceError(f"All values are missing{member}. Check the fill value and the period.")
            if first < SAMPLE_STEPS:
                some = out[:, : SAMPLE_STEPS - first, :: max(1, len(out) * out.shape[-1] // SAMPLE_CELLS)]
                samples.append(np.concatenate(list(some), axis=1))
                if stop >= min(SAMPLE_STEPS, self.times.size):
                    self._check_not_accumulated(np.concatenate(samples))
            yield self._coarse(out, self.times.isel(first, stop), negatives)

    def _of(self, member: int) -> str:
        """Name a driving member at the end of what is wrong with it."""
        return f" in driving member {self.labels[member]}" if self.labels[member] else ""

    def _block_steps(self) -> int:
        """Steps of a block: about BLOCK_VALUES, in whole chunks of the file where it has any, to read each but once."""
        array = self.variables[0].layout.array
        steps = max(1, BLOCK_VALUES // (len(self.labels) * self.variables[0].part.size))
        chunk = int(array.encoding.get("preferred_chunks", {}).get(self.variables[0].layout.time_dim, 1))
        return max(chunk, steps // chunk * chunk)

    def _amount(self, first: int, stop: int) -> tuple[NDArray[np.float32], list[int]]:
        """Amounts of some steps, (R, T, cells), float32; and how many negatives became 0 in each driving member."""
        total, negatives = None, [0] * len(self.labels)
        for one in self.variables:
            values, tolerance = _stretch(one.layout, one.steps.within(first, stop), one.part, self.declared)
            for i, member in enumerate(values):
                where = _Where(first, self._of(i))
                negatives[i] += _check(member, tolerance, _largest(self.times.step), where, self.declared)
            total = values if total is None else total + values
        assert total is not None
        return total.astype(np.float32, copy=False), negatives

    def _coarse(self, amount: NDArray[np.float32], times: TimeAxis, negatives: list[int]) -> tuple[Coarse, ...]:
        found: list[Coarse] = []
        for member, zeros, label in zip(amount, negatives, self.labels, strict=True):
            attributes = with_negatives(self.attributes, zeros)
            if isinstance(self.place, Grid):
                found.append(Cube(member.reshape(-1, *self.place.shape), times, self.place, attributes, label))
            else:
                found.append(CellCube(member, times, self.place, attributes, label))
        return tuple(found)

    def _check_not_accumulated(self, sample: NDArray[np.float32]) -> None:
        differenced = any(one.steps.differenced for one in self.variables)
        if self.declared.accumulated is None and not differenced and len(sample) >= 4:
            _check_not_accumulated(sample)


def with_negatives(attributes: Mapping[str, str], negatives: int) -> dict[str, str]:
    """Return attributes that say how many negative amounts were set to 0, where there were any."""
    return {**attributes, **({ZEROED: str(negatives)} if negatives else {})}


def negatives_of(coarse: Coarse) -> int:
    """Return how many negative amounts were set to 0."""
    return int(coarse.attributes.get(ZEROED, "0"))


def _check_memory(members: int, steps: int, cells: int) -> None:
    """Refuse what would not fit, which would else be killed by the system in the middle of reading."""
    needed, free = np.dtype(np.float32).itemsize * members * steps * cells, available()
    if needed > HELD_SHARE * free:
        driving = f"{members} driving members x " if members > 1 else ""
        raise SourceError(
            f"{driving}{steps} steps x {cells} cells take {needed / 1e9:.1f} GB; of the "
            f"{free / 1e9:.1f} GB of memory that are free, {HELD_SHARE:.0%} may be taken. Read a shorter `period:` "
            "(a backfill goes in pieces), fewer driving members by `select:`, or a smaller area."
        )


def _ahead(make: Callable[[int, int], Made], spans: Sequence[tuple[int, int]]) -> Iterator[Made]:
    """Yield what is made of every span, in order, and make the next READERS of them in threads meanwhile."""
    with ThreadPoolExecutor(READERS) as threads:
        left = iter(spans)
        coming = deque(threads.submit(make, *span) for span in islice(left, READERS))
        try:
            while coming:
                made = coming.popleft().result()
                coming.extend(threads.submit(make, *span) for span in islice(left, 1))
                yield made
        finally:
            for future in coming:
                future.cancel()


def _stretch(layout: Layout, steps: Steps, part: Part, declared: Declared) -> tuple[NDArray[np.floating], float]:
    """Amounts of some steps (R, T, cells) in mm, and how far below 0 packing may have put them.

    They are float32 where the file holds no more and nothing is subtracted, else float64.
    """
    used = np.concatenate((steps.record, steps.base[steps.base >= 0]))
    low, high = int(used.min()), int(used.max()) + 1
    array = layout.array.isel({layout.time_dim: slice(low, high)})
    if layout.seam is not None:
        _check_seam(layout.seam.isel({layout.time_dim: slice(low, high), layout.place.dims[0]: part.rows}))
    dtype = np.float32 if array.dtype == np.float32 and not steps.differenced else np.float64
    records = patiently(lambda: part.take(array, dtype), "the values")
    records = records.reshape(len(layout.labels), *records.shape[-2:])
    _mask_invalid(records, layout.array, declared)
    for mark in declared.missing_values:  # as written, or as a float32 file holds it
        records[np.abs(records - mark) <= FLOAT32_ROUNDING * abs(mark)] = np.nan
    if np.isinf(records).any():
        raise SourceError(f"{int(np.isinf(records).sum())} values are infinite. Mark missing cells as NaN.")
    kind, scale = measured(layout.units)
    scales = scale * (layout.steps.record_seconds[low:high] if kind == "rate" else np.ones(high - low))
    records *= np.asarray(scales, records.dtype)[:, None]
    packing = float(layout.array.attrs.get(PACKING, layout.array.encoding.get("scale_factor", 0.0) or 0.0))
    packing *= float(np.nanmax(scales, initial=0.0))
    if not steps.differenced:
        return records, max(ROUNDING_MM, packing / 2)
    largest = float(np.nanmax(np.abs(records), initial=0.0))
    later = steps.base >= 0
    values = records[:, steps.record - low]
    values[:, later] -= records[:, steps.base[later] - low]
    return values, max(ROUNDING_MM, packing, FLOAT32_ROUNDING * largest)


def _check_seam(seam: xr.DataArray) -> None:
    """Refuse a column of longitudes that lies on the first one, a full circle on, and holds other values."""
    first, last = np.moveaxis(patiently(lambda: np.asarray(seam.values, np.float64), "the values"), -1, 0)
    other = int((~np.isclose(first, last, rtol=SAME, atol=0.0, equal_nan=True)).sum())
    if other:
        raise SourceError(
            f"The last column of {seam.dims[-1]} lies on the first, a full circle on, but {other} of its {last.size} "
            "values are others. Remove the wrong one of the two columns."
        )


def _mask_invalid(records: NDArray[np.floating], array: xr.DataArray, declared: Declared) -> None:
    """Mask what lies above the valid range that a file states, as CF asks for; negatives are judged by `_check`.

    Raises:
        SourceError: cells are missing because 0 marks them, which is also what dry cells hold.
    """
    scale, offset = (float(array.encoding.get(k, v)) for k, v in (("scale_factor", 1.0), ("add_offset", 0.0)))
    high = _valid_max(array) * scale + offset
    if high < np.inf:
        records[(records > high + FLOAT32_ROUNDING * abs(high)) & np.isfinite(records)] = np.nan
    marks = np.concatenate([np.ravel(array.encoding.get(key, np.nan)) for key in ("_FillValue", "missing_value")])
    if 0 in marks and offset == 0.0 and 0.0 not in declared.missing_values and np.isnan(records).any():
        raise SourceError(
            "The fill value of the file is 0, so dry cells would be missing. If 0 does mark missing cells, declare "
            "`missing_values: [0.0]` of the source in catalog.yaml, or by --declare; else remove the fill value."
        )


def _valid_max(array: xr.DataArray) -> float:
    """Largest valid value as the file states it, packed where its values are; infinite where it does not."""
    stated = np.ravel(array.attrs.get("valid_range", array.attrs.get("valid_max", np.inf)))[-1]
    try:
        return float(stated)
    except ValueError as e:
        raise SourceError(f"The valid range ends at {stated!r}, which is no number. Mend or remove it.") from e


def _largest(step: timedelta) -> float:
    """Amount that no step has reached: twice the envelope of the world's records, 422 mm (h)^0.475 (Jennings 1950)."""
    return float(2 * 422.0 * (step / timedelta(hours=1)) ** 0.475)


@dataclass(frozen=True)
class _Where:
    """Where values lie: their first step, and the driving member for the end of a sentence."""

    first: int
    member: str


def _check(values: NDArray[np.floating], rounding: float, largest: float, where: _Where, declared: Declared) -> int:
    """Set small negatives to 0 and count them; refuse what is no amount."""
    tolerance = rounding if declared.max_negative_mm is None else max(rounding, declared.max_negative_mm)
    low, high = (f.reduce(values, axis=None) for f in (np.fmin, np.fmax))  # which pass over NaN
    if low < -tolerance:
        raise SourceError(
            _implausible(values, int(np.nanargmin(values)), where, f"beyond the rounding of {tolerance:.3g} mm")
        )
    if high > largest:
        raise SourceError(
            _implausible(values, int(np.nanargmax(values)), where, f"more than {largest:.0f} mm, twice the record")
        )
    if not low < 0:
        return 0
    negative = values < 0
    values[negative] = 0.0
    return int(negative.sum())


def _implausible(values: NDArray[np.floating], at: int, where: _Where, why: str) -> str:
    step, cell = (int(i) for i in np.unravel_index(at, values.shape))
    value = float(values[step, cell])
    same = int((np.abs(values - value) <= 1e-6 * abs(value)).sum())
    what = "Negative precipitation" if value < 0 else "Implausible precipitation"
    hint = (
        f"{same} values are the same: if they mark missing cells, declare `missing_values:` of the source in "
        "catalog.yaml (in the units of the file), or by --declare."
        if same > 1
        else "Is it an anomaly, an accumulation (`accumulated:`), or in other `units:`? Amounts per step are needed; "
        "`max_negative_mm:` of the source in catalog.yaml, or by --declare, accepts more."
    )
    return f"{what}: {value:.4g} mm at step {where.first + step}, cell {cell}{where.member}, {why}. {hint}"


def _check_not_accumulated(sample: NDArray[np.float32]) -> None:
    """Refuse amounts (T, cells) that behave like a running sum that nobody declared."""
    with np.errstate(invalid="ignore"):
        change = np.diff(sample, axis=0)
        rises, falls = (change > 0).sum(axis=1), (change < 0).sum(axis=1)
    never_fall = not falls.any() and int(rises.sum()) >= MANY_CELLS
    if never_fall or _is_reset(rises, falls):
        how = "never fall from one step to the next" if never_fall else "fall in evenly spaced steps only"
        raise SourceError(
            f"The amounts {how}, in any cell: they look like a running sum. Declare `accumulated: run`, `day` or "
            "`none` of the source in catalog.yaml, or by --declare."
        )


def _is_reset(rises: NDArray[np.int64], falls: NDArray[np.int64]) -> bool:
    """Whether cells only rise, but for steps at even distances: running sums that begin anew there."""
    rising = (rises >= MANY_CELLS) & (falls <= 0.02 * rises)
    resets = np.flatnonzero((rises + falls >= MANY_CELLS) & ~rising)
    if resets.size == 0 or int(rising.sum()) < max(6, resets.size):
        return False
    distances = np.diff(resets)
    nearest = int(distances.min(initial=len(rises)))
    return nearest >= 2 and not (distances % nearest).any()
