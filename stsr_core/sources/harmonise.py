"""Harmonising: what a dataset says becomes mm per step on known axes, or an error that says what is missing."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from stsr_core.errors import GridError, SourceError
from stsr_core.grids import Cells, Grid, TimeAxis
from stsr_core.memory import available
from stsr_core.sources.box import Box, Part, part_of
from stsr_core.sources.cube import CellCube, Coarse, Cube, coarse_of
from stsr_core.sources.declared import NOTHING, Declared
from stsr_core.sources.grib import LEFT_OUT, PACKING_STEP
from stsr_core.sources.layout import Layout, layout_of
from stsr_core.sources.period import in_period, whole_days
from stsr_core.sources.plausible import (
    FLOAT32_ROUNDING,
    Where,
    check_amounts,
    check_not_accumulated,
    check_seam,
    largest_amount,
    mask_invalid,
    mask_marked,
)
from stsr_core.sources.remote import patiently
from stsr_core.sources.times import Steps
from stsr_core.sources.units import measured

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray


Made = TypeVar("Made")
ROUNDING_MM = 0.01  # negative amounts down to this are packing error
HELD_SHARE = 0.5  # of the free memory that coarse amounts may take: while their cadence changes they are there twice
PROVENANCE = ("title", "source", "institution", "license", "attribution", "references", "comment")
ZEROED = "negatives_set_to_zero"
SAMPLE_STEPS, SAMPLE_CELLS = 128, 1 << 14  # that are looked at for running sums
BLOCK_VALUES = 1 << 23  # values that are read and converted at a time
READERS = 2  # blocks that are read and converted while one is worked on


def read_cube(dataset: xr.Dataset, variable: str, declared: Declared = NOTHING, *, some_values: bool = True) -> Cube:
    """Read a variable of a dataset as a coarse cube on a regular grid, see `find` and `Reading.read`.

    Raises:
        SourceError: what cannot be read without guessing, or several driving members.
        GridError: places that make no regular grid.
    """
    return _regular(find(dataset, variable, declared, some_values=some_values).read(), variable)


def read_grid(dataset: xr.Dataset, variable: str, declared: Declared = NOTHING) -> Grid:
    """Find the regular grid of a variable without reading its values; raises like `read_cube`."""
    place = find(dataset, variable, declared).place
    if isinstance(place, Cells):
        raise GridError(_irregular(place, variable))
    return place


def read_cubes(
    dataset: xr.Dataset, variable: str, declared: Declared = NOTHING, *, near: Box | None = None
) -> tuple[Cube, ...]:
    """Read a variable as coarse cubes on a regular grid, one for each driving member; raises like `read_cube`."""
    return tuple(_regular(one, variable) for one in find(dataset, variable, declared, near=near).read_all())


def _regular(coarse: Coarse, variable: str) -> Cube:
    if isinstance(coarse, CellCube):
        raise GridError(_irregular(coarse.cells, variable))
    return coarse


def _irregular(cells: Cells, variable: str) -> str:
    return (
        f"The {len(cells.corners)} cells of {variable!r} make no regular grid. Put the file on a target grid: declare "
        "it as a source of a product in catalog.yaml."
    )


def find(
    dataset: xr.Dataset,
    variable: str,
    declared: Declared = NOTHING,
    *,
    near: Box | None = None,
    days: tuple[date, date] | None = None,
    first_steps: int | None = None,
    some_values: bool = True,
) -> Reading:
    """Find out all about precipitation that needs none of its values.

    Args:
        dataset: as `open_dataset` returns it.
        variable: name of the precipitation, or names joined by +, whose amounts are added up.
        declared: what the file does not say itself.
        near: only cells near this box are read; None reads all.
        days: only steps that lie wholly within these days are read, the last one included; None reads all.
        first_steps: only so many steps are read; None reads all.
        some_values: whether reading refuses a source without any value; a part of a longer one may lack them.

    Raises:
        SourceError: no such variable, units, dimensions or time axis that can be read safely.
        GridError: coordinates or a CRS that make no cells, or cells that are not near the box.
    """
    names = names_of(dataset, variable)
    found = []
    for name in names:
        layout = patiently(partial(layout_of, dataset, name, declared), "the coordinates")
        steps = layout.steps if declared.period is None else in_period(layout.steps, declared.period)
        steps = steps if days is None else whole_days(steps, *days)
        steps = steps.within(0, min(steps.axis.size, first_steps or steps.axis.size))
        horizontal = tuple(layout.array.shape[-len(layout.place.dims) :])
        found.append(_Variable(layout, steps, part_of(layout.place.grid, horizontal, near)))
    for name, one in zip(names[1:], found[1:], strict=True):
        if one.layout.labels != found[0].layout.labels:
            raise SourceError(f"{name!r} and {names[0]!r} have different driving members; only like ones add up.")
        if one.steps.axis != found[0].steps.axis or one.part.grid != found[0].part.grid:
            raise SourceError(f"{name!r} and {names[0]!r} have different times or cells; only like ones add up.")
    attributes = {k: str(dataset.attrs[k]) for k in PROVENANCE if k in dataset.attrs}
    return Reading(tuple(found), declared, attributes, some_values)


def names_of(dataset: xr.Dataset, variable: str) -> list[str]:
    """Names of the variables that `variable` joins by +.

    Raises:
        SourceError: one of them is not there.
    """
    names = [variable] if variable in dataset.data_vars else [n.strip() for n in variable.split("+")]
    for name in names:
        check_variable(dataset, name)
    return names


def check_variable(dataset: xr.Dataset, name: str, where: str = "the file") -> None:
    """Refuse a variable that is not there, by what was found wrong with it on opening; raises SourceError."""
    if name not in dataset.data_vars:
        have = ", ".join(sorted(map(str, dataset.data_vars))) or "none"
        why = dataset.attrs.get(LEFT_OUT, {}).get(name)
        raise SourceError(why or f"No variable {name!r} in {where}; it has {have}. Name one of these.")


def cubes_of(array: xr.DataArray, declared: Declared = NOTHING) -> tuple[Cube, ...]:
    """Make coarse cubes of an array in memory, one for each driving member, see `read_cubes`.

    Args:
        array: precipitation with units, a time dimension, two horizontal ones, and perhaps one of driving members.
        declared: what the array does not say itself.
    """
    return read_cubes(array.rename("precipitation").to_dataset(), "precipitation", declared)


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
        some_values: whether a driving member without any value is refused.
    """

    variables: tuple[_Variable, ...]
    declared: Declared
    attributes: Mapping[str, str]
    some_values: bool = True

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
            if self.some_values and stop == self.times.size and not known.all():
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
                where = Where(first, self._of(i))
                negatives[i] += check_amounts(member, tolerance, largest_amount(self.times.step), where, self.declared)
            total = values if total is None else total + values
        assert total is not None
        return total.astype(np.float32, copy=False), negatives

    def _coarse(self, amount: NDArray[np.float32], times: TimeAxis, negatives: list[int]) -> tuple[Coarse, ...]:
        return tuple(
            coarse_of(member, times, self.place, with_negatives(self.attributes, zeros), label)
            for member, zeros, label in zip(amount, negatives, self.labels, strict=True)
        )

    def _check_not_accumulated(self, sample: NDArray[np.float32]) -> None:
        differenced = any(one.steps.differenced for one in self.variables)
        if self.declared.accumulated is None and not differenced and len(sample) >= 4:
            check_not_accumulated(sample)


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
        check_seam(layout.seam.isel({layout.time_dim: slice(low, high), layout.place.dims[0]: part.rows}))
    dtype = np.float32 if array.dtype == np.float32 and not steps.differenced else np.float64
    records = patiently(lambda: part.take(array, dtype), "the values")
    records = records.reshape(len(layout.labels), *records.shape[-2:])
    mask_invalid(records, layout.array, declared)
    mask_marked(records, declared.missing_values)
    if np.isinf(records).any():
        raise SourceError(f"{int(np.isinf(records).sum())} values are infinite. Mark missing cells as NaN.")
    kind, scale = measured(layout.units)
    scales = scale * (layout.steps.record_seconds[low:high] if kind == "rate" else np.ones(high - low))
    records *= np.asarray(scales, records.dtype)[:, None]
    packing = float(layout.array.attrs.get(PACKING_STEP, layout.array.encoding.get("scale_factor", 0.0) or 0.0))
    packing *= float(np.nanmax(scales, initial=0.0))
    if not steps.differenced:
        return records, max(ROUNDING_MM, packing / 2)
    largest = float(np.nanmax(np.abs(records), initial=0.0))
    later = steps.base >= 0
    values = records[:, steps.record - low]
    values[:, later] -= records[:, steps.base[later] - low]
    return values, max(ROUNDING_MM, packing, FLOAT32_ROUNDING * largest)
