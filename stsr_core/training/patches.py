"""Training patches from archives of fine precipitation.

Patches are drawn where it rains, at any offset in place and time, and augmented by what leaves the physics as it
is, or nearly: flips, transposition, time running backwards, another drift, a change of amplitude and of contrast, and
grids of up to five times the spacing, which networks are told. Archives of a few days hold few kinds of weather;
these are the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stsr_core.errors import SourceError
from stsr_core.factors import Factor, FactorConfiguration, nearest_spacing
from stsr_core.files import whole
from stsr_core.grids import coarsen
from stsr_core.sources.declared import NOTHING, Declared
from stsr_core.sources.fine import FineRun, fine_runs, places_of
from stsr_core.sources.location import OptionsOf, no_options
from stsr_core.sources.open import fingerprint
from stsr_core.sources.times import stamps_of
from stsr_core.statics import StaticSource
from stsr_core.store.layout import MISSING, QUANTUM_MM

if TYPE_CHECKING:
    from numpy.typing import NDArray

CELL_TARGET = 112  # fine cells along a patch, before rounding to whole coarse cells
MIN_COARSE = 5  # coarse cells along a patch, at least
WEIGHT_BLOCK = (6, 32)  # steps and cells over which the rain that weighs the draw is averaged
DRY_SHARE = 0.05  # probability of a draw that ignores the rain
SPACINGS = (1, 2, 3, 4, 5)  # cells of the archive along one of the grid that networks are told ...
SPACING_SHARES = (0.6, 0.12, 0.1, 0.09, 0.09)  # ... and how often each is drawn
EXTENT = 640  # cells of the archive along a patch with its halo, at most, where patches of coarser grids are smaller
LEAST_COARSE = 3  # coarse cells along these, at least
DRIFT = 2.0  # cells per step; frames are shifted as another steering wind would, uniform within +- this on each axis
CONTRAST = 0.15  # log of the power that amounts are raised to is uniform within +- this ...
CONTRAST_MM = 2.0  # ... around this amount
AMPLITUDE = 0.6  # log amplitude scaling is uniform within +- this
REVERSED_SHARE = 0.25  # of patches run backwards in time; a minority, for showers grow faster than they decay
ATTEMPTS = 200


# What patches are drawn and changed by, for cards.
DRAWN_BY = {
    "dry_share": DRY_SHARE,
    "drift": DRIFT,
    "contrast": CONTRAST,
    "contrast_mm": CONTRAST_MM,
    "amplitude": AMPLITUDE,
    "reversed_share": REVERSED_SHARE,
}


@dataclass(frozen=True)
class Extent:
    """When and where a region is.

    Attributes:
        crs_wkt: of its grid.
        hours: first and last stamp, as ISO 8601, by which calendars can be compared.
        y: least and largest centre of a cell.
        x: likewise.
    """

    crs_wkt: str | None
    hours: tuple[str, str]
    y: tuple[float, float]
    x: tuple[float, float]

    @classmethod
    def of(cls, run: FineRun) -> Extent:
        """That of a run."""
        grid = run.grid
        y, x = ((float(axis.centres.min()), float(axis.centres.max())) for axis in (grid.y, grid.x))
        first, last = (stamp.isoformat() for stamp in stamps_of(run.dataset["time"][[0, -1]]))
        return cls(grid.crs_wkt, (first, last), y, x)

    def meets(self, other: Extent) -> bool:
        """Whether both have hours and cells in common, as far as one CRS that is known tells."""
        return (
            self.crs_wkt is not None
            and self.crs_wkt == other.crs_wkt
            and self.hours[0] <= other.hours[1]
            and other.hours[0] <= self.hours[1]
            and all(a[0] <= b[1] and b[0] <= a[1] for a, b in ((self.y, other.y), (self.x, other.x)))
        )


@dataclass(frozen=True)
class Region:
    """One gap-free piece of an archive.

    Attributes:
        name: of the file.
        quanta: amounts as uint16 quanta (T, Y, X), maybe on disk.
        weights: of the draw.
        statics: static fields (S, Y, X), in their units; without any, S is 0.
        spacing_km: of its grid.
        step_h: of its steps [h].
        extent: when and where it is, if that is known.
        fingerprint: of the file, see `sources.open.fingerprint`.
    """

    name: str
    quanta: NDArray[np.uint16]
    weights: NDArray[np.float64]
    statics: NDArray[np.float32]
    spacing_km: float = 1.0
    step_h: float = 1.0
    extent: Extent | None = None
    fingerprint: str = ""

    @property
    def digest(self) -> str:
        """What tells its content from others of the same shape: sums, to digits that no machine rounds otherwise."""
        return " ".join(f"{part.sum(dtype=np.float64):.6g}" for part in (self.weights, *self.statics))


def _weights(quanta: NDArray[np.uint16]) -> NDArray[np.float64]:
    """Mean square root of the amount in blocks of WEIGHT_BLOCK; block by block, for the quanta may be on disk."""
    steps, cells = WEIGHT_BLOCK
    t, y, x = (n // b for n, b in zip(quanta.shape, (steps, cells, cells), strict=True))
    weights = np.empty((t, y, x))
    for i in range(t):
        amount = quanta[i * steps : (i + 1) * steps, : y * cells, : x * cells].astype(np.float32)
        amount[amount == MISSING] = 0.0
        weights[i] = np.sqrt(amount * QUANTUM_MM).reshape(steps, y, cells, x, cells).mean(axis=(0, 2, 4))
    return weights


def load_archive(
    urls: Sequence[str],
    variable: str = "precipitation",
    declared: Declared = NOTHING,
    *,
    base: Path | None = None,
    cache: Path | None = None,
    statics: Sequence[StaticSource] = (),
    options_of: OptionsOf = no_options,
) -> list[Region]:
    """Read fine files, one region for each gap-free run of each file.

    Args:
        urls: files, folders of NetCDF files, globs or tars of GeoTIFFs, see `sources.fine`.
        variable: name of the amounts.
        declared: what the files do not say themselves.
        base: folder that relative paths start from.
        cache: folder where regions are kept as they are used and mapped into memory, so that archives larger than
            memory serve, and several processes share them; without it they are held in memory.
        statics: where static fields are that go with the amounts.
        options_of: gives the options of the filesystem of a URL.

    Raises:
        SourceError: no files, a missing variable, a run without any value, or amounts that do not fit the quantum's
            range.
    """
    if not urls:
        raise SourceError("No training files are named. Name them with --archive, or --train and --validation.")
    regions = []
    for place in places_of(urls, base, options_of):
        options = options_of(place)
        found = fingerprint(place, storage_options=options)
        identity = f"{found} {variable} {declared}"
        key = hashlib.sha256(identity.encode()).hexdigest()[:12]
        for number, run in enumerate(fine_runs(place, variable, declared, storage_options=options)):
            kept = None if cache is None else cache / f"{run.name}-{number}-{key}.npy"
            regions.append(_region(run, _quanta(run, kept), statics, found))
    return regions


def _region(
    run: FineRun, quanta: NDArray[np.uint16], statics: Sequence[StaticSource], fingerprint_of_file: str
) -> Region:
    fields = [source.read(run.grid) for source in statics]
    held = np.stack(fields) if fields else np.empty((0, *quanta.shape[1:]), np.float32)
    return Region(
        run.name, quanta, _weights(quanta), held, run.grid.spacing_km, run.step_h, Extent.of(run), fingerprint_of_file
    )


def _quanta(run: FineRun, kept: Path | None) -> NDArray[np.uint16]:
    """Read a run in blocks of time, into a file where one is named; one that is damaged is made anew."""
    shape = (run.steps, *run.grid.shape)
    if kept is None:
        quanta = np.empty(shape, np.uint16)
        _fill(quanta, run)
        return quanta
    mapped = _mapped(kept)
    if mapped is not None and mapped.shape == shape and mapped.dtype == np.uint16:
        return mapped
    kept.parent.mkdir(parents=True, exist_ok=True)
    with whole(kept) as part:
        quanta = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint16, shape=shape)
        _fill(quanta, run)
        quanta.flush()
    return np.load(kept, mmap_mode="r")


def _mapped(path: Path) -> NDArray[np.uint16] | None:
    """An array on disk; None where there is no file, or a damaged one."""
    try:
        return np.load(path, mmap_mode="r")
    except (FileNotFoundError, EOFError, ValueError):
        return None


def _fill(quanta: NDArray[np.uint16], run: FineRun) -> None:
    for steps, amount in run.blocks():
        quanta[steps] = to_quanta(run.name, amount)


def to_quanta(name: str, amount: NDArray[np.floating]) -> NDArray[np.uint16]:
    """Amounts [mm per step] in quanta, MISSING where NaN.

    Raises:
        SourceError: amounts that do not fit the quantum's range.
    """
    held = np.nan_to_num(amount)
    if held.max(initial=0.0) > (MISSING - 1) * QUANTUM_MM or held.min(initial=0.0) < 0:
        raise SourceError(f"{name} holds amounts outside 0..655 mm per step; check units and fill value.")
    return np.where(np.isnan(amount), MISSING, np.rint(held / QUANTUM_MM)).astype(np.uint16)


def region_of(name: str, amount: NDArray[np.floating]) -> Region:
    """Wrap one gap-free piece of amounts in memory [mm per step], (T, Y, X), NaN where missing."""
    quanta = to_quanta(name, amount)
    return Region(name, quanta, _weights(quanta), np.empty((0, *quanta.shape[1:]), np.float32))


def patch_cells(factor: Factor, spacing: int = 1) -> int:
    """Coarse cells along a training patch without its halo, on a grid of `spacing` cells of the archive."""
    room = EXTENT // (factor.space * spacing) - 2
    return min(max(MIN_COARSE, round(CELL_TARGET / factor.space)), max(LEAST_COARSE, room))


def fitting_spacings(regions: Sequence[Region], configuration: FactorConfiguration) -> tuple[int, ...]:
    """Those of SPACINGS at which patches of a factor configuration fit into a region; the first always."""
    factor = configuration.factor
    steps = (configuration.context_length + 2) * factor.time
    largest = max((min(r.quanta.shape[1:]) for r in regions if len(r.quanta) >= steps), default=0)
    needed = {n: (patch_cells(factor, n) + 2) * factor.space * n for n in SPACINGS[1:]}
    return SPACINGS[:1] + tuple(n for n, cells in needed.items() if cells <= largest)


@dataclass(frozen=True)
class Patch:
    """A training example.

    Attributes:
        fine: amount [mm per fine step], (L*t, Y*s, X*s), float32.
        coarse: amount [mm per coarse step] with a halo of one cell on every side, (L+2, Y+2, X+2), float32.
        statics: static fields in their units, (S, Y*s, X*s), float32.
        spacing_km: of the fine grid, as the networks are told it.
    """

    fine: NDArray[np.float32]
    coarse: NDArray[np.float32]
    statics: NDArray[np.float32]
    spacing_km: int = 1


def draw_patch(
    regions: Sequence[Region],
    configuration: FactorConfiguration,
    rng: np.random.Generator,
    *,
    augment: bool = True,
    spacing: int = 1,
) -> Patch:
    """Draw one patch for a factor configuration, on a grid of `spacing` cells of the archive.

    Raises:
        SourceError: the regions are too small, or too gappy, for the factor.
    """
    for _ in range(ATTEMPTS):
        drift = rng.uniform(-DRIFT, DRIFT, 2) if augment else np.zeros(2)
        block = _draw_block(regions, configuration, spacing, drift, rng)
        if block is None:
            continue
        fine, statics = (_coarser_grid(part, spacing) for part in block[:2])
        if augment:
            fine, statics = _augmented(fine, statics, rng)
        coarse = coarsen(fine, configuration.factor)
        s, t = configuration.factor.space, configuration.factor.time
        inner = slice(s, -s), slice(s, -s)
        return Patch(
            np.ascontiguousarray(fine[t:-t, *inner]),
            coarse,
            np.ascontiguousarray(statics[:, *inner], np.float32),
            nearest_spacing(spacing * block[2].spacing_km),
        )
    raise SourceError(
        f"No complete patch for factor {configuration.factor} was found in {ATTEMPTS} draws; regions are "
        f"{[r.quanta.shape for r in regions]}. Larger or less gappy regions are needed."
    )


def _draw_block(
    regions: Sequence[Region],
    configuration: FactorConfiguration,
    spacing: int,
    drift: NDArray[np.float64],
    rng: np.random.Generator,
) -> tuple[NDArray[np.float32], NDArray[np.float32], Region] | None:
    """Return complete amounts [mm] of a block with halo, its static fields and region, or None on a gap or an edge.

    The block moves by `drift` cells per step along y and x, unless there are static fields, which rain belongs to.
    """
    factor = configuration.factor
    steps = (configuration.context_length + 2) * factor.time
    cells = (patch_cells(factor, spacing) + 2) * factor.space * spacing
    totals = np.array([r.weights.sum() + 1e-9 for r in regions])
    region = regions[rng.choice(len(regions), p=totals / totals.sum())]
    offsets = np.rint(np.arange(steps)[:, None] * drift * (not len(region.statics))).astype(int)
    offsets -= offsets.min(axis=0)
    size = (steps, *(cells + offsets.max(axis=0)))
    room = [n - m for n, m in zip(region.quanta.shape, size, strict=True)]
    if min(room) < 0:
        return None
    centre = _draw_centre(region, rng)
    start = [
        int(np.clip(c - rng.integers(m // 4, m - m // 4 + 1), 0, r)) for c, m, r in zip(centre, size, room, strict=True)
    ]
    t, y, x = start
    frames = region.quanta[t : t + steps]
    quanta = np.stack(
        [frame[y + v : y + v + cells, x + u : x + u + cells] for frame, (v, u) in zip(frames, offsets, strict=True)]
    )
    if (quanta == MISSING).any():
        return None
    amount = quanta.astype(np.float32) * np.float32(QUANTUM_MM)
    return amount, region.statics[:, y : y + cells, x : x + cells], region


def _draw_centre(region: Region, rng: np.random.Generator) -> tuple[int, int, int]:
    if rng.random() < DRY_SHARE or not region.weights.any():
        t, y, x = (int(rng.integers(n)) for n in region.quanta.shape)
        return t, y, x
    flat = region.weights.ravel()
    index = np.unravel_index(rng.choice(flat.size, p=flat / flat.sum()), region.weights.shape)
    block = (WEIGHT_BLOCK[0], WEIGHT_BLOCK[1], WEIGHT_BLOCK[1])
    t, y, x = (int(i * b + rng.integers(b)) for i, b in zip(index, block, strict=True))
    return t, y, x


def _coarser_grid(block: NDArray[np.float32], spacing: int) -> NDArray[np.float32]:
    return block if spacing == 1 else coarsen(block, Factor(space=spacing, time=1))


def _augmented(
    fine: NDArray[np.float32], statics: NDArray[np.float32], rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    if rng.random() < 0.5:
        fine, statics = fine[:, ::-1], statics[:, ::-1]
    if rng.random() < 0.5:
        fine, statics = fine[:, :, ::-1], statics[:, :, ::-1]
    if rng.random() < 0.5:
        fine, statics = fine.swapaxes(1, 2), statics.swapaxes(1, 2)
    if rng.random() < REVERSED_SHARE:
        fine = fine[::-1]
    power = np.exp(rng.uniform(-CONTRAST, CONTRAST))
    scale = CONTRAST_MM * np.exp(rng.uniform(-AMPLITUDE, AMPLITUDE))
    return np.ascontiguousarray((scale * (fine / CONTRAST_MM) ** power).astype(np.float32)), statics
