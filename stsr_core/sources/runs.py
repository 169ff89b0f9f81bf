"""Runs: forecasts of several starts, whose dates lie along the starts and the lead times, and which one is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stsr_core.errors import SourceError
from stsr_core.sources.driving import entries_of
from stsr_core.sources.times import VALID, has_dates, is_start, is_time
from stsr_core.sources.units import seconds_in

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

    from stsr_core.sources.declared import Declared


def one_run(dataset: xr.Dataset, name: str, declared: Declared) -> xr.Dataset:
    """Take the only run of forecasts where their dates lie along two dimensions, starts and lead times.

    One lead time of every run makes a series too, if it is declared how long its steps are.

    Raises:
        SourceError: there are several runs, and none is selected.
    """
    dataset = _with_dates(dataset, name)
    for coordinate in dataset[name].coords.values():
        runs = [str(d) for d in coordinate.dims if d in dataset.coords and has_dates(dataset[d])]
        if coordinate.ndim != 2 or len(runs) != 1 or not is_time(coordinate):
            continue
        (lead,) = (str(d) for d in coordinate.dims if d != runs[0])
        if runs[0] in declared.select or (lead in declared.select and declared.step_h is not None):
            continue
        if dataset.sizes[runs[0]] == 1:
            return dataset.isel({runs[0]: 0})
        raise SourceError(
            f"Times lie along {runs[0]} and {lead}: there are forecasts of several runs. Choose one entry of "
            f"{runs[0]} with `select: {{NAME: VALUE}}` of the source in catalog.yaml, or by --declare: "
            f"{entries_of(dataset, runs[0])}. Or choose one of {lead}, and declare with time_label and step_h what "
            "it stands for."
        )
    return dataset


def _with_dates(dataset: xr.Dataset, name: str) -> xr.Dataset:
    """Give forecasts that have starts and lead times only the dates that follow from them."""
    array = dataset[name]
    leads = {d: seconds for d in map(str, array.dims) if (seconds := _lead_seconds(dataset, d)) is not None}
    dated = [c for c in array.coords.values() if has_dates(c)]
    starts = [c for c in dated if is_start(c)] or [c for c in dated if c.ndim == 1]
    if len(leads) != 1 or len(starts) != 1 or any(set(c.dims) & set(leads) for c in dated):
        return dataset
    ((lead, seconds),) = leads.items()
    after = (seconds * 1e6).round().astype("timedelta64[us]")
    dates = np.add.outer(starts[0].values, after if starts[0].dtype.kind == "M" else after.astype(object))
    return dataset.assign_coords({VALID: ((*starts[0].dims, lead), dates, {"standard_name": "time"})})


def _lead_seconds(dataset: xr.Dataset, dim: str) -> NDArray[np.float64] | None:
    """Lengths of time along a dimension [s]; None where it has no such coordinate."""
    if dim not in dataset.coords:
        return None
    coordinate = dataset[dim]
    if coordinate.dtype.kind == "m":
        return np.asarray(coordinate.values / np.timedelta64(1, "s"))
    unit = seconds_in(str(coordinate.attrs.get("units", "")))
    return np.asarray(coordinate.values * unit) if unit is not None and coordinate.dtype.kind in "iuf" else None
