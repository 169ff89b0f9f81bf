"""Fine truth to score against: the wettest hours of fine files, stacked as places of one common size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stsr_core.errors import ConfigurationError, SourceError
from stsr_core.factors import Factor
from stsr_core.grids import coarsen
from stsr_core.sources.declared import NOTHING, Declared
from stsr_core.sources.fine import FineRun, fine_runs, places_of
from stsr_core.sources.location import OptionsOf, no_options

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stsr_core.grids import Grid

LIKE = 1.5  # times that the cells of one place may be as wide as those of another


@dataclass(frozen=True)
class Truth:
    """Fine truth at several places, and what a coarse model would have given there.

    Attributes:
        names: one for each place.
        fine: amount [mm per fine step], (P, T*t, Y*s, X*s), float32; whole coarse cells are NaN where any
            part of them is missing.
        coarse: amount [mm per coarse step], (P, T, Y, X), float32, NaN where missing.
        statics: static fields as the networks see them, (S, Y*s, X*s), float32, for each place; None without any.
        spacing_km: of the fine grid, in the mean over the places.
        step_h: of the fine steps [h].
    """

    names: tuple[str, ...]
    fine: NDArray[np.float32]
    coarse: NDArray[np.float32]
    statics: tuple[NDArray[np.float32] | None, ...]
    spacing_km: float = 1.0
    step_h: float = 1.0

    @property
    def steps_per_day(self) -> int:
        """Fine steps of 24 h, rounded; one where they are longer."""
        return max(1, round(24 / self.step_h))


def read_truth(
    urls: Sequence[str],
    factor: Factor,
    *,
    hours: int,
    cells: int,
    variable: str,
    declared: Declared = NOTHING,
    base: Path | None = None,
    coarser: int = 1,
    statics: Callable[[Grid], NDArray[np.float32] | None] = lambda _: None,
    options_of: OptionsOf = no_options,
) -> Truth:
    """Read the wettest `hours` and the middle `cells` x `cells` of fine files, cut to whole coarse cells.

    Files smaller than asked for make all places smaller: they are scored as one sample. Grids are made `coarser` so
    many times before all else. `declared` is what the files do not say themselves, `base` the folder that relative
    paths start from. `statics` gives the static fields on the grid of a file, `options_of` the options of the
    filesystem of a URL.

    Raises:
        ConfigurationError: less than a coarse cell or step is asked for.
        SourceError: a file without the variable, or smaller than one coarse cell in a gap-free run; files of which no
            coarse cell is whole, or whose cells or steps differ.
    """
    _check_asked(hours, cells, factor)
    places = places_of(urls, base, options_of)
    runs = [
        _wettest(place, fine_runs(place, variable, declared, storage_options=options_of(place)), hours, factor)
        for place in places
    ]
    spacings, step_h = _alike(places, [run for run, _ in runs])
    s, t = factor.space, factor.time

    def middles(fields: Iterable[NDArray[np.float32]], side: int) -> list[NDArray[np.float32]]:
        return [_middle(f, side, factor, place) for f, place in zip(fields, places, strict=True)]

    wide = middles((_averaged(amount, coarser) for _, amount in runs), cells)
    nt, *sides = (min(f.shape[axis] for f in wide) for axis in range(3))
    cut = middles((f[:nt] for f in wide), min(sides))
    coarse = np.stack([coarsen(c, factor) for c in cut])
    if np.isnan(coarse).all():
        raise SourceError(
            f"A part of every coarse cell of factor {factor} is missing in the middle of {', '.join(places)}. Ask for "
            "more cells or hours, or name other files."
        )
    hole = np.isnan(coarse).repeat(t, 1).repeat(s, 2).repeat(s, 3)
    fine = np.where(hole, np.float32(np.nan), np.stack(cut))
    below = [_averaged(f, coarser) for run, _ in runs if (f := statics(run.grid)) is not None]
    seen = middles(middles(below, cells), min(sides)) if below else [None] * len(places)
    spacing = coarser * float(np.mean(spacings))
    return Truth(tuple(Path(place).stem for place in places), fine, coarse, tuple(seen), spacing, step_h)


def _check_asked(hours: int, cells: int, factor: Factor) -> None:
    """Refuse hours (fine steps) or cells that hold no coarse step or cell of a factor; raises ConfigurationError."""
    for asked, needed, what in ((hours, factor.time, "hours"), (cells, factor.space, "cells")):
        if asked < needed:
            raise ConfigurationError(
                f"--{what} {asked} is less than the {needed} of a coarse cell of factor {factor}. Ask for --{what} "
                f"{needed} or more."
            )


def _alike(places: Sequence[str], runs: Sequence[FineRun]) -> tuple[list[float], float]:
    """Spacing of each place [km] and the step of all [h]; raises SourceError where they cannot be one sample."""
    spacings, steps = [run.grid.spacing_km for run in runs], [run.step_h for run in runs]
    if max(spacings) > LIKE * min(spacings) or max(steps) != min(steps):
        found = "; ".join(
            f"{place}: {spacing:.2g} km, {step:g} h"
            for place, spacing, step in zip(places, spacings, steps, strict=True)
        )
        raise SourceError(f"Places are scored as one sample, but cells or steps differ ({found}). Score them in turn.")
    return spacings, steps[0]


def _averaged(fields: NDArray[np.float32], cells: int) -> NDArray[np.float32]:
    """Average fields (N, Y, X) over squares of so many cells, NaN where a part is missing; cut what is left over."""
    if cells == 1:
        return fields
    ny, nx = (n // cells * cells for n in fields.shape[1:])
    return coarsen(fields[:, :ny, :nx], Factor(space=cells, time=1))


def _wettest(url: str, runs: Sequence[FineRun], hours: int, factor: Factor) -> tuple[FineRun, NDArray[np.float32]]:
    """Read the wettest `hours` inside one gap-free run of a file, whole coarse steps; and which run it was."""
    best: tuple[float, FineRun, int, int] | None = None
    for run in runs:
        nt = min(hours, run.steps) // factor.time * factor.time
        if nt:
            sums = np.convolve(_rain(run), np.ones(nt), "valid")
            if best is None or float(sums.max()) > best[0]:
                best = float(sums.max()), run, int(sums.argmax()), nt
    if best is None:
        raise SourceError(f"{url} has no gap-free run of {factor.time} steps, so factor {factor} cannot be scored.")
    _, run, start, nt = best
    return run, run.read(start, start + nt)


def _rain(run: FineRun) -> NDArray[np.float64]:
    """Rain of every step, summed over the cells; steps without a value count as less than dry, to be avoided."""
    rain = np.concatenate(
        [
            np.where(np.isnan(amount).all(axis=(1, 2)), np.nan, np.nansum(amount, axis=(1, 2), dtype=np.float64))
            for _, amount in run.blocks()
        ]
    )
    return np.where(np.isnan(rain), -1.0 - np.nanmean(rain), rain)


def _middle(fine: NDArray[np.float32], cells: int, factor: Factor, url: str) -> NDArray[np.float32]:
    ny, nx = (min(cells, n) // factor.space * factor.space for n in fine.shape[1:])
    if not (ny and nx):
        raise SourceError(f"{url} of shape {fine.shape} holds no whole coarse cell of factor {factor}.")
    y, x = ((n - m) // 2 for n, m in zip(fine.shape[1:], (ny, nx), strict=True))
    return fine[:, y : y + ny, x : x + nx]
