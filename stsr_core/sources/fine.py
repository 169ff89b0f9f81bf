"""Fine precipitation, as radar archives hold it: gap-free runs that are read block by block."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stsr_core.errors import SourceError
from stsr_core.sources.declared import NOTHING, Declared
from stsr_core.sources.geotiff import NAME
from stsr_core.sources.harmonise import check_variable, read_cube, read_grid
from stsr_core.sources.location import Location, OptionsOf, no_options
from stsr_core.sources.open import GLOB, open_dataset
from stsr_core.sources.period import overlap
from stsr_core.sources.remote import patiently, shown
from stsr_core.sources.times import check_increasing, stamps_of, steps_of, with_time_named

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

    from stsr_core.grids import Grid
    from stsr_core.sources.times import Time

RUNS = ("segment", "event")  # variables along time that number gap-free runs
READ_STEPS = 48  # fine steps that are read at a time


@dataclass(frozen=True)
class FineRun:
    """A gap-free run of fine steps at one place.

    Attributes:
        name: of the file, for cards and messages.
        dataset: the steps of the run, not yet read.
        variable: name of the amounts.
        declared: what the file does not say itself.
    """

    name: str
    dataset: xr.Dataset
    variable: str
    declared: Declared

    @property
    def steps(self) -> int:
        """Number of steps."""
        return int(self.dataset.sizes["time"])

    @property
    def step_h(self) -> float:
        """Length of a step [h]."""
        assert self.declared.step_h is not None  # see `fine_runs`
        return self.declared.step_h

    @property
    def grid(self) -> Grid:
        """Grid of the cells; raises like `read_cube`."""
        return read_grid(self.dataset.isel(time=slice(0, 1)), self.variable, self.declared)

    def read(self, first: int = 0, last: int | None = None) -> NDArray[np.float32]:
        """Amounts of some steps [mm per step], (T, Y, X), NaN where missing; raises like `read_cube`."""
        part = self.dataset.isel(time=slice(first, last))
        return read_cube(part, self.variable, self.declared, some_values=False).amount

    def blocks(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Read all steps, READ_STEPS at a time: which these are, and their amounts, see `read`.

        Raises:
            SourceError: not one value in the whole run, or what `read` refuses.
        """
        some = False
        for first in range(0, self.steps, READ_STEPS):
            steps = slice(first, min(first + READ_STEPS, self.steps))
            amount = self.read(steps.start, steps.stop)
            some = some or not np.isnan(amount).all()
            yield steps, amount
        if not some:
            stamps = stamps_of(self.dataset["time"])
            raise SourceError(
                f"All values of {self.name} from {stamps[0]} to {stamps[-1]} are missing. Check its fill value, or "
                "leave these steps out."
            )


def fine_runs(
    url: str,
    variable: str,
    declared: Declared = NOTHING,
    *,
    base: Path | None = None,
    storage_options: Mapping[str, object] | None = None,
) -> list[FineRun]:
    """Find the gap-free runs of a file or a series of GeoTIFFs: what `segment` or `event` number, and even steps.

    Raises:
        SourceError: no such variable, no time, stamps that do not increase, running sums, or what `open_dataset`
            refuses.
    """
    dataset, place = with_time_named(open_dataset(url, base=base, storage_options=storage_options)), shown(url)
    check_variable(dataset, variable, place)
    if "time" not in dataset[variable].dims or "time" not in dataset.coords:
        raise SourceError(
            f"{place} has dimensions {tuple(dataset[variable].dims)}; (time, y, x) with dates are needed."
        )
    if declared.accumulated in ("run", "day"):
        raise SourceError(
            f"Sums since the start of the {declared.accumulated} are declared of {place}; archives hold amounts per "
            "step."
        )
    stamps = stamps_of(dataset["time"])
    lengths = [b - a for a, b in itertools.pairwise(stamps)]
    if not lengths:
        raise SourceError(f"{place} holds {len(stamps)} steps; at least two are needed.")
    check_increasing(stamps)
    step, _ = Counter(lengths).most_common(1)[0]
    new = np.array([length != step for length in lengths])
    for marker in RUNS:
        if marker in dataset.variables and dataset[marker].dims == ("time",):
            new = new | (np.diff(dataset[marker].values) != 0)
    bounds = [0, *(np.flatnonzero(new) + 1).tolist(), len(stamps)]
    # The label does not matter to amounts here, for coarse ones are made of the fine ones.
    whole = replace(
        declared, time_label=declared.time_label or "end", step_h=step / timedelta(hours=1), accumulated="none",
        period=None,
    )  # fmt: skip
    runs = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    if declared.period is not None:
        runs = _inside(runs, stamps, whole, declared.period)
    return [FineRun(Path(place).stem, dataset.isel(time=run), variable, whole) for run in runs]


def _inside(runs: Sequence[slice], stamps: Sequence[Time], declared: Declared, period: tuple[str, str]) -> list[slice]:
    """What lies in a period of gap-free runs of stamps; raises SourceError where nothing does."""
    found = []
    for run in runs:
        first, stop = overlap(steps_of(stamps[run], None, declared).axis, period)
        if first < stop:
            found.append(slice(run.start + first, run.start + stop))
    if not found:
        raise SourceError(
            f"No step lies between {period[0]} and {period[1]}; there are stamps from {stamps[0]} to {stamps[-1]}. "
            "Change `period:` of the archive in catalog.yaml."
        )
    return found


def places_of(urls: Sequence[str], base: Path | None = None, options_of: OptionsOf = no_options) -> list[str]:
    """Expand folders and globs to one URL for each place: every file is one, a glob of GeoTIFFs is one series.

    Raises:
        SourceError: a URL at which nothing is, or that cannot be reached.
    """
    found: list[str] = []
    for url in urls:
        place = Location.of(url, base, options_of(url))
        paths = patiently(partial(_files, place), place.url, secrets=place.secrets)
        if not paths:
            raise SourceError(f"Nothing is at {shown(place.url)}, or no NetCDF file is in it. Name existing files.")
        if len(paths) > 1 and all(NAME.search(p) for p in paths):
            found.append(place.url)
        else:
            found += [place.at(p).url if not place.local else p for p in paths]
    return found


def _files(place: Location) -> list[str]:
    if any(c in place.path for c in GLOB):
        return sorted(place.filesystem.glob(place.path))
    if place.filesystem.isdir(place.path) and not place.path.rstrip("/").endswith(".zarr"):
        return sorted(place.filesystem.glob(f"{place.path.rstrip('/')}/*.nc"))
    return [place.path] if place.exists else []
