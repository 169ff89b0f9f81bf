"""The command `stsr`: arguments in, one paragraph out."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from stsr_core.catalog.command import catalog_app
from stsr_core.errors import ConfigurationError, StsrError

app = typer.Typer(
    help="Turn coarse climate-model precipitation into published, versioned, high-resolution ensembles.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(catalog_app, name="catalog")


class Device(StrEnum):
    """Where the networks run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class TimeLabelName(StrEnum):
    """Which point of its interval a time stamp names."""

    start = "start"
    middle = "middle"
    end = "end"


class PresetName(StrEnum):
    """Size of the networks."""

    small = "small"
    base = "base"
    large = "large"


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
    to: Annotated[Path, typer.Option(help="Folder that the catalogue is published in.")] = Path("stsr-demo"),
    force: Annotated[bool, typer.Option("--force", help="Publish a new version though nothing is new.")] = False,
    members: Annotated[int | None, typer.Option(help="Members; without it those of the product.")] = None,
    device: Annotated[Device, typer.Option(help="Where the networks run.")] = Device.auto,
    workers: Annotated[int, typer.Option(help="Dask workers; 0 is one per core or GPU.")] = 0,
) -> None:
    """Run the nightly flow on the shipped ARPEGE forecast and publish it under ./stsr-demo.

    A second run finds nothing new and publishes nothing; --force publishes version 2.
    """
    from flows.embedded import run_embedded

    published = run_embedded(to, force=force, members=members, device=device.value, workers=workers)
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
def downscale(
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="NetCDF or Zarr, path or URL (s3://, https://), with (time, y, x).")
    ],
    output: Annotated[str, typer.Argument(help="Zarr store to write: a folder or s3://bucket/prefix.")],
    variable: Annotated[str, typer.Option(help="Variable that holds precipitation amounts per step.")],
    space: Annotated[int, typer.Option(help="Fine cells per input cell along x and y.")],
    time: Annotated[int, typer.Option(help="Fine steps per input step.")],
    members: Annotated[int, typer.Option(help="Members of the ensemble.")] = 8,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    device: Annotated[Device, typer.Option(help="Where the networks run.")] = Device.auto,
    conserve: Annotated[bool, typer.Option(help="Keep the amount of every input cell exactly.")] = True,
    nearest: Annotated[bool, typer.Option("--nearest", help="Regrid to the nearest served factor.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUTPUT.")] = False,
    workers: Annotated[int, typer.Option(help="Dask workers; 0 is one per core or GPU.")] = 0,
    units: Annotated[str | None, typer.Option(help="Units, where the file does not say them.")] = None,
    time_label: Annotated[
        TimeLabelName | None, typer.Option(help="What a time stamp names, where there are no time bounds [end].")
    ] = None,
) -> None:
    """Downscale a file without a catalogue.

    OUTPUT gets `precipitation` (member, time, y, x) in mm per fine step. The amount of an input cell is the sum
    over its fine steps of the area mean of its fine cells. The same command again finishes what was interrupted.
    """
    from stsr_core.ensemble.cluster import Cluster
    from stsr_core.ensemble.downscale import downscale_to_store, prepared
    from stsr_core.progress import progress_bar
    from stsr_core.settings import Settings
    from stsr_core.sources.harmonise import read_cube
    from stsr_core.sources.open import open_dataset

    settings = Settings()
    with open_dataset(source, storage_options=_options(source, settings)) as dataset:
        label: Any = None if time_label is None else time_label.value
        cube = read_cube(dataset, variable, units=units, time_label=label)
    plan, downscaler = prepared(
        cube,
        space=space,
        time=time,
        members=members,
        seed=seed,
        nearest=nearest,
        conserve=conserve,
        device=device.value,
        checkpoints=settings.checkpoints,
    )
    total = sum(plan.evaluations(shard) for shard in plan.shards)
    cluster = Cluster(settings.scheduler_address, device.value, workers or settings.workers)
    with progress_bar("network evaluations", total) as advance:
        downscale_to_store(
            plan,
            downscaler,
            output,
            cluster=cluster,
            overwrite=overwrite,
            storage_options=_options(output, settings),
            progress=advance,
        )
    _, nt, ny, nx = plan.fine_shape
    say(f"{output}: precipitation of {members} members, {nt} steps, {ny} x {nx} cells. Open it with xarray.open_zarr.")


def _options(url: str, settings: Any) -> dict[str, object]:
    return settings.s3_options if url.startswith("s3://") else {}


@app.command()
def train(
    train: Annotated[list[Path], typer.Option("--train", help="Fine NetCDF files, or folders of them, to fit on.")],
    validation: Annotated[list[Path], typer.Option("--validation", help="Likewise, to watch the loss on.")],
    factors: Annotated[
        list[str], typer.Option("--factor", help="Factor SPACExTIME, as 8x3; several train one checkpoint together.")
    ],
    folder: Annotated[Path, typer.Option(help="Folder of the training; the same again resumes it.")] = Path(
        "runs/train"
    ),
    name: Annotated[str, typer.Option(help="Name of the checkpoint.")] = "stsr",
    preset: Annotated[PresetName, typer.Option(help="Size of the networks.")] = PresetName.small,
    mean_steps: Annotated[int | None, typer.Option(help="Steps of the mean network; default by preset.")] = None,
    denoiser_steps: Annotated[int | None, typer.Option(help="Steps of the denoiser; default by preset.")] = None,
    device: Annotated[Device, typer.Option(help="Where to train.")] = Device.auto,
    seed: Annotated[int, typer.Option(help="Seed of weights and patches.")] = 0,
) -> None:
    """Train a checkpoint on fine precipitation; several processes or GPUs by `torchrun -m stsr_core.cli train ...`.

    The networks see all factors asked for. Kill it at any time: the same command goes on from the last save.
    """
    from stsr_core.training.command import train_checkpoint

    checkpoint = train_checkpoint(
        train,
        validation,
        [_factor(f) for f in factors],
        folder=folder,
        name=name,
        preset=preset.value,
        mean_steps=mean_steps,
        denoiser_steps=denoiser_steps,
        device=device.value,
        seed=seed,
        report=say,
    )
    say(f"Checkpoint {checkpoint.weights_path.with_suffix('.json')}, digest {checkpoint.digest[:12]}.")


def _factor(text: str) -> tuple[int, int]:
    space, _, time = text.partition("x")
    if not (space.isdigit() and time.isdigit()):
        raise ConfigurationError(f"Factor {text!r} is no SPACExTIME; write it as 8x3.")
    return int(space), int(time)


@app.command()
def evaluate(
    data: Annotated[list[Path], typer.Argument(help="Fine NetCDF files, or folders of them.")],
    space: Annotated[int, typer.Option(help="Factor in space.")],
    time: Annotated[int, typer.Option(help="Factor in time.")],
    members: Annotated[int, typer.Option(help="Members.")] = 8,
    hours: Annotated[int, typer.Option(help="Fine steps of the crop, the wettest.")] = 24,
    cells: Annotated[int, typer.Option(help="Fine cells along the crop, in the middle.")] = 256,
    workers: Annotated[int, typer.Option(help="Threads.")] = 0,
    checkpoints: Annotated[Path | None, typer.Option(help="Folder of checkpoints; default the shipped ones.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Write the scores to the checkpoint's card.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all scores here.")] = None,
) -> None:
    """Score a checkpoint against fine truth, beside linear interpolation and even spreading."""
    from stsr_core.evaluation.command import evaluate_checkpoint, table_text

    table = evaluate_checkpoint(
        data, space, time,
        members=members, hours=hours, cells=cells, workers=workers or os.cpu_count() or 1,
        checkpoints=checkpoints, record=record, json_file=json_file, report=lambda s: print(s, file=sys.stderr),
    )  # fmt: skip
    say(table_text(table))


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
