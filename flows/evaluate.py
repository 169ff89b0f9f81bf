"""The evaluate flow: score a checkpoint against fine truth, beside its baselines."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from pydantic import Field

from flows import artifacts
from flows.log import event
from flows.parameters import HomePath, Place
from flows.stages import patient
from stsr_core.configuration import choose_catalog
from stsr_core.evaluation.command import chosen_data, evaluate_checkpoint
from stsr_core.evaluation.evaluate import Evaluation, Options
from stsr_core.evaluation.report import number_text
from stsr_core.factors import Factor
from stsr_core.settings import Settings
from stsr_core.statics import named_sources

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from stsr_core.evaluation.bars import Bar
    from stsr_core.evaluation.evaluate import Table
    from stsr_core.progress import Advance


@flow(name="evaluate", flow_run_name="evaluate {factor}", validate_parameters=True)
def evaluate(
    factor: Factor,
    data: list[Place] | None = None,
    archive: str | None = None,
    members: Annotated[int, Field(ge=1, le=1000)] = 8,
    hours: Annotated[int, Field(ge=1)] = 24,
    cells: Annotated[int, Field(ge=8)] = 384,
    coarser: Annotated[int, Field(ge=1, le=25)] = 1,
    variable: str | None = None,
    declare: list[str] | None = None,
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1,
    ablations: bool = False,
    reference: bool = False,
    warming: bool = False,
    checkpoints: HomePath | None = None,
    record: bool = False,
    report: HomePath | None = None,
    numbers: HomePath | None = None,
    statics: list[str] | None = None,
) -> dict[str, dict[str, float]]:
    """Score the checkpoint that serves a factor, and show the table.

    Args:
        factor: factor that is scored.
        data: fine files, folders of NetCDF files, globs or URLs.
        archive: without files, archive of catalog.yaml whose validation files are scored.
        members: number of members.
        hours: fine steps that are scored, the wettest of each file.
        cells: fine cells along the square that is scored, in the middle.
        coarser: times that the spacing of the data is multiplied by first, to stand for other grids.
        variable: variable that holds the amounts; without it that of the archive, or precipitation.
        declare: what the files do not say, each as a line of a source in catalog.yaml, such as `units: mm/h`.
        seed: seed of the ensembles.
        ablations: also score variants of sampler, windows and f.
        reference: also score the authors' setting; slow.
        warming: also score the response to a wetter input.
        checkpoints: folder of checkpoints; without it that of the settings, else the shipped ones.
        record: write scores and statistics to the checkpoint's card, under the spacing of the fine grid.
        report: write a page with tables and pictures here.
        numbers: write all numbers here, as JSON.
        statics: static fields that the checkpoint needs, by their names in catalog.yaml, or as NAME=FILE.

    Returns:
        Scores by method and name.
    """
    settings = Settings()
    workers = settings.workers or os.cpu_count() or 1
    catalog_file = choose_catalog(settings.catalog_file)
    options = Options(
        members=members, hours=hours, cells=cells, coarser=coarser, seed=seed, workers=workers,
        ablations=ablations, reference=reference, warming=warming,
        statics=named_sources(statics or [], catalog_file, settings.source_options),
        options_of=settings.source_options,
    )  # fmt: skip
    urls, options = chosen_data(
        data or [], archive, options, variable=variable, declare=declare or [], catalog_file=catalog_file
    )
    own = Path(settings.checkpoints) if settings.checkpoints else None
    named = patient(score, f"score {factor} on {len(urls)} inputs", hours=7 * 24)
    evaluation = named(
        urls, factor, options, checkpoints=checkpoints or own, record=record, report=report, numbers=numbers
    )  # fmt: skip
    artifacts.table(_key("scores", factor), score_rows(evaluation.table), f"Scores of {factor}")
    artifacts.table(_key("bars", factor), bar_rows(evaluation.bars), f"What {factor} must keep to")
    return {method: dict(scores) for method, scores in evaluation.table.items()}


@task(name="score", cache_policy=NO_CACHE)
def score(
    data: Sequence[str],
    factor: Factor,
    options: Options,
    *,
    checkpoints: Path | None,
    record: bool,
    report: Path | None,
    numbers: Path | None,
) -> Evaluation:
    """Score."""
    settings = Settings()

    def watch(part: str, total: int) -> AbstractContextManager[Advance]:
        return artifacts.live_progress(_key("progress", factor, part), total, f"Progress of {part} at {factor}")

    return evaluate_checkpoint(
        data, factor.space, factor.time, options,
        checkpoints=checkpoints, record=record, json_file=numbers, html_file=report, device=settings.device,
        precision=settings.precision, watch=watch,
        report=lambda said: event("score", factor=factor, said=said),
    )  # fmt: skip


def _key(kind: str, factor: Factor, *parts: str) -> str:
    return artifacts.key_of(kind, f"{factor.space}x{factor.time}", *parts)


def bar_rows(bars: Sequence[Bar]) -> list[dict[str, str | int | float]]:
    """One row a bar."""
    return [
        {
            "bar": bar.score,
            "wanted": f"{bar.low:g} to {bar.high:g}",
            "found": number_text(bar.found),
            "met": bar.verdict,
        }
        for bar in bars
    ]


def score_rows(scores: Table) -> list[dict[str, str | int | float]]:
    """One row a score, one column a method."""
    names = dict.fromkeys(name for values in scores.values() for name in values)
    return [
        {"score": name, **{m: round(v[name], 4) for m, v in scores.items() if math.isfinite(v.get(name, math.nan))}}
        for name in names
    ]
