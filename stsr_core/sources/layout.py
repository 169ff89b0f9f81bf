"""Layout: where and when the records of a variable are, by what its file says, before any value is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stsr_core.errors import SourceError
from stsr_core.sources.bounds import bounds_of
from stsr_core.sources.declared import ALL, Declared
from stsr_core.sources.driving import Driving, entries_of, selected
from stsr_core.sources.places import Place, is_horizontal, place_of, repeating
from stsr_core.sources.runs import one_run
from stsr_core.sources.times import ABSOLUTE, Steps, stamps_of, steps_of, times_among
from stsr_core.sources.units import check_agreement, measured

if TYPE_CHECKING:
    import xarray as xr

    from stsr_core.sources.times import Time


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


def layout_of(dataset: xr.Dataset, name: str, declared: Declared) -> Layout:
    """Find out all about a variable that needs none of its values.

    Raises:
        SourceError: no units, dimensions or time axis that can be read safely.
        GridError: coordinates or a CRS that make no cells.
    """
    dataset, driving = selected(one_run(dataset, name, declared), name, declared)
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
    units = _units(array, declared)
    if declared.accumulated in ("run", "day") and measured(units)[0] == "rate":
        raise SourceError(
            f"Sums since the start of the {declared.accumulated} are declared, but {units!r} is a rate. One is wrong: "
            "declare what is meant of the source in catalog.yaml, or by --declare."
        )
    order = (*leading, *place.dims)
    seam = None if seam is None else seam.transpose(*order)
    return Layout(array.transpose(*order), driving, time_dim, place, steps, units, seam)


def _time_name(dataset: xr.Dataset, array: xr.DataArray) -> str:
    """Name of the coordinate that holds the times of the steps: a 1-D one before a scalar one."""
    if found := times_among(array.coords.values(), array.dims):
        return found[0]
    raise SourceError(
        f"Dimensions {tuple(map(str, array.dims))} were found, none with dates. (time, y, x) are needed; time needs CF "
        "units such as 'hours since 2000-01-01'."
    )


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
    entries = "; ".join(entries_of(dataset, d) for d in (others if len(others) == len(dims) - 2 else dims))
    return (
        f"Dimensions {tuple(map(str, array.dims))} were found; (time, y, x) are needed. Choose one entry of the others "
        f"with `select: {{NAME: VALUE}}` of the source in catalog.yaml, or by --declare: {entries}. "
        f"`select: {{NAME: {ALL}}}` takes the entries of one for driving members."
    )


def _bounds(dataset: xr.Dataset, time: str, time_dim: str) -> list[tuple[Time, Time]] | None:
    coordinate = dataset[time]
    if "climatology" in {**coordinate.attrs, **coordinate.encoding}:
        raise SourceError(f"{time} is the time of a climatology, no period of its own. Name a file of single periods.")
    name = bounds_of(coordinate)
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
