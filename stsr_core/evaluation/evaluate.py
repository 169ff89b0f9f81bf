"""Evaluation of a checkpoint on fine data: coarsen, downscale, score, beside the baselines in the same run."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from stsr_core.ensemble.downscale import ensemble_quanta
from stsr_core.ensemble.plan import Plan, Recipe
from stsr_core.ensemble.sums import sums
from stsr_core.evaluation.baselines import even_spreading, linear, rainfarm, without_rainfarm
from stsr_core.evaluation.bootstrap import ratio_interval, sums_by_block
from stsr_core.evaluation.reference import reference_ensemble
from stsr_core.evaluation.scores import crps_field, power_spectrum, rank_histogram, ratio, scores
from stsr_core.evaluation.truth import Truth, read_truth
from stsr_core.factors import ConservationFunction, nearest_spacing
from stsr_core.networks.layers import Level
from stsr_core.progress import Watch, unwatched
from stsr_core.sources.cube import as_cube
from stsr_core.sources.declared import NOTHING, Declared
from stsr_core.sources.location import OptionsOf, no_options
from stsr_core.statics import StaticSource, require_seen, static_fields
from stsr_core.store.layout import MISSING, QUANTUM_MM
from stsr_core.store.statistics import WET_MM, added, statistics
from stsr_core.store.verify import closure_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stsr_core.checkpoint import Checkpoint, Served
    from stsr_core.downscaler import Downscaler
    from stsr_core.factors import Factor

Table = dict[str, dict[str, float]]
WARMING = (1.07, 1.20)  # factors on the coarse input whose signal must survive downscaling
OURS = "stsr"
REFERENCE = "reference"
NOT_DISTILLED = "not distilled"  # what variants of the sampler vary
UNCONSERVED, NO_ATTENTION = "without conservation", "without attention over time"
RAINFARMS = {"rainfarm": False, "rainfarm_smooth": True}  # whether it is smoothed
BASELINES = ("even", "linear", *RAINFARMS)


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
        truth: what was scored against.
        told_km: spacing of the fine grids as the networks were told it.
        table: scores by method and name.
        intervals: 95 % interval of the CRPS ratio of `stsr` over each other method, NaN where it is unknown.
        blocks: number of blocks of hours and places that the intervals are of.
        ranks: rank histogram of `stsr`, (M + 1,).
        spectra: radially averaged power by method, truth included.
        fields: ensembles by method, (M, P, T, Y, X), for pictures.
        statistics: of the ensembles of `stsr`, see `store.statistics`.
        signal: response of means, wet frequency and quantiles by warming factor.
    """

    factor: Factor
    truth: Truth
    told_km: int
    table: Table
    intervals: dict[str, tuple[float, float]]
    blocks: int
    ranks: NDArray[np.float64]
    spectra: dict[str, NDArray[np.float64]]
    fields: dict[str, NDArray[np.float32]]
    statistics: dict[str, float]
    signal: dict[str, dict[str, float]] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """Every number, ready for json.dump; None for those that are undefined, for which JSON has no word."""
        numbers = {
            "factor": [self.factor.space, self.factor.time],
            "places": list(self.truth.names),
            "shape": list(self.truth.fine.shape),
            "spacing_km": self.truth.spacing_km,
            "told_km": self.told_km,
            "members": len(self.fields[OURS]),
            "scores": self.table,
            "statistics": self.statistics,
            "crps_ratio_intervals_95": self.intervals,
            "crps_ratio_blocks": self.blocks,
            "rank_histogram": self.ranks.tolist(),
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
class _Runner:
    """Runs one checkpoint on all places of a truth."""

    checkpoint: Checkpoint
    downscaler: Downscaler
    truth: Truth
    options: Options
    watch: Watch = unwatched

    def ensemble(
        self,
        coarse: NDArray[np.float32],
        served: Served | None = None,
        *,
        name: str = OURS,
        conserve: bool = True,
        members: int = 0,
    ) -> tuple[NDArray[np.float32], int]:
        """Ensemble (M, P, T, Y, X) [mm per fine step] and its largest closure [quanta]; `name` is watched."""
        used = served or self.downscaler.served
        downscaler = replace(self.downscaler, served=used)
        o, factor = self.options, downscaler.factor
        recipe = Recipe.of(self.checkpoint, used, seed=o.seed, members=members or o.members, conserve=conserve)
        plans = [Plan((as_cube(c, factor),), recipe, s) for c, s in zip(coarse, self.truth.statics, strict=True)]
        with self.watch(name, sum(plan.evaluations(shard) for plan in plans for shard in plan.shards)) as advance:
            made = [ensemble_quanta(plan, downscaler, workers=o.workers, progress=advance) for plan in plans]
        stored = np.stack(made, axis=1)
        closure = max(closure_of(stored[:, p], place, factor)[0] for p, place in enumerate(coarse))
        amount = np.where(stored == MISSING, np.float32(np.nan), stored * np.float32(QUANTUM_MM))
        return amount.astype(np.float32), closure


def variants(served: Served) -> dict[str, Served]:
    """Variants of windows and conservation, by name; no network is trained again."""
    c = served.configuration
    exact = ConservationFunction(threshold_mm=c.conservation.threshold_mm)
    uncut = ConservationFunction(threshold_mm=0.0, excess=c.conservation.excess)

    def with_f(f: ConservationFunction) -> Served:
        return served.model_copy(update={"configuration": c.model_copy(update={"conservation": f})})

    def with_length(length: int) -> Served:
        return served.model_copy(update={"configuration": c.model_copy(update={"context_length": length})})

    return {
        "mean only": served.model_copy(update={"residual_scale": 0.0, "evaluations": 1}),
        "f exact": with_f(exact),
        "f without threshold": with_f(uncut),
        "half of L": with_length(max(1, c.context_length // 2)),
        "twice L": with_length(2 * c.context_length),
    }


def sampler_variants(served: Served) -> dict[str, Served]:
    """Variants of the sampler, by name, of a denoiser that was not distilled: any steps serve it."""
    c = served.configuration

    def with_beta(beta: float) -> Served:
        return served.model_copy(update={"configuration": c.model_copy(update={"beta": beta})})

    return {
        "half the evaluations": served.model_copy(update={"evaluations": max(1, served.evaluations // 2)}),
        "twice the evaluations": served.model_copy(update={"evaluations": 2 * served.evaluations}),
        "half of beta": with_beta(c.beta / 2),
        "twice beta": with_beta(c.beta * 2),
    }


def without_attention(downscaler: Downscaler) -> Downscaler:
    """The same networks with attention over time switched off."""
    networks = {}
    for name in ("mean_network", "denoiser"):
        networks[name] = copy.deepcopy(getattr(downscaler, name))
        for module in networks[name].modules():
            if isinstance(module, Level):
                module.attention = None
    return replace(downscaler, **networks)


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
    downscaler = downscaler.told(told)
    report(
        f"{len(truth.names)} places, {truth.fine.shape[1:]} fine steps and cells of {truth.spacing_km:.2g} km "
        f"(networks are told {told} km), factor {factor}"
    )
    if doubt := checkpoint.card.strange(truth.spacing_km, timedelta(hours=truth.step_h)):
        report(doubt)
    runner = _Runner(checkpoint, downscaler, truth, options, watch)
    fields: dict[str, NDArray[np.float32]] = {}
    seconds: dict[str, float] = {}
    with _timed(seconds, OURS, options.members):
        fields[OURS], closure = runner.ensemble(truth.coarse)
    report(f"{OURS}: {options.members} members done, {seconds[OURS]:.0f} s each")
    fields |= _baselines(truth, factor, options, report, watch)
    extra = _ablations(runner, truth, report) if options.ablations else {}
    if options.reference:
        with _timed(seconds, REFERENCE, options.members):
            extra[REFERENCE] = _reference(downscaler.teacher(checkpoint), truth, options, report)
        report(f"{REFERENCE}: {options.members} members done, {seconds[REFERENCE]:.0f} s each")
    table, blocks = _scored(fields | extra, truth, factor, watch)
    table[OURS]["closure_quanta"] = closure
    for name, value in seconds.items():
        table[name]["seconds_per_member"] = value
    others = [name for name in fields if name != OURS]
    for name in others:
        table[OURS][f"crps_over_{name}"] = ratio(table[OURS]["crps"], table[name]["crps"])
    return Evaluation(
        factor=factor,
        truth=truth,
        told_km=told,
        table=table,
        intervals={name: ratio_interval(blocks[OURS], blocks[name]) for name in others},
        blocks=len(blocks[OURS]),
        ranks=rank_histogram(fields[OURS], truth.fine),
        spectra={"truth": power_spectrum(truth.fine), **{name: power_spectrum(f) for name, f in fields.items()}},
        fields=fields,
        statistics=_own_statistics(fields[OURS], factor),
        signal=_warming(runner, truth, fields[OURS], report) if options.warming else {},
    )


def _scored(
    ensembles: Mapping[str, NDArray[np.float32]], truth: Truth, factor: Factor, watch: Watch
) -> tuple[Table, dict[str, NDArray[np.float64]]]:
    """Scores of ensembles (M, P, T, Y, X) by name, and their CRPS by block of the bootstrap."""
    table: Table = {}
    blocks = {}
    with watch("scores", len(ensembles)) as advance:
        for name, ensemble in ensembles.items():
            started = time.monotonic()
            crps = crps_field(ensemble, truth.fine)
            found = scores(ensemble, truth.fine, factor, steps_per_day=max(1, round(24 / truth.step_h)))
            table[name] = {"crps": float(np.nanmean(crps, dtype=np.float64)), **found}
            blocks[name] = sums_by_block(crps)
            advance(1, time.monotonic() - started)
    return table, blocks


def _own_statistics(fields: NDArray[np.float32], factor: Factor) -> dict[str, float]:
    """Statistics of ensembles (M, places, T, Y, X) [mm per fine step]."""
    places = torch.from_numpy(fields).unbind(dim=1)
    return statistics(added(sums(place.split(factor.space, dim=2), factor) for place in places))


def _baselines(
    truth: Truth, factor: Factor, options: Options, report: Callable[[str], None], watch: Watch
) -> dict[str, NDArray[np.float32]]:
    fields = {
        "even": np.stack([even_spreading(c, factor) for c in truth.coarse], axis=1),
        "linear": np.stack([linear(c, factor) for c in truth.coarse], axis=1),
    }
    for name, smooth in RAINFARMS.items():
        if why := without_rainfarm(truth.coarse.shape, smooth=smooth):
            report(f"{name} is left out: {why}")
            continue
        with watch(name, options.members * len(truth.coarse)) as advance:
            places = [
                rainfarm(c, factor, options.members, options.seed, smooth=smooth, progress=advance)
                for c in truth.coarse
            ]
        fields[name] = np.stack(places, axis=1)
    hole = np.isnan(truth.fine)
    for field_ in fields.values():
        field_[:, hole] = np.nan
    return fields


def _ablations(runner: _Runner, truth: Truth, report: Callable[[str], None]) -> dict[str, NDArray[np.float32]]:
    found = {}
    for name, served in variants(runner.downscaler.served).items():
        found[name] = runner.ensemble(truth.coarse, served, name=name, members=1 if name == "mean only" else 0)[0]
        report(f"{name}: done")
    teacher = replace(runner, downscaler=runner.downscaler.teacher(runner.checkpoint))
    taught = teacher.downscaler.served
    before = {} if taught is runner.downscaler.served else {NOT_DISTILLED: taught}
    for name, served in (before | sampler_variants(taught)).items():
        found[name] = teacher.ensemble(truth.coarse, served, name=name)[0]
        report(f"{name}: done")
    found[UNCONSERVED] = runner.ensemble(truth.coarse, name=UNCONSERVED, conserve=False)[0]
    report(f"{UNCONSERVED}: done")
    silent = replace(runner, downscaler=without_attention(runner.downscaler))
    found[NO_ATTENTION] = silent.ensemble(truth.coarse, name=NO_ATTENTION)[0]
    report(f"{NO_ATTENTION}: done")
    return found


def _reference(
    downscaler: Downscaler, truth: Truth, options: Options, report: Callable[[str], None]
) -> NDArray[np.float32]:
    """The authors' setting on all places."""
    places = [
        reference_ensemble(downscaler, place, options.members, options.seed, statics=fields, progress=report)
        for place, fields in zip(truth.coarse, truth.statics, strict=True)
    ]
    found = np.stack(places, axis=1)
    found[:, np.isnan(truth.fine)] = np.nan
    return found


@contextmanager
def _timed(seconds: dict[str, float], name: str, members: int) -> Iterator[None]:
    """Note how long a member takes."""
    started = time.monotonic()
    yield
    seconds[name] = (time.monotonic() - started) / members


def _warming(
    runner: _Runner, truth: Truth, base: NDArray[np.float32], report: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Response of ensemble statistics to a coarse input raised by the factors of WARMING.

    Beside each response stands that of the truth raised by the same factor.
    """
    signal = {}
    for factor in WARMING:
        raised, _ = runner.ensemble(truth.coarse * np.float32(factor), name=f"input x {factor:g}")
        before, after = _distribution(base), _distribution(raised)
        expected = _distribution(truth.fine * np.float32(factor))
        reference = _distribution(truth.fine)
        signal[f"{factor:g}"] = {k: ratio(after[k], before[k]) for k in before} | {
            f"{k} of the truth": ratio(expected[k], reference[k]) for k in before
        }
        report(f"input x {factor:g}: done")
    return signal


def _distribution(fields: NDArray[np.float32]) -> Mapping[str, float]:
    return {
        "mean": float(np.nanmean(fields, dtype=np.float64)),
        "wet fraction": float((fields > WET_MM).mean()),
        "quantile 0.99": float(np.nanquantile(fields, 0.99)),
        "quantile 0.999": float(np.nanquantile(fields, 0.999)),
    }
