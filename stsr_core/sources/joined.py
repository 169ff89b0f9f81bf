"""Joining: the files of a glob become one dataset, or an error that says why they do not fit together."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import cftime
import numpy as np

from stsr_core.errors import SourceError
from stsr_core.sources.bounds import bounds_of
from stsr_core.sources.times import is_lead, is_start

if TYPE_CHECKING:
    import xarray as xr

MEANING = ("units", "standard_name", "cell_methods")  # attributes that files must share
# What tells the models and realizations of CMIP and CORDEX apart.
REALIZATION = ("source_id", "variant_label", "model_id", "driving_source_id", "driving_variant_label")
MEMBER = "member"  # dimension along which files of the same times are joined


def joined(found: list[xr.Dataset], paths: list[str], url: str) -> xr.Dataset:
    """Join files along time where their times differ, along `member` where they are the same.

    Args:
        found: the files, lazily opened.
        paths: of them, in the same order.
        url: of all, as messages may show it.

    Raises:
        SourceError: they do not fit together.
    """
    import xarray as xr

    _check_alike(found, paths)
    _check_bounds(found, paths)
    times = [_times(d, p) for d, p in zip(found, paths, strict=True)]
    _check_one_calendar(times, paths)
    if len({t.dtype.kind for t in times}) > 1:  # xarray has dates beyond 2262 as objects
        found = [_with_objects(d) for d in found]
        times = [_times(d, p) for d, p in zip(found, paths, strict=True)]
    same = all(len(t) == len(times[0]) and (t == times[0]).all() for t in times)
    dim = MEMBER if same else "time"
    if not same:
        _check_one_realization(found, paths)
        found = _without_leads(found, paths)
        found = [d for _, d in sorted(zip((t[0] for t in times), found, strict=True), key=lambda pair: pair[0])]
    try:
        whole = xr.concat(
            found, dim, data_vars=_amounts(found[0]) if same else "minimal", coords="minimal", compat="equals",
            join="exact", combine_attrs="override",
        )  # fmt: skip
    except (ValueError, KeyError) as e:
        raise SourceError(
            f"The {len(paths)} files of {url} do not fit together along {dim}: "
            f"{str(e).splitlines()[0][:200]}. Name files of one grid and one set of variables."
        ) from e
    if same and not any(MEMBER in d.variables or MEMBER in d.dims for d in found):
        whole = whole.assign_coords({MEMBER: _distinct(paths)})
    stamps = whole["time"].to_index()
    if not same and stamps.has_duplicates:
        raise SourceError(f"Files of {url} hold the same time twice: {stamps[stamps.duplicated()][0]}. Name each once.")
    return whole


def _check_alike(found: list[xr.Dataset], paths: list[str]) -> None:
    """Refuse files whose variables differ, or mean different things: joined, all would mean what the first does."""
    names = _amounts(found[0])
    for dataset, path in zip(found[1:], paths[1:], strict=True):
        if set(_amounts(dataset)) != set(names):
            differ = ", ".join(sorted(set(_amounts(dataset)) ^ set(names)))
            raise SourceError(
                f"The files do not fit together: {differ} is not in all of them. Name files of one set of variables."
            )
        for name in names:
            one, other = ([str(d[name].attrs.get(key, "")) for key in MEANING] for d in (found[0], dataset))
            if one != other:
                raise SourceError(
                    f"The files do not fit together: {name!r} is {', '.join(filter(None, one)) or 'not described'} in "
                    f"some, {', '.join(filter(None, other)) or 'not described'} in {path}. Name files of one kind."
                )


def _check_bounds(found: list[xr.Dataset], paths: list[str]) -> None:
    """Refuse files of which only some say over which time their values are: joined, none would."""
    stated = [bounds_of(d["time"]) in d.variables for d in found if "time" in d.variables]
    if any(stated) and not all(stated):
        raise SourceError(
            f"The files do not fit together: there are time bounds in {paths[stated.index(True)]}, none in "
            f"{paths[stated.index(False)]}. Name files of one kind."
        )


def _check_one_calendar(times: list[Any], paths: list[str]) -> None:
    """Refuse files whose dates cannot be compared."""
    calendars = [getattr(t[0], "calendar", "standard") if t.dtype == object else "standard" for t in times]
    for calendar, path in zip(calendars[1:], paths[1:], strict=True):
        if calendar != calendars[0]:
            raise SourceError(
                f"The files do not fit together: the calendar is {calendars[0]} in {paths[0]}, {calendar} in {path}. "
                "Name files of one calendar."
            )


def _with_objects(dataset: xr.Dataset) -> xr.Dataset:
    """Make the dates of a file cftime objects."""

    def objects(variable: xr.Variable) -> xr.Variable:
        dates = variable.values.astype("datetime64[us]").astype(object)
        made = [cftime.DatetimeGregorian(*d.timetuple()[:6], d.microsecond) for d in dates.flat]
        return variable.copy(data=np.array(made, object).reshape(dates.shape))

    return dataset.assign({n: objects(v) for n, v in dataset.variables.items() if v.dtype.kind == "M"})


def _without_leads(found: list[xr.Dataset], paths: list[str]) -> list[xr.Dataset]:
    """Drop start and lead time of files that hold one step of a forecast each: they differ, and are not needed.

    Raises:
        SourceError: files of several runs, and not of one lead time of each.
    """
    starts, leads = ([_scalars(d, kind) for d in found] for kind in (is_start, is_lead))
    values = [{tuple(map(str, one.values())) for one in of_files} for of_files in (starts, leads)]
    if all(len(different) > 1 for different in values):
        raise SourceError(
            f"The files are of several runs and lead times, {paths[0]} and {paths[-1]} among them, so their times make "
            "no series. Name files of one run, or of one lead time of each."
        )
    return [d.drop_vars([*a, *b]) for d, a, b in zip(found, starts, leads, strict=True)]


def _scalars(dataset: xr.Dataset, is_kind: Callable[[xr.DataArray], bool]) -> dict[str, Any]:
    return {str(n): c.values for n, c in dataset.coords.items() if c.ndim == 0 and is_kind(c)}


def _check_one_realization(found: list[xr.Dataset], paths: list[str]) -> None:
    """Refuse files of different models or realizations whose times follow each other, by what CMIP files say."""
    for key in REALIZATION:
        said = {str(d.attrs[key]): path for d, path in zip(found, paths, strict=True) if key in d.attrs}
        if len(said) > 1:
            (one, a), (other, b) = list(said.items())[:2]
            raise SourceError(
                f"The files are of several realizations, so their times make no series: {key} is {one} in {a}, {other} "
                f"in {b}. Name files of one; or of the same times, which are driving members."
            )


def _amounts(dataset: xr.Dataset) -> list[str]:
    """Variables that hold data, and may differ between members: those along time that are bounds of none."""
    bounds = {bounds_of(v) for v in dataset.variables.values()}
    return [n for n in map(str, dataset.data_vars) if "time" in dataset[n].dims and n not in bounds]


def _distinct(paths: list[str]) -> list[str]:
    """What tells paths apart: the words that are not the same in all of them, such as r1i1p1f1; else all of each."""
    words = [re.split(r"[/._-]", path) for path in paths]
    if len({len(w) for w in words}) > 1:
        return paths
    differ = [i for i, at in enumerate(zip(*words, strict=True)) if len(set(at)) > 1]
    found = ["_".join(w[i] for i in differ) for w in words]
    return found if len(set(found)) == len(found) else paths


def _times(dataset: xr.Dataset, path: str) -> Any:
    if "time" not in dataset.variables or dataset["time"].size == 0:
        raise SourceError(f"{path} has no time, so it cannot be joined with the others. Name files with a time axis.")
    return dataset["time"].values.ravel()
