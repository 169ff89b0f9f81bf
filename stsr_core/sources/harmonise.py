"""Harmonising: what a dataset says becomes mm per step on known axes, or an error that says what is missing."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, TypeAlias

import cftime
import numpy as np

from stsr_core.errors import GridError, SourceError
from stsr_core.grids import Axis, Grid, TimeAxis, TimeLabel
from stsr_core.sources.cube import Cube

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

Y_NAMES = ("y", "lat", "latitude", "rlat", "projection_y_coordinate", "northing")
X_NAMES = ("x", "lon", "longitude", "rlon", "projection_x_coordinate", "easting")
AMOUNT_UNITS = {"mm": 1.0, "kg m-2": 1.0, "kg/m2": 1.0, "kg m**-2": 1.0, "millimeter": 1.0, "m": 1000.0, "cm": 10.0}
RATE_UNITS = {  # mm per hour
    "mm/h": 1.0, "mm h-1": 1.0, "mm/hr": 1.0, "mm hr-1": 1.0, "mm hour-1": 1.0,
    "kg m-2 s-1": 3600.0, "mm s-1": 3600.0, "mm/s": 3600.0, "m s-1": 3.6e6,
    "mm/day": 1 / 24, "mm day-1": 1 / 24, "mm d-1": 1 / 24,
}  # fmt: skip
ROUNDING_MM = 0.01  # negative amounts down to this are packing error
REGULARITY = 1e-3  # largest deviation of a regular axis, in steps
PROVENANCE = ("title", "source", "institution", "license", "attribution", "references", "comment")

Time: TypeAlias = datetime | cftime.datetime


def read_cube(
    dataset: xr.Dataset,
    variable: str,
    *,
    units: str | None = None,
    crs: str | None = None,
    time_label: TimeLabel | None = None,
) -> Cube:
    """Read a variable of a dataset as a coarse cube.

    Args:
        dataset: as `open_dataset` returns it.
        variable: name of the precipitation.
        units: declared units, where the variable has none.
        crs: declared CRS, where the variable has no grid mapping.
        time_label: which point of its interval a time stamp names, where there are no bounds.

    Raises:
        SourceError: no such variable, units, dimensions, time axis or values that cannot be read safely.
        GridError: an axis that is not regular.
    """
    if variable not in dataset.data_vars:
        have = ", ".join(sorted(map(str, dataset.data_vars))) or "none"
        raise SourceError(f"No variable {variable!r} in the file; it has {have}. Name one of these.")
    array = dataset[variable]
    named = array["time"].attrs.get("bounds") if "time" in array.coords else None
    bounds = dataset[named] if named in dataset.variables else None
    mapping = array.attrs.get("grid_mapping") or array.encoding.get("grid_mapping")
    declared = dataset[mapping].attrs if mapping in dataset.variables else None
    attributes = {k: str(dataset.attrs[k]) for k in PROVENANCE if k in dataset.attrs}
    return cube_of(
        array, bounds=bounds, units=units, crs=crs, mapping=declared, time_label=time_label, attributes=attributes
    )


def cube_of(
    array: xr.DataArray,
    *,
    bounds: xr.DataArray | None = None,
    units: str | None = None,
    crs: str | None = None,
    mapping: Mapping[str, object] | None = None,
    time_label: TimeLabel | None = None,
    attributes: Mapping[str, str] | None = None,
) -> Cube:
    """Make a coarse cube of an array, see `read_cube`."""
    y_name, x_name = _horizontal(array)
    array = array.transpose("time", y_name, x_name)
    if 0 in array.shape:
        raise SourceError(f"The variable is empty: {dict(array.sizes)}. At least one step and one cell are needed.")
    times, assumed = _times(array["time"], bounds, time_label)
    grid = Grid(_axis(array, y_name), _axis(array, x_name), _crs_wkt(array, y_name, crs, mapping))
    amount = _amount(array, units, times.step)
    noted = {"time_label_assumed": times.label} if assumed else {}
    return Cube(amount, times, grid, {**(attributes or {}), **noted})


def _horizontal(array: xr.DataArray) -> tuple[str, str]:
    """Names of the y and x dimensions; other dimensions must be the time or have size 1 and a scalar role."""
    y = [d for d in array.dims if str(d).lower() in Y_NAMES]
    x = [d for d in array.dims if str(d).lower() in X_NAMES]
    if array.ndim != 3 or "time" not in array.dims or len(y) != 1 or len(x) != 1:
        raise SourceError(
            f"Dimensions {tuple(map(str, array.dims))} were found; (time, y, x) are needed, y and x under their names "
            "or as lat and lon. Select or rename them first."
        )
    return str(y[0]), str(x[0])


def _axis(array: xr.DataArray, name: str) -> Axis:
    if name not in array.coords:
        raise SourceError(f"Dimension {name} has no coordinate. Cell centres are needed; add them.")
    values = np.asarray(array[name].values, dtype=np.float64)
    if values.size == 1:
        raise GridError(f"Axis {name} has one cell, so its spacing is unknown. At least two cells are needed.")
    step = (values[-1] - values[0]) / (values.size - 1)
    off = np.abs(values - (values[0] + step * np.arange(values.size)))
    if step == 0 or not np.isfinite(values).all() or off.max() > REGULARITY * abs(step):
        raise GridError(
            f"Axis {name} is not regular: cell {int(off.argmax())} is {off.max():.4g} off an even spacing of "
            f"{step:.6g}. A regular grid is needed; regrid the file first."
        )
    first = float(values[0])
    if array[name].dtype == np.float32:  # noise in its last digits, which a lattice in absolute place must not see
        first, step = float(f"{first:.7g}"), float(f"{step:.6g}")
    return Axis(first, float(step), int(values.size))


def _crs_wkt(
    array: xr.DataArray, y_name: str, declared: str | None, mapping: Mapping[str, object] | None
) -> str | None:
    from pyproj import CRS

    if declared is not None:
        return str(CRS.from_user_input(declared).to_wkt())
    if mapping is not None and ("crs_wkt" in mapping or "grid_mapping_name" in mapping):
        return str(CRS.from_cf(dict(mapping)).to_wkt())
    units = str(array[y_name].attrs.get("units", ""))
    if units.startswith("degree") or y_name.lower() in ("lat", "latitude"):
        return str(CRS.from_epsg(4326).to_wkt())
    return None


def _amount(array: xr.DataArray, declared: str | None, step: timedelta) -> NDArray[np.float32]:
    units = declared or str(array.attrs.get("units", "")).strip()
    if not units:
        raise SourceError(
            "The variable has no units. Set its attribute `units` (mm, kg m-2 s-1, mm/h, ...), or declare units in "
            "catalog.yaml or with --units."
        )
    hours = step / timedelta(hours=1)
    if units in AMOUNT_UNITS:
        scale = AMOUNT_UNITS[units]
    elif units in RATE_UNITS:
        scale = RATE_UNITS[units] * hours
    else:
        known = ", ".join([*AMOUNT_UNITS, *RATE_UNITS])
        raise SourceError(f"Units {units!r} are not understood; known are {known}. Declare the right ones.")
    values = np.asarray(array.values, dtype=np.float64) * scale
    if np.isinf(values).any():
        raise SourceError(f"{int(np.isinf(values).sum())} values are infinite. Mark missing cells as NaN.")
    if np.isnan(values).all():
        raise SourceError("All values are missing. Check the fill value and the period.")
    lowest = float(np.nanmin(values))
    if lowest < -ROUNDING_MM:
        where = np.unravel_index(int(np.nanargmin(values)), values.shape)
        raise SourceError(
            f"Negative precipitation: {lowest:.4g} mm at (time, y, x) = {tuple(int(i) for i in where)}, beyond the "
            f"rounding of {ROUNDING_MM} mm. Is it an accumulation or an anomaly? Amounts per step are needed."
        )
    return np.maximum(values, 0.0, where=~np.isnan(values), out=values).astype(np.float32)


def _times(coordinate: xr.DataArray, bounds: xr.DataArray | None, declared: TimeLabel | None) -> tuple[TimeAxis, bool]:
    """Time axis, and whether its label had to be assumed."""
    stamps = _as_times(coordinate.values)
    if bounds is not None and bounds.ndim == 2 and bounds.shape[1] == 2:
        return _times_from_bounds(stamps, _as_times(bounds.values[:, 0]), _as_times(bounds.values[:, 1])), False
    if len(stamps) < 2:
        raise SourceError("One time step without time bounds has no length. Add bounds, or a second step.")
    step = _even_step(stamps)
    label: TimeLabel = declared or "end"
    before = {"start": 0.0, "middle": 0.5, "end": 1.0}[label]
    return TimeAxis(stamps[0] - step * before, step, len(stamps), label), declared is None


def _times_from_bounds(stamps: list[Time], starts: list[Time], ends: list[Time]) -> TimeAxis:
    step = ends[0] - starts[0]
    if step <= timedelta(0):
        raise SourceError(f"Time bounds {starts[0]} to {ends[0]} have no length. Bounds that increase are needed.")
    if len(stamps) > 1:
        even = _even_step(stamps)
        if even != step:
            raise SourceError(
                f"Time bounds are {step} long, but time stamps are {even} apart. Gap-free intervals are needed."
            )
    for i, (a, b) in enumerate(zip(starts, ends, strict=True)):
        if b - a != step:
            raise SourceError(f"Interval {i} ({a} to {b}) is not {step} long like the first. Even steps are needed.")
    offset = (stamps[0] - starts[0]) / step
    label: TimeLabel = "start" if offset < 0.25 else "middle" if offset < 0.75 else "end"
    return TimeAxis(starts[0], step, len(stamps), label)


def _as_times(values: NDArray[np.generic]) -> list[Time]:
    if np.issubdtype(values.dtype, np.datetime64):
        if np.isnat(values).any():
            raise SourceError("The time axis holds missing stamps. Every step needs its time.")
        return values.astype("datetime64[us]").astype(datetime).tolist()
    if values.dtype == object and all(isinstance(v, cftime.datetime) for v in values):
        return list(values)
    raise SourceError(
        f"The time axis holds {values.dtype} values, not dates. Give it CF units such as 'hours since 2000-01-01'."
    )


def _even_step(stamps: list[Time]) -> timedelta:
    step: timedelta = stamps[1] - stamps[0]
    for before, after in itertools.pairwise(stamps):
        if after <= before:
            raise SourceError(f"The time axis is not sorted: {after} comes after {before}. Sort it, drop duplicates.")
        if after - before != step:
            raise SourceError(
                f"The time axis is uneven: {before} to {after} is not {step} like the first step. "
                "Fill the gap with missing steps, or split the file there."
            )
    if step <= timedelta(0):
        raise SourceError(f"The time axis is not sorted: {stamps[1]} comes after {stamps[0]}.")
    return step
