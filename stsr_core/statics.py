"""Static fields: what networks may know of a place besides its rain, such as orography."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stsr_core.configuration import Configuration, Static
from stsr_core.errors import ConfigurationError, SourceError
from stsr_core.grids import TimeAxis
from stsr_core.regrid import regrid
from stsr_core.sources.box import Box, part_of
from stsr_core.sources.cube import coarse_of
from stsr_core.sources.harmonise import check_variable
from stsr_core.sources.location import OptionsOf, no_options
from stsr_core.sources.open import fingerprint, open_dataset
from stsr_core.sources.places import place_of, repeating
from stsr_core.sources.plausible import mask_marked, mask_outside, valid_range
from stsr_core.sources.remote import patiently, shown

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

    from stsr_core.checkpoint import StaticField
    from stsr_core.grids import Grid

ONCE = TimeAxis(datetime(2000, 1, 1), timedelta(hours=1), 1)  # a field without time is regridded as one step


@dataclass(frozen=True)
class StaticSource:
    """Where a static field is.

    Attributes:
        url: path, URL or package:FILE, as for sources.
        variable: name of the field, (y, x) or on the cells of a mesh.
        crs: CRS where the file does not say.
        missing_values: values that mark missing cells, beside those that the file names.
        base: folder that relative paths start from.
        options: of the filesystem.
    """

    url: str
    variable: str
    crs: str | None = None
    missing_values: tuple[float, ...] = ()
    base: Path | None = None
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Digest of the content, see `sources.open.fingerprint`."""
        return fingerprint(self.url, base=self.base, storage_options=self.options)

    @property
    def units(self) -> str:
        """Units of the field; raises like `read`."""
        with self._opened() as (_, array):
            return str(array.attrs["units"])

    def read(self, grid: Grid) -> NDArray[np.float32]:
        """Area means of the field on the cells of a grid with a CRS, (Y, X) float32.

        Raises:
            SourceError: no such variable, no units, more dimensions than places, missing values on the grid, or what
                cannot be read.
            GridError: places that make no cells, or do not cover the grid.
        """
        with self._opened() as (dataset, array):
            dims = tuple(map(str, array.dims))
            place = patiently(lambda: place_of(dataset, array, dims, self.crs), "the coordinates")
            ordered = array.transpose(*place.dims)
            part = part_of(place.grid, ordered.shape, Box.around(grid))
            values = patiently(lambda: part.take(ordered.expand_dims("time"), np.float32), "the values")
            mask_outside(values, *valid_range(array))
        mask_marked(values, self.missing_values)
        found = regrid(coarse_of(values, ONCE, part.grid, {}), grid).amount[0]
        if np.isnan(found).any():
            raise SourceError(
                f"{self.variable!r} in {shown(self.url)} is missing in {int(np.isnan(found).sum())} of {found.size} "
                "cells. A static field must be whole; fill it first, orography over the sea with 0."
            )
        return found

    @contextmanager
    def _opened(self) -> Iterator[tuple[xr.Dataset, xr.DataArray]]:
        with open_dataset(self.url, base=self.base, storage_options=self.options) as dataset:
            check_variable(dataset, self.variable, shown(self.url))
            array = dataset[self.variable].squeeze(drop=True)
            if "units" not in array.attrs:
                raise SourceError(
                    f"{self.variable!r} in {shown(self.url)} has no units. Give it the attribute `units`, as 'm'."
                )
            if array.ndim not in (1, 2):
                raise SourceError(
                    f"{self.variable!r} has dimensions {array.dims}; a static field has places only, (y, x)."
                )
            around = repeating(dataset, tuple(map(str, array.dims))) if array.ndim == 2 else None
            once = {} if around is None else {around: slice(0, -1)}
            yield dataset.isel(once), array.isel(once)


def static_fields(
    wanted: Sequence[StaticField], sources: Mapping[str, StaticSource], grid: Grid
) -> NDArray[np.float32] | None:
    """Static fields that a checkpoint needs, as its networks see them, on a fine grid.

    Returns:
        (S, Y, X) float32, (value - offset) / scale; None where none is needed.

    Raises:
        ConfigurationError: a field that no source is named for.
        SourceError: other units than the networks were trained with, or see `StaticSource.read`.
        GridError: see `StaticSource.read`.
    """
    if not wanted:
        return None
    return np.stack([_as_seen(static, sources, grid) for static in wanted])


def require_seen(wanted: Sequence[StaticField], sources: Mapping[str, StaticSource]) -> None:
    """Refuse static fields that a checkpoint does not see; raises ConfigurationError."""
    seen = [static.name for static in wanted]
    if other := sorted(sources.keys() - set(seen)):
        raise ConfigurationError(
            f"The checkpoint does not see the static fields {', '.join(other)}; it was trained with "
            f"{', '.join(seen) or 'none'}. Leave them out, or choose a checkpoint that was trained with them."
        )


def _as_seen(static: StaticField, sources: Mapping[str, StaticSource], grid: Grid) -> NDArray[np.float32]:
    if static.name not in sources:
        have = ", ".join(sources) or "none"
        raise ConfigurationError(
            f"The checkpoint needs the static field {static.name!r} [{static.units}]; named are {have}. Name it under "
            "`statics:` in catalog.yaml, or with --static NAME=FILE."
        )
    source = sources[static.name]
    if source.units != static.units:
        raise SourceError(
            f"Static field {static.name!r} is in {source.units}; the checkpoint was trained with {static.units}. "
            "Convert it."
        )
    return (source.read(grid) - np.float32(static.offset)) / np.float32(static.scale)


def configured_sources(
    statics: Mapping[str, Static], base: Path, options_of: OptionsOf = no_options
) -> dict[str, StaticSource]:
    """Where the static fields of catalog.yaml are; `options_of` gives the filesystem options of a URL."""
    return {
        name: StaticSource(s.url, s.variable, s.crs, s.missing_values, base, options_of(s.url))
        for name, s in statics.items()
    }


def named_sources(
    lines: Sequence[str], catalog_file: Path, options_of: OptionsOf = no_options
) -> dict[str, StaticSource]:
    """Where static fields that are asked for are: NAME=FILE, or NAME for one of catalog.yaml.

    Raises:
        ConfigurationError: a name that catalog.yaml does not know.
    """
    configured, found = {}, {}
    if any("=" not in text for text in lines):
        configured = configured_sources(Configuration.load(catalog_file).statics, catalog_file.parent, options_of)
    for text in lines:
        name, given, url = text.partition("=")
        if not given and name not in configured:
            have = ", ".join(configured) or "none"
            raise ConfigurationError(f"No static field {name!r} in catalog.yaml; there are {have}. Write {name}=FILE.")
        found[name] = StaticSource(url, name, options=options_of(url)) if given else configured[name]
    return found
