"""The command `stsr`: arguments in, one paragraph out."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stsr_core import operations
from stsr_core.catalog.command import catalog_app
from stsr_core.errors import ConfigurationError, StsrError
from stsr_core.home import at_home
from stsr_core.training.presets import PresetName, RecipeName

if TYPE_CHECKING:
    from stsr_core.settings import DeviceName, Settings
    from stsr_core.statics import StaticSource

app = typer.Typer(
    help="Turn coarse climate-model precipitation into published, versioned, high-resolution ensembles.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(catalog_app, name="catalog")
for command in (operations.doctor, operations.deploy, operations.up):
    app.command()(command)


class Device(StrEnum):
    """Where the networks run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


DeclareOption = Annotated[
    list[str] | None,
    typer.Option(
        "--declare",
        metavar="LINE",
        help="What the file does not say, as a line of a source in catalog.yaml: 'units: mm/h', 'time_label: end', "
        "'select: {number: 0}'. Repeat it for more; `stsr inspect` says which are needed.",
    ),
]
DeviceOption = Annotated[Device | None, typer.Option(help="Where the networks run; default STSR_DEVICE, else auto.")]
StaticOption = Annotated[
    list[str] | None,
    typer.Option(
        "--static",
        metavar="NAME[=FILE]",
        help="Static field, such as orography: the variable NAME of FILE, or NAME under `statics:` in catalog.yaml. "
        "Repeat it for more.",
    ),
]


def say(text: str) -> None:
    """Print a line for the user."""
    typer.echo(text)


@app.callback()
def main_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,
) -> None:
    """Turn coarse climate-model precipitation into published, versioned, high-resolution ensembles."""
    if debug:
        os.environ["STSR_DEBUG"] = "1"


@app.command()
def demo(
    to: Annotated[Path, typer.Option(callback=at_home, help="Folder that the catalogue is published in.")] = Path(
        "stsr-demo"
    ),
    force: Annotated[bool, typer.Option("--force", help="Publish a new version though nothing is new.")] = False,
    members: Annotated[int | None, typer.Option(min=1, help="Members; without it those of the product.")] = None,
    device: DeviceOption = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Dask workers; default STSR_WORKERS, 0 is one per core or GPU.")
    ] = None,
) -> None:
    """Run the nightly flow on the shipped ARPEGE forecast and publish it under ./stsr-demo.

    A second run finds nothing new and publishes nothing; --force publishes version 2.
    """
    from flows.embedded import run_embedded
    from stsr_core.settings import Settings

    settings = Settings()
    chosen = settings.model_copy(
        update={
            "device": _device(device, settings),
            "workers": settings.workers if workers is None else workers,
        }
    )
    published = run_embedded(to, force=force, members=members, settings=chosen)
    if published is None:
        say(f"Nothing new since the last version under {to}; nothing was published. --force publishes it again.")
        return
    say(f"Published {published.product} {published.version}: {published.item}")
    say(f"Quick look: {published.quicklook}")
    say("Open it with:\n")
    say("    import stsr_core.catalog")
    say(f'    ds = stsr_core.catalog.open("{published.product}", catalog="{to}")')
    say('    print(ds["precipitation"].isel(member=0).sum("time"))')


@app.command()
def plan(
    product: Annotated[str, typer.Argument(help="Product of catalog.yaml.")],
    members: Annotated[int | None, typer.Option(min=1, help="Members; without it those of the product.")] = None,
) -> None:
    """Say what a run of a product would take, without running it: shards, evaluations, bytes, device hours.

    Shards done before are those that a run of the same version left when it died.
    """
    from stsr_core.catalog.search import newest
    from stsr_core.checkpoint import Library
    from stsr_core.configuration import Configuration, choose_catalog
    from stsr_core.ensemble.product import Cost, attempt_name, made_before, plan_product, to_lattice
    from stsr_core.regrid import native_factor, reach
    from stsr_core.settings import Settings
    from stsr_core.sources.harmonise import find
    from stsr_core.sources.open import fingerprint, open_dataset
    from stsr_core.statics import configured_sources

    settings = Settings()
    path = choose_catalog(settings.catalog_file)
    configuration = Configuration.load(path)
    wanted = configuration.product(product)
    if members is not None:
        wanted = wanted.model_copy(update={"members": members})
    source, target = configuration.sources[wanted.source], configuration.grids[wanted.grid]
    statics = configured_sources(configuration.statics, path.parent, settings.source_options)
    options = settings.source_options(source.url)
    with open_dataset(source.url, base=path.parent, storage_options=options) as dataset:
        reading = find(dataset, source.variable, source.declared, near=reach(target))
        library = Library.open(settings.checkpoints)
        found = library.family.nearest(*native_factor(reading, target), limit=settings.match_limit)
        planned = plan_product(to_lattice(reading, target, found.factor), found, library, wanted, statics)
    cost = Cost.of(planned, settings.device_rate)
    say(
        f"{product}: factor ({found.requested_space:.2f},{found.requested_time:.2f}) is needed, {found.factor} is "
        f"nearest (log distance {found.distance:.3f}); networks are told a fine spacing of "
        f"{planned.recipe.served.configuration.spacing_km} km"
    )
    place = settings.destination.rstrip("/")
    last = newest(product, place, storage_options=settings.options_of(place))
    found_now = fingerprint(source.url, base=path.parent, storage_options=options)
    attempt = attempt_name(planned, found_now, last.version if last is not None else "")
    done = made_before(
        planned, f"{place}/{product}/data/{attempt}/data.zarr/ensemble", "precipitation", settings.options_of(place)
    )
    rows = [*cost.rows(settings.price_per_device_hour), ("shards done before", str(done))]
    if len(planned.cubes) > 1:
        rows.insert(0, ("driving members", ", ".join(cube.driving for cube in planned.cubes)))
    for name, value in [("fine shape", str(planned.fine_shape)), *rows]:
        say(f"{name:>24}  {value}")
    cost.check(settings.max_device_hours)


@app.command()
def downscale(
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT", help="NetCDF, GRIB or Zarr, path, glob or URL (s3://, https://), with (time, y, x)."
        ),
    ],
    output: Annotated[
        str,
        typer.Argument(metavar="OUTPUT", callback=at_home, help="Zarr store to write: a folder or s3://bucket/prefix."),
    ],
    variable: Annotated[str, typer.Option(help="Variable that holds precipitation amounts per step.")],
    space: Annotated[int, typer.Option(min=1, help="Fine cells per input cell along x and y.")],
    time: Annotated[int, typer.Option(min=1, help="Fine steps per input step.")],
    members: Annotated[int, typer.Option(help="Members of the ensemble, of each driving member if INPUT has any.")] = 8,
    bbox: Annotated[
        str | None,
        typer.Option(help="WEST,SOUTH,EAST,NORTH in degrees: only the input cells that this box touches."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    device: DeviceOption = None,
    conserve: Annotated[bool, typer.Option(help="Keep the amount of every input cell exactly.")] = True,
    nearest: Annotated[bool, typer.Option("--nearest", help="Regrid to the nearest served factor.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the store at OUTPUT, if stsr wrote it.")
    ] = False,
    extend: Annotated[
        bool,
        typer.Option(
            "--extend", help="Let OUTPUT grow to more members or a longer INPUT; shards that this does not change stay."
        ),
    ] = False,
    workers: Annotated[int, typer.Option(min=0, help="Dask workers; 0 is one per core or GPU.")] = 0,
    declare: DeclareOption = None,
    static: StaticOption = None,
) -> None:
    """Downscale a file without a catalogue.

    OUTPUT gets `precipitation` (member, time, y, x) in mm per fine step. The amount of an input cell is the sum
    over its fine steps of the mean of its fine cells. The same command again finishes what was interrupted.
    """
    from stsr_core.checkpoint import Library
    from stsr_core.configuration import Declarations
    from stsr_core.ensemble.cluster import Cluster
    from stsr_core.ensemble.downscale import downscale_to_store, prepared
    from stsr_core.ensemble.product import Cost
    from stsr_core.progress import progress_bar
    from stsr_core.settings import Settings
    from stsr_core.sources.box import Box, degrees
    from stsr_core.sources.harmonise import read_cubes
    from stsr_core.sources.open import open_dataset

    settings, near = Settings(), None if bbox is None else Box.of_degrees(*degrees(bbox))
    with open_dataset(source, storage_options=settings.source_options(source)) as dataset:
        cubes = read_cubes(dataset, variable, Declarations.of(declare or []).declared, near=near)
    plan, downscaler = prepared(
        cubes,
        space=space,
        time=time,
        members=members,
        seed=seed,
        nearest=nearest,
        conserve=conserve,
        device="cpu",  # workers move their copy to their device
        checkpoints=settings.checkpoints,
        statics=_statics(static, settings),
    )
    if doubt := plan.strange(Library.open(settings.checkpoints).serving(downscaler.factor).card):
        say(doubt)
    cost = Cost.of(plan, settings.device_rate)
    cost.check(settings.max_device_hours)
    cluster = Cluster(
        settings.scheduler_address, _device(device, settings), workers or settings.workers, settings.precision
    )
    with progress_bar("network evaluations", cost.evaluations) as advance:
        downscale_to_store(
            plan,
            downscaler,
            output,
            cluster=cluster,
            overwrite=overwrite,
            extend=extend,
            storage_options=settings.options_of(output),
            progress=advance,
        )
    made, nt, ny, nx = plan.fine_shape
    each = f" ({members} of each of {len(cubes)} driving members)" if len(cubes) > 1 else ""
    say(f"{output}: precipitation of {made} members{each}, {nt} steps, {ny} x {nx} cells. Open it with "
        "xarray.open_zarr.")  # fmt: skip


@app.command()
def inspect(
    url: Annotated[str, typer.Argument(help="NetCDF, GRIB, Zarr or kerchunk references: path, glob or URL.")],
    variable: Annotated[str | None, typer.Option(help="The precipitation; several that add up as 'cp + lsp'.")] = None,
    source: Annotated[str | None, typer.Option(help="Source of catalog.yaml whose declarations hold.")] = None,
    declare: DeclareOption = None,
    product: Annotated[str | None, typer.Option(help="Product whose factor is shown; without it all of them.")] = None,
    catalog_file: Annotated[
        Path | None, typer.Option(callback=at_home, help="catalog.yaml; else ./catalog.yaml or the shipped one.")
    ] = None,
) -> None:
    """Say what a file is, how it would be read, and what catalog.yaml must declare before it can be."""
    from stsr_core.checkpoint import Library
    from stsr_core.configuration import Configuration, Declarations, choose_catalog
    from stsr_core.inspection import inspect as look
    from stsr_core.settings import Settings
    from stsr_core.sources.open import open_dataset

    settings = Settings()
    configuration = Configuration.load(choose_catalog(catalog_file or settings.catalog_file))
    declared = configuration.source(source).declared if source else Declarations().declared
    declared = Declarations.of(declare or []).over(declared)
    with open_dataset(url, storage_options=settings.source_options(url)) as dataset:
        found = look(
            dataset, variable or (configuration.source(source).variable if source else None), declared, configuration,
            Library.open(settings.checkpoints), product=product, match_limit=settings.match_limit,
        )  # fmt: skip
    say(found.text())


def _statics(lines: list[str] | None, settings: Settings) -> dict[str, StaticSource]:
    """Where the static fields are that are named on the command line."""
    from stsr_core.configuration import choose_catalog
    from stsr_core.statics import named_sources

    return named_sources(lines or [], choose_catalog(settings.catalog_file), settings.source_options)


def _device(chosen: Device | None, settings: Settings) -> DeviceName:
    return settings.device if chosen is None else chosen.value


@app.command()
def train(
    archive: Annotated[str | None, typer.Option(help="Archive of catalog.yaml to train on.")] = None,
    train: Annotated[
        list[str] | None,
        typer.Option("--train", help="Without an archive: fine files, folders of them, globs or URLs to fit on."),
    ] = None,
    validation: Annotated[
        list[str] | None,
        typer.Option("--validation", help="Likewise, to choose on: the weights of the least loss are kept."),
    ] = None,
    space: Annotated[int | None, typer.Option(min=1, help="Factor in space.")] = None,
    time: Annotated[int | None, typer.Option(min=1, help="Factor in time.")] = None,
    factors: Annotated[
        list[str] | None,
        typer.Option("--factor", help="Factor SPACExTIME, as 8x3; several train one checkpoint together."),
    ] = None,
    folder: Annotated[
        Path, typer.Option(callback=at_home, help="Folder of the training; the same again resumes it.")
    ] = Path("runs/train"),
    name: Annotated[str, typer.Option(help="Name of the checkpoint.")] = "stsr",
    preset: Annotated[PresetName, typer.Option(help="Size of the networks.")] = PresetName.small,
    recipe: Annotated[
        RecipeName, typer.Option(help="beta and L: those of stsr, or of the authors as the reference.")
    ] = RecipeName.stsr,
    mean_steps: Annotated[
        int | None, typer.Option(min=0, help="Steps of the mean network; default by preset, 0 keeps that of --start.")
    ] = None,
    denoiser_steps: Annotated[
        int | None, typer.Option(min=0, help="Steps of the denoiser; default by preset, 0 keeps that of --start.")
    ] = None,
    distil_steps: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Steps in which it learns to make a member in 2 evaluations; 0 keeps that of --start or leaves 8.",
        ),
    ] = None,
    score_steps: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Steps in which that is trained on towards the least CRPS of whole members; 0 leaves it as it is.",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=0, max=1, help="Largest learning rate; default by preset.")
    ] = None,
    cells_per_step: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Fine cells and hours that one step learns from, on each GPU; default by preset. GPUs take more.",
        ),
    ] = None,
    calibration_patches: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Patches of validation data, per factor, on which the members' spread is chosen; default by preset. "
            "One is enough to try a training out, which then takes minutes less.",
        ),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            callback=at_home,
            help="Card (.json) of a checkpoint to start from, as one that is tuned to a radar of one's own.",
        ),
    ] = None,
    start_share: Annotated[
        float,
        typer.Option(help="Share of the weights of --start in the result; 0.5 generalises better where data are few."),
    ] = 0.0,
    only_spacing: Annotated[
        bool,
        typer.Option(
            "--only-spacing",
            help="Train only what tells the networks of --start the fine spacing; at 1 km they stay as they are.",
        ),
    ] = False,
    device: DeviceOption = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of weights and patches.")] = 0,
    catalog_file: Annotated[
        Path | None, typer.Option(callback=at_home, help="catalog.yaml that names the archive.")
    ] = None,
    static: StaticOption = None,
) -> None:
    """Train a checkpoint on fine precipitation; several processes or GPUs by `torchrun -m stsr_core.cli train`.

    One factor by --space and --time, or several together by --factor. Kill it at any time: the same command goes on
    from the last save.
    """
    from stsr_core.configuration import choose_catalog
    from stsr_core.factors import Factor
    from stsr_core.settings import Settings
    from stsr_core.training.command import Data, train_checkpoint

    wanted = [_factor(f) for f in factors or []]
    if (space is None) != (time is None) or bool(wanted) == (space is not None):
        raise ConfigurationError("Name --space and --time, or --factor once or more; one of the two.")
    if space is not None and time is not None:
        wanted = [(space, time)]
    settings = Settings()
    train_checkpoint(
        Data.of(
            archive,
            [at_home(place) for place in train or []],
            [at_home(place) for place in validation or []],
            choose_catalog(catalog_file or settings.catalog_file),
            static or [],
            settings.source_options,
        ),
        [Factor.of(*pair) for pair in wanted],
        folder=folder,
        name=name,
        preset=preset,
        recipe_name=recipe,
        sizes={
            "mean_steps": mean_steps,
            "denoiser_steps": denoiser_steps,
            "distil_steps": distil_steps,
            "score_steps": score_steps,
            "learning_rate": learning_rate,
            "cells_per_step": cells_per_step,
            "calibration_patches": calibration_patches,
        },
        start=start,
        start_share=start_share,
        only_spacing=only_spacing,
        device=_device(device, settings),
        seed=seed,
        report=say,
    )


def _factor(text: str) -> tuple[int, int]:
    space, _, time = text.partition("x")
    if not (space.isdecimal() and time.isdecimal() and int(space) and int(time)):
        raise ConfigurationError(f"Factor {text!r} is no SPACExTIME of numbers from 1; write it as 8x3.")
    return int(space), int(time)


@app.command()
def evaluate(
    space: Annotated[int, typer.Option(min=1, help="Factor in space.")],
    time: Annotated[int, typer.Option(min=1, help="Factor in time.")],
    data: Annotated[
        list[str] | None, typer.Argument(help="Fine files, folders of NetCDF files, globs or URLs.", show_default=False)
    ] = None,
    archive: Annotated[
        str | None, typer.Option(help="Without files: archive of catalog.yaml whose validation files are scored.")
    ] = None,
    members: Annotated[int, typer.Option(min=1, help="Members.")] = 8,
    hours: Annotated[int, typer.Option(min=1, help="Fine steps that are scored, the wettest of each file.")] = 24,
    cells: Annotated[int, typer.Option(min=1, help="Fine cells along the square that is scored, in the middle.")] = 384,
    coarser: Annotated[
        int,
        typer.Option(
            min=1, max=25, help="First average the data to so many times their spacing, to stand for other grids."
        ),
    ] = 1,
    variable: Annotated[
        str | None, typer.Option(help="Variable that holds the amounts; else that of the archive, or precipitation.")
    ] = None,
    declare: DeclareOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the ensembles.")] = 1,
    ablations: Annotated[
        bool, typer.Option("--ablations", help="Also score variants of sampler, windows and f.")
    ] = False,
    reference: Annotated[
        bool, typer.Option("--reference", help="Also score the authors' setting: 1000 evaluations, f by tile. Slow.")
    ] = False,
    warming: Annotated[bool, typer.Option("--warming", help="Also score the response to a wetter input.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Threads; default STSR_WORKERS, 0 is one per core.")
    ] = None,
    device: DeviceOption = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(callback=at_home, help="Folder of checkpoints; default STSR_CHECKPOINTS, else the shipped ones."),
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Write what is measured to the card, under the spacing of the grid.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", callback=at_home, help="Write all scores here.")] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", callback=at_home, help="Write a page with tables and pictures here.")
    ] = None,
    static: StaticOption = None,
) -> None:
    """Score a checkpoint against fine truth, beside even spreading, linear interpolation and RainFARM.

    Fine files are coarsened, downscaled again and scored, all files as one sample. RainFARM needs the extra
    `evaluate` (pip install 'stsr[evaluate]').
    """
    from stsr_core.configuration import choose_catalog
    from stsr_core.evaluation.command import chosen_data, evaluate_checkpoint, table_text
    from stsr_core.evaluation.evaluate import Options
    from stsr_core.evaluation.report import interval_text
    from stsr_core.progress import progress_bar
    from stsr_core.settings import Settings

    settings = Settings()
    own = Path(settings.checkpoints) if settings.checkpoints else None
    options = Options(
        members=members, hours=hours, cells=cells, coarser=coarser, seed=seed,
        workers=(settings.workers if workers is None else workers) or os.cpu_count() or 1, ablations=ablations,
        reference=reference, warming=warming, statics=_statics(static, settings), options_of=settings.source_options,
    )  # fmt: skip
    urls, options = chosen_data(
        [at_home(place) for place in data or []], archive, options,
        variable=variable, declare=declare or [], catalog_file=choose_catalog(settings.catalog_file),
    )  # fmt: skip
    evaluation = evaluate_checkpoint(
        urls, space, time, options,
        checkpoints=checkpoints or own, record=record, json_file=json_file, html_file=html_file,
        device=_device(device, settings), precision=settings.precision,
        report=lambda s: print(s, file=sys.stderr), watch=progress_bar,
    )  # fmt: skip
    say(table_text(evaluation.table))
    for name, interval in evaluation.intervals.items():
        say(f"{name}: 95 % interval {interval_text(interval, evaluation.blocks, evaluation.block)}")


@app.command()
def bench(
    context: typer.Context,
    factor: Annotated[str, typer.Option("--factor", help="Factor SPACExTIME.")] = "10x1",
    cells: Annotated[int, typer.Option(min=1, help="Fine cells along the square.")] = 200,
    steps: Annotated[int, typer.Option(min=1, help="Fine steps.")] = 24,
    members: Annotated[int, typer.Option(min=1, help="Members.")] = 8,
    workers: Annotated[list[int] | None, typer.Option(min=1, help="Local workers; several for several runs.")] = None,
    device: DeviceOption = None,
    output: Annotated[
        str | None, typer.Option(callback=at_home, help="Folder or s3://bucket/prefix to write to.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--input", help="Coarse file or URL; else the shipped forecast.")
    ] = None,
    variable: Annotated[str, typer.Option(help="Variable of --input.")] = "precipitation",
    declare: DeclareOption = None,
    training: Annotated[bool, typer.Option("--training", help="Also time training steps.")] = False,
    preset: Annotated[PresetName, typer.Option(help="Size of the networks of --training.")] = PresetName.small,
    regrid: Annotated[
        float | None,
        typer.Option("--regrid", min=0, metavar="YEARS", help="Only read and regrid years of 6-hourly input."),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Only say where the time of one shard goes.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", callback=at_home, help="Write all figures here.")] = None,
) -> None:
    """Measure the engine on this machine: throughput, scaling, memory, bytes, share outside the networks.

    --regrid measures what comes before it, and nothing else: reading and regridding `--cells` x `--cells` of input.
    """
    from stsr_core import bench as benchmark
    from stsr_core.bench_regrid import bench_regridding
    from stsr_core.configuration import Declarations
    from stsr_core.evaluation.command import require_folder
    from stsr_core.factors import Factor
    from stsr_core.settings import Settings

    require_folder(json_file)
    if profile and (json_file or output or training):
        raise ConfigurationError("--profile prints text and nothing else. Leave out --json, --output and --training.")
    if _is_given(context, "preset") and not training:
        raise ConfigurationError("--preset is of the networks of --training. Give that too, or leave it out.")
    if regrid is not None:
        _require_only(context, "regrid", "cells", "json_file")
        _say_figures(bench_regridding(regrid, cells=cells, report=say), json_file)
        return
    settings = Settings()
    declared = Declarations.of(declare or []).declared
    of = benchmark.Source(source or benchmark.SAMPLE, variable, declared, settings.source_options(source or ""))
    options = benchmark.Options(
        factor=Factor.of(*_factor(factor)), cells=cells, steps=steps, members=members,
        workers=tuple(workers or sorted({1, os.cpu_count() or 1})), device=_device(device, settings),
        precision=settings.precision, output=output, storage_options=settings.options_of(output or ""),
        source=of,
    )  # fmt: skip
    if profile:
        say(benchmark.profile_shard(options, checkpoints=settings.checkpoints))
        return
    figures = benchmark.bench_engine(options, checkpoints=settings.checkpoints, report=say)
    if training:
        figures |= benchmark.bench_training(options.factor, preset=preset, device=options.device)
    _say_figures(figures, json_file)


def _require_only(context: typer.Context, kept: str, *others: str) -> None:
    """Refuse options beside one, but for some others, that would be ignored; raises ConfigurationError."""
    names = {str(p.name): p.opts[0] for p in context.command.params}
    ignored = [option for name, option in names.items() if name not in (kept, *others) and _is_given(context, name)]
    if ignored:
        with_it = " and ".join(names[name] for name in others)
        raise ConfigurationError(f"{names[kept]} goes with {with_it} only. Leave out {', '.join(ignored)}.")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"  # Typer has an enumeration of its own, or that of Click


def _say_figures(figures: Mapping[str, object], json_file: Path | None) -> None:
    import json

    text = json.dumps(figures, indent=1)
    if json_file is not None:
        json_file.write_text(text + "\n")
    say(text)


def main() -> None:
    """Run `stsr`; errors on purpose are one paragraph and exit code 1."""
    try:
        app()
    except StsrError as e:
        if os.environ.get("STSR_DEBUG"):
            raise
        print(f"stsr: {e}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stsr: interrupted; the same command goes on from here.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
