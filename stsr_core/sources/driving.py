"""Driving members: along which dimension of a source its realizations lie, and which of them are read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stsr_core.errors import SourceError
from stsr_core.sources.bounds import bounds_of
from stsr_core.sources.declared import ALL

if TYPE_CHECKING:
    import xarray as xr

    from stsr_core.sources.declared import Declared, Label

REALIZATIONS = (
    "member", "members", "member_id", "memb", "realization", "realisation", "realizations", "number", "ensemble",
    "ensemble_member", "ens", "eps", "perturbation", "perturbationnumber", "variant_label",
)  # fmt: skip
DATE = re.compile(r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d)(?::00)?)?")


@dataclass(frozen=True)
class Driving:
    """Driving members that are read: the dimension that they lie along, and their labels in its order."""

    dim: str
    labels: tuple[str, ...]


def selected(dataset: xr.Dataset, name: str, declared: Declared) -> tuple[xr.Dataset, Driving | None]:
    """Take what is declared to be selected of a variable; all entries along an axis of realizations.

    Returns:
        The dataset, and the driving members that it then holds; None where the source is no ensemble.

    Raises:
        SourceError: dimensions or entries that are not there, or several axes of driving members.
    """
    for dim in declared.select:
        if dim not in dataset.dims:
            raise SourceError(f"`select` names {dim!r}, which is no dimension; {name} has {tuple(dataset[name].dims)}.")
    found: list[Driving] = []
    for dim in map(str, dataset[name].dims):
        wanted, is_ensemble = declared.select.get(dim), _is_ensemble(dataset, dim)
        if wanted is None and is_ensemble:
            wanted = ALL if dataset.sizes[dim] > 1 else 0
            is_ensemble, positions = dataset.sizes[dim] > 1, list(range(dataset.sizes[dim]))
        elif wanted is None:
            continue
        else:
            positions = _positions(dataset, dim, wanted)
        if is_ensemble or isinstance(wanted, tuple) or wanted == ALL:
            found.append(Driving(dim, tuple(_distinct(dataset, dim)[i] for i in positions)))
            contiguous = positions == list(range(positions[0], positions[-1] + 1))
            dataset = dataset.isel({dim: slice(positions[0], positions[-1] + 1) if contiguous else positions})
        else:
            dataset = dataset.isel({dim: positions[0]})
    if len(found) > 1:
        raise SourceError(
            f"Driving members lie along {' and '.join(one.dim for one in found)}; one dimension of them is needed. "
            "Choose one entry of the others with `select: {NAME: VALUE}` of the source in catalog.yaml, or by "
            "--declare."
        )
    return (_said_once(dataset, found[0].dim), found[0]) if found else (dataset, None)


def _said_once(dataset: xr.Dataset, dim: str) -> xr.Dataset:
    """Take bounds and coordinates that joining files has repeated for every driving member from the first.

    Raises:
        SourceError: they differ.
    """
    bounds = {bounds_of(v) for v in dataset.variables.values()}
    for name in [*map(str, dataset.coords), *bounds]:
        if name not in dataset.variables or dim not in dataset[name].dims or dataset[name].ndim == 1:
            continue
        first = dataset[name].isel({dim: 0}, drop=True)
        if not (dataset[name] == first).all():
            raise SourceError(f"{name} differs between the driving members along {dim}; they need the same times and "
                              "places. Make sources of their own of them.")  # fmt: skip
        dataset = dataset.assign_coords({name: first}) if name in dataset.coords else dataset.assign({name: first})
    return dataset


def _is_ensemble(dataset: xr.Dataset, dim: str) -> bool:
    """Whether a dimension is known to run over realizations of one model, by CF or by its name."""
    along = [dataset[n] for n in dataset.variables if dataset[n].dims == (dim,)]
    return dim.lower() in REALIZATIONS or any(c.attrs.get("standard_name") == "realization" for c in along)


def _values(dataset: xr.Dataset, dim: str) -> list[object]:
    """Labels along a dimension as the file has them, else their numbers from 0."""
    if dim in dataset.coords and np.issubdtype(dataset[dim].dtype, np.datetime64):
        return np.datetime_as_string(dataset[dim].values, unit="m").tolist()
    if dim in dataset.coords:
        return [v.decode() if isinstance(v, bytes) else v for v in dataset[dim].values.tolist()]
    named = [n for n in map(str, dataset.variables) if dataset[n].dims == (dim,)]
    named = [n for n in named if dataset[n].attrs.get("standard_name") == "realization" or n.lower() in REALIZATIONS]
    if named:
        return [v.decode() if isinstance(v, bytes) else v for v in dataset[named[0]].values.tolist()]
    return list(range(dataset.sizes[dim]))


def entries_of(dataset: xr.Dataset, dim: str) -> str:
    """Return a dimension and the first of its entries, as messages name them."""
    labels = _labels(dataset, dim)
    return f"{dim} ({len(labels)}: {', '.join(labels[:6])}{', ...' if len(labels) > 6 else ''})"


def _labels(dataset: xr.Dataset, dim: str) -> list[str]:
    """Entries along a dimension, as `select` names them."""
    return [str(int(v) if isinstance(v, float) and v.is_integer() else v) for v in _values(dataset, dim)]


def _distinct(dataset: xr.Dataset, dim: str) -> list[str]:
    labels = _labels(dataset, dim)
    if len(set(labels)) < len(labels):
        raise SourceError(
            f"Entries along {dim} have the same label: {', '.join(labels[:20])}. Every one needs its own."
        )
    return labels


def _positions(dataset: xr.Dataset, dim: str, wanted: Label | tuple[Label, ...]) -> list[int]:
    """Where the entries that are wanted lie: by label where there are labels, else by number."""
    values = _values(dataset, dim)
    if wanted == ALL and ALL not in values:
        return list(range(len(values)))
    positions = []
    for one in wanted if isinstance(wanted, tuple) else (wanted,):
        found = [i for i, label in enumerate(values) if label == one or _spelt(label) == _spelt(one)]
        if len(found) != 1 or found[0] in positions:
            twice = found and found[0] in positions
            raise SourceError(f"`select: {{{dim}: {one}}}` is {'named twice' if twice else f'none of {_few(values)}'}.")
        positions += found
    if not positions:
        raise SourceError(f"`select: {{{dim}: []}}` names no entry; there are {_few(values)}.")
    return positions


def _spelt(label: object) -> str:
    """A label as text; dates in one spelling of several."""
    found = DATE.fullmatch(str(label))
    return str(label) if found is None else f"{found[1]}T{found[2] or '00:00'}"


def _few(values: list[object]) -> str:
    if values == list(range(len(values))):
        return f"0 to {len(values) - 1}"
    return ", ".join(map(str, values[:20]))
