"""Evaluation of a checkpoint on fine data: coarsen, downscale, score, beside the baselines in the same run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from stsr_core.ensemble.downscale import ensemble_quanta
from stsr_core.ensemble.plan import Plan, Recipe
from stsr_core.ensemble.sums import sums
from stsr_core.evaluation.bars import Bar, bars
from stsr_core.evaluation.baselines import RAINFARMS, even_spreading, linear, rainfarm, without_rainfarm
from stsr_core.evaluation.bootstrap import Block, block_of, ratio_interval, sums_by_block
from stsr_core.evaluation.closure import Watched, closure_mm, closures
from stsr_core.evaluation.reference import reference_ensemble
from stsr_core.evaluation.scores import (
    characteristics,
    crps_field,
    expected_error,
    power_spectrum,
    rank_histogram,
    ratio,
    scores,
    squared_error,
)
from stsr_core.evaluation.truth import Truth, read_truth
from stsr_core.evaluation.variants import (
    HOW,
    MEAN_ONLY,
    NO_ATTENTION,
    NOT_DISTILLED,
    UNCONSERVED,
    sampler_variants,
    variants,
    without_attention,
)
from stsr_core.factors import nearest_spacing
from stsr_core.progress import Watch, unwatched
from stsr_core.sources.cube import as_cube
from stsr_core.sources.declared import NOTHING, Declared
from stsr_core.sources.location import OptionsOf, no_options
from stsr_core.statics import StaticSource, require_seen, static_fields
from stsr_core.store.layout import amounts_of
from stsr_core.store.statistics import added, statistics
from stsr_core.store.verify import closure_of
from stsr_core.version import code_version

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stsr_core.checkpoint import Checkpoint, Served
    from stsr_core.downscaler import Downscaler
    from stsr_core.factors import Factor

Table = dict[str, dict[str, float]]
WARMING = (1.07, 1.20)  # factors on the coarse input whose signal must survive downscaling
OURS = "stsr"
REFERENCE = "reference"
OF_TRUTH = " of the truth"  # whose response stands beside that of our members


@dataclass(frozen=True)
class Options:
    """What is scored.

    Attributes:
        members: members of the ensembles.
        hours: fine steps, the wettest.
        cells: fine cells along the square in the middle.
        variable: name of the amounts.
        declared: what the files do not say themselves.
        base: folder that relative paths start from.
        coarser: times that the spacing of the fine grids is multiplied by, to stand for other grids.
        seed: of the ensembles.
        workers: threads.
        ablations: also score variants of sampler, windows and conservation.
        reference: also score the authors' setting, see `evaluation.reference`.
        warming: also score the response to a wetter input.
        statics: where the static fields are that the checkpoint needs, by name.
        options_of: gives the options of the filesystem of a URL.
    """

    members: int = 8
    hours: int = 24
    cells: int = 384
    variable: str = "precipitation"
    declared: Declared = NOTHING
    base: Path | None = None
    coarser: int = 1
    seed: int = 1
    workers: int = 1
    ablations: bool = False
    reference: bool = False
    warming: bool = False
    statics: Mapping[str, StaticSource] = field(default_factory=dict)
    options_of: OptionsOf = no_options


@dataclass(frozen=True)
class Evaluation:
    """Scores of one checkpoint at one factor, and what a report draws of them.

    Attributes:
        factor: (s, t).
        options: what was scored.
        precision: in which the networks computed.
        truth: what was scored against.
        told_km: spacing of the fine grids as the networks were told it.
        table: scores by method and name.
        ablations: methods of the table that are variants, see `evaluation.variants`.
        left_out: why baselines were, by name.
        block: what the intervals resample.
        blocks: number of these.
        intervals: 95 % interval of scores of `stsr` by name, CRPS ratios and spread/skill; NaN where it is unknown.
        ranks: rank histogram by method, (M + 1,).
        spectra: radially averaged power by method, truth included.
        fields: ensembles by method, (M, P, T, Y, X), for pictures.
        statistics: of the ensembles of `stsr`, see `store.statistics`.
        signal: response of what members are like by warming factor.
    """

    factor: Factor
    options: Options
    precision: str
    truth: Truth
    told_km: int
    table: Table
    ablations: tuple[str, ...]
    left_out: dict[str, str]
    block: Block
    blocks: int
    intervals: dict[str, tuple[float, float]]
    ranks: dict[str, NDArray[np.float64]]
    spectra: dict[str, NDArray[np.float64]]
    fields: dict[str, NDArray[np.float32]]
    statistics: dict[str, float]
    signal: dict[str, dict[str, float]]

    @property
    def bars(self) -> list[Bar]:
        """What the checkpoint must keep to, and whether it does."""
        return bars(self.table[OURS], self.factor, self.left_out)

    def as_json(self, checkpoint: Checkpoint) -> dict[str, object]:
        """Every number, ready for json.dump; None for those that are undefined, for which JSON has no word."""
        numbers = {
            "checkpoint": {"name": checkpoint.card.name, "digest": checkpoint.digest},
            "code": code_version(),
            "precision": self.precision,
            "seed": self.options.seed,
            "factor": [self.factor.space, self.factor.time],
            "places": list(self.truth.names),
            "shape": list(self.truth.fine.shape),
            "spacing_km": self.truth.spacing_km,
            "step_h": self.truth.step_h,
            "told_km": self.told_km,
            "members": len(self.fields[OURS]),
            "bars": [
                {"score": bar.score, "found": bar.found, "needed": [bar.low, bar.high], "verdict": bar.verdict}
                for bar in self.bars
            ],
            "truth": characteristics(self.truth.fine[None], self.truth.steps_per_day),
            "scores": self.table,
            "ablations": {"methods": self.ablations, "how": HOW},
            "statistics": self.statistics,
            "intervals_95": self.intervals,
            "resampled": {"what": str(self.block), "number": self.blocks},
            "rank_histograms": {name: ranks.tolist() for name, ranks in self.ranks.items()},
            "power_by_wavenumber": {name: power.tolist() for name, power in self.spectra.items()},
            "warming": self.signal,
        }
        return {name: _defined(value) for name, value in numbers.items()}


def _defined(value: object) -> object:
    """The same with None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {name: _defined(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_defined(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class _Made:
    """An ensemble (M, P, T, Y, X) [mm per fine step], and scores that come of making it, by name."""

    fields: NDArray[np.float32]
    known: dict[str, float]


@dataclass(frozen=True)
class _Runner:
    """Runs one checkpoint on all places of a truth."""

    checkpoint: Checkpoint
    downscaler: Downscaler
    truth: Truth
    options: Options
    report: Callable[[str], None]
    watch: Watch

    @property
    def factor(self) -> Factor:
        """(s, t)."""
        return self.downscaler.factor

    def ensemble(
        self,
        *,
        name: str,
        served: Served | None = None,
        raised: float = 1.0,
        conserve: bool = True,
        members: int = 0,
    ) -> _Made:
        """Make an ensemble of the coarse amounts, raised by a factor, as the store would keep it; `name` is watched."""
        downscaler = Watched.of(self.downscaler, served or self.downscaler.served)
        o, factor, coarse = self.options, self.factor, self.truth.coarse * np.float32(raised)
        recipe = Recipe.of(
            self.checkpoint, downscaler.served, seed=o.seed, members=members or o.members, conserve=conserve
        )  # fmt: skip
        plans = [Plan((as_cube(c, factor),), recipe, s) for c, s in zip(coarse, self.truth.statics, strict=True)]
        with self.watch(name, sum(plan.evaluations(shard) for plan in plans for shard in plan.shards)) as advance:
            made = [ensemble_quanta(plan, downscaler, workers=o.workers, progress=advance) for plan in plans]
        stored = np.stack(made, axis=1)
        amount = amounts_of(stored)
        # what is not conserved is stored with the blocks' own totals, to half a quantum in one of their cells
        before = max(downscaler.off_mm, default=0.0) if conserve else closure_mm(amount, coarse, factor)
        after = max(closure_of(stored[:, p], place, factor)[0] for p, place in enumerate(coarse))
        return _Made(amount, {"closure_mm": before, "closure_quanta": after})

    def other(self, places: Sequence[NDArray[np.float32]]) -> _Made:
        """What another method made of every place, (M, T, Y, X), missing where the truth is."""
        fields = np.stack(places, axis=1)
        fields[:, np.isnan(self.truth.fine)] = np.nan
        return _Made(fields, closures(fields, self.truth.coarse, self.factor))

    def timed(self, name: str, make: Callable[[], _Made]) -> _Made:
        """Make an ensemble of all members, and note how long one takes."""
        started = time.monotonic()
        made = make()
        seconds = (time.monotonic() - started) / self.options.members
        self.report(f"{name}: {self.options.members} members done, {seconds:.0f} s each")
        return replace(made, known=made.known | {"seconds_per_member": seconds})


def evaluate(
    checkpoint: Checkpoint,
    downscaler: Downscaler,
    urls: Sequence[str],
    options: Options,
    *,
    report: Callable[[str], None] = lambda _: None,
    watch: Watch = unwatched,
) -> Evaluation:
    """Score a checkpoint and the baselines on fine files, all files as one sample.

    `report` is called with a line about each part that is done, `watch` with the name and length of what is begun.
    """
    factor = downscaler.factor
    require_seen(checkpoint.card.statics, options.statics)
    truth = read_truth(
        urls, factor, hours=options.hours, cells=options.cells, variable=options.variable, declared=options.declared,
        base=options.base, coarser=options.coarser,
        statics=lambda grid: static_fields(checkpoint.card.statics, options.statics, grid),
        options_of=options.options_of,
    )  # fmt: skip
    told = nearest_spacing(truth.spacing_km, checkpoint.card.spacings_km)
    report(
        f"{len(truth.names)} places, {truth.fine.shape[1:]} fine steps and cells of {truth.spacing_km:.2g} km "
        f"(networks are told {told} km), factor {factor}"
    )
    if doubt := checkpoint.card.strange(truth.spacing_km, timedelta(hours=truth.step_h)):
        report(doubt)
    runner = _Runner(checkpoint, downscaler.told(told), truth, options, report, watch)
    left_out = {
        name: why for name, smooth in RAINFARMS.items() if (why := without_rainfarm(truth.coarse.shape, smooth=smooth))
    }
    for name, why in left_out.items():
        report(f"{name} is left out: {why}")
    main = {OURS: runner.timed(OURS, partial(runner.ensemble, name=OURS)), **_baselines(runner, left_out)}
    extra = _ablations(runner) if options.ablations else {}
    reference = {REFERENCE: runner.timed(REFERENCE, partial(_reference, runner))} if options.reference else {}
    return _evaluation(runner, main, extra, reference, left_out)


def _evaluation(
    runner: _Runner,
    main: Mapping[str, _Made],
    extra: Mapping[str, _Made],
    reference: Mapping[str, _Made],
    left_out: dict[str, str],
) -> Evaluation:
    """Score what was made: our ensemble and the baselines, which are drawn too, variants, and the reference."""
    truth, made = runner.truth, {**main, **extra, **reference}
    block = block_of(truth.fine, truth.steps_per_day)
    table, sums_of_crps = _scored(made, truth, runner.factor, block, runner.watch)
    ours, others = main[OURS].fields, [name for name in main if name != OURS]
    intervals = {f"crps_over_{name}": ratio_interval(sums_of_crps[OURS], sums_of_crps[name]) for name in others}
    for name in others:
        table[OURS][f"crps_over_{name}"] = ratio(table[OURS]["crps"], table[name]["crps"])
    if len(ours) > 1:
        spread, error = expected_error(ours), squared_error(ours, truth.fine)
        low, high = ratio_interval(sums_by_block(spread, block), sums_by_block(error, block))
        intervals["spread_skill"] = math.sqrt(low), math.sqrt(high)
    return Evaluation(
        factor=runner.factor,
        options=runner.options,
        precision=str(runner.downscaler.precision).removeprefix("torch."),
        truth=truth,
        told_km=runner.downscaler.served.configuration.spacing_km,
        table=table,
        ablations=tuple(extra),
        left_out=left_out,
        block=block,
        blocks=len(sums_of_crps[OURS]),
        intervals=intervals,
        ranks={name: rank_histogram(m.fields, truth.fine) for name, m in made.items()},
        spectra={"truth": power_spectrum(truth.fine), **{n: power_spectrum(m.fields) for n, m in main.items()}},
        fields={name: m.fields for name, m in main.items()},
        statistics=_own_statistics(ours, runner.factor),
        signal=_warming(runner, ours) if runner.options.warming else {},
    )


def _scored(
    made: Mapping[str, _Made], truth: Truth, factor: Factor, block: Block, watch: Watch
) -> tuple[Table, dict[str, NDArray[np.float64]]]:
    """Scores of ensembles by name, and their CRPS by block of the bootstrap."""
    table: Table = {}
    blocks = {}
    with watch("scores", len(made)) as advance:
        for name, each in made.items():
            started = time.monotonic()
            crps = crps_field(each.fields, truth.fine)
            found = scores(each.fields, truth.fine, factor, steps_per_day=truth.steps_per_day)
            table[name] = {"crps": float(np.nanmean(crps, dtype=np.float64)), **found, **each.known}
            blocks[name] = sums_by_block(crps, block)
            advance(1, time.monotonic() - started)
    return table, blocks


def _own_statistics(fields: NDArray[np.float32], factor: Factor) -> dict[str, float]:
    """Statistics of ensembles (M, places, T, Y, X) [mm per fine step]."""
    places = torch.from_numpy(fields).unbind(dim=1)
    return statistics(added(sums(place.split(factor.space, dim=2), factor) for place in places))


def _baselines(runner: _Runner, left_out: Mapping[str, str]) -> dict[str, _Made]:
    coarse, factor, options = runner.truth.coarse, runner.factor, runner.options
    found = {
        "even": runner.other([even_spreading(c, factor) for c in coarse]),
        "linear": runner.other([linear(c, factor) for c in coarse]),
    }
    for name in (name for name in RAINFARMS if name not in left_out):
        with runner.watch(name, options.members * len(coarse)) as advance:
            drawn = partial(rainfarm, smooth=RAINFARMS[name], progress=advance)
            found[name] = runner.other([drawn(c, factor, options.members, options.seed) for c in coarse])
    return found


def _ablations(runner: _Runner) -> dict[str, _Made]:
    """Ensembles with parts switched off or changed at inference, see `evaluation.variants`."""
    served = runner.downscaler.served
    teacher = replace(runner, downscaler=runner.downscaler.teacher(runner.checkpoint))
    taught = teacher.downscaler.served
    before = {} if taught is served else {NOT_DISTILLED: taught}
    cases: dict[str, Callable[..., _Made]] = {
        **{
            name: partial(runner.ensemble, served=variant, members=1 if name == MEAN_ONLY else 0)
            for name, variant in variants(served).items()
        },
        **{name: partial(teacher.ensemble, served=v) for name, v in (before | sampler_variants(taught)).items()},
        UNCONSERVED: partial(runner.ensemble, conserve=False),
        NO_ATTENTION: replace(runner, downscaler=without_attention(runner.downscaler)).ensemble,
    }
    found = {}
    for name, make in cases.items():
        found[name] = make(name=name)
        runner.report(f"{name}: done")
    return found


def _reference(runner: _Runner) -> _Made:
    """The authors' setting on all places."""
    downscaler, options, truth = runner.downscaler.teacher(runner.checkpoint), runner.options, runner.truth
    return runner.other(
        [
            reference_ensemble(downscaler, place, options.members, options.seed, statics=fields, progress=runner.report)
            for place, fields in zip(truth.coarse, truth.statics, strict=True)
        ]
    )


def _warming(runner: _Runner, base: NDArray[np.float32]) -> dict[str, dict[str, float]]:
    """Response of what members are like to a coarse input raised by the factors of WARMING.

    Beside each response stands that of the truth raised by the same factor.
    """
    truth, days = runner.truth.fine[None], runner.truth.steps_per_day
    before, reference = characteristics(base, days), characteristics(truth, days)
    signal = {}
    for factor in WARMING:
        name = f"input x {factor:g}"
        after = characteristics(runner.ensemble(name=name, raised=factor).fields, days)
        expected = characteristics(truth * np.float32(factor), days)
        signal[f"{factor:g}"] = {k: ratio(after[k], before[k]) for k in before} | {
            f"{k}{OF_TRUTH}": ratio(expected[k], reference[k]) for k in reference
        }
        runner.report(f"{name}: done")
    return signal
