"""From the arguments of `stsr evaluate` to a table, a page and numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from stsr_core.checkpoint import Library, Measured, with_measured
from stsr_core.configuration import Configuration, Declarations
from stsr_core.downscaler import Downscaler, choose_device
from stsr_core.errors import ConfigurationError
from stsr_core.evaluation.evaluate import OURS, Evaluation, Options, Table, evaluate
from stsr_core.evaluation.report import html_report, number_text
from stsr_core.factors import authors_recipe
from stsr_core.progress import Watch, unwatched

RECORDED_WITHIN = 1.25  # ratio of a grid's spacing to the one told up to which the card has its scores under the latter


def chosen_data(
    urls: Sequence[str],
    archive: str | None,
    options: Options,
    *,
    variable: str | None,
    declare: Sequence[str],
    catalog_file: Path,
) -> tuple[Sequence[str], Options]:
    """Fine files to score against, those named or the validation files of an archive, and options that read them.

    Of an archive the variable and the declarations hold, unless others are given.

    Raises:
        ConfigurationError: neither or both are named, no such archive, or a line that is no declaration.
    """
    if bool(urls) == (archive is not None):
        raise ConfigurationError("Name fine files, or an archive of catalog.yaml; one of the two, not both.")
    given = Declarations.of(declare)
    if archive is None:
        return urls, replace(options, variable=variable or options.variable, declared=given.declared)
    found = Configuration.load(catalog_file).archive(archive)
    return found.validation, replace(
        options, variable=variable or found.variable, declared=given.over(found.declared),
        base=catalog_file.resolve().parent,
    )  # fmt: skip


def evaluate_checkpoint(
    data: Sequence[str],
    space: int,
    time: int,
    options: Options,
    *,
    checkpoints: Path | None,
    record: bool,
    json_file: Path | None,
    html_file: Path | None,
    device: str,
    precision: str = "auto",
    report: Callable[[str], None],
    watch: Watch = unwatched,
) -> Evaluation:
    """Evaluate the checkpoint that serves (space, time), and keep its scores where asked.

    Raises:
        ConfigurationError: no folder for what is to be written, or a spacing that the card does not speak of.
        FactorError: a factor that is not served, or the authors' setting of one that they give none for.
    """
    require_folder(json_file)
    require_folder(html_file)
    library = Library.open(checkpoints)
    factor = library.family.exact(space, time)
    if options.reference:
        authors_recipe(factor)  # before hours of work
    checkpoint = library.serving(factor)
    downscaler = Downscaler.load(checkpoint, factor, choose_device(device), precision=precision)
    evaluation = evaluate(checkpoint, downscaler, data, options, report=report, watch=watch)
    spacing, told = evaluation.truth.spacing_km, evaluation.told_km
    fitting = max(spacing / told, told / spacing) <= RECORDED_WITHIN
    if record and fitting:
        scores = {k: round(v, 4) for k, v in evaluation.table[OURS].items() if math.isfinite(v)}
        statistics = {name: round(value, 4) for name, value in evaluation.statistics.items()}
        checkpoint = with_measured(checkpoint, factor, told, Measured(scores=scores, statistics=statistics))
    if json_file is not None:
        json_file.write_text(json.dumps(evaluation.as_json(checkpoint), indent=1, allow_nan=False))
    if html_file is not None:
        html_file.write_text(html_report(evaluation, checkpoint), encoding="utf-8")
    if record and not fitting:
        raise ConfigurationError(
            f"Scores on a grid of {spacing:.2g} km are not recorded: the networks are told {told} km there, and "
            f"under that the card has scores on {told} km. All else is written. Leave --record out."
        )
    return evaluation


def require_folder(path: Path | None) -> None:
    """Refuse a file that could not be written in the end; raises ConfigurationError."""
    if path is not None and path.is_dir():
        raise ConfigurationError(f"{path} is a folder. Name a file to write.")
    if path is not None and not path.absolute().parent.is_dir():
        raise ConfigurationError(f"There is no folder {path.absolute().parent} to write {path.name} to. Make it first.")


def table_text(table: Table) -> str:
    """Format scores as a plain table, one row a score, one column a method."""
    methods = list(table)
    names = list(dict.fromkeys(name for scores in table.values() for name in scores))
    rows = [["score", *methods]]
    rows += [[n, *(number_text(table[m].get(n)) for m in methods)] for n in names]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
