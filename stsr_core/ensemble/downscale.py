"""An ensemble from an array or a file, without a catalogue."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch

from stsr_core.checkpoint import Library
from stsr_core.downscaler import Downscaler, choose_device
from stsr_core.ensemble.cluster import Cluster
from stsr_core.ensemble.generate import Target, generate, remaining, require_made
from stsr_core.ensemble.plan import Plan, Shard
from stsr_core.ensemble.product import planned
from stsr_core.ensemble.shard import make_shard
from stsr_core.errors import ConfigurationError, FactorError, GridError, StoreError
from stsr_core.factors import Factor
from stsr_core.grids import TimeLabel
from stsr_core.regrid import regrid_to_factor
from stsr_core.statics import StaticSource, require_seen
from stsr_core.store.group import finish, is_whole, remove_store, reopen, require_own, shape_of
from stsr_core.store.layout import (
    PRECIPITATION,
    StoreLayout,
    amounts_of,
    axis_attributes,
    coordinates,
    create_ensemble,
)
from stsr_core.store.patience import require_answer

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

    from stsr_core.grids import Grid
    from stsr_core.progress import Advance
    from stsr_core.sources.cube import Cube

BEYOND_DEG = 1e-6  # that the edges of cells may lie beyond a pole by rounding
ARRAY = "precipitation"  # name of the amounts in every store


def ensemble_quanta(
    plan: Plan, downscaler: Downscaler, *, workers: int = 1, progress: Advance = lambda _, __: None
) -> NDArray[np.uint16]:
    """Make all shards of a plan in this process.

    Args:
        plan: what to make.
        downscaler: networks.
        workers: threads, on a CPU; one fills a GPU.
        progress: called with the number of network evaluations just done and the seconds they took, from any of the
            threads, one at a time.

    Returns:
        Amounts in quanta of 0.01 mm, (member, time, y, x), uint16.
    """
    out, lock = np.empty(plan.fine_shape, np.uint16), Lock()

    def done(evaluations: int, seconds: float) -> None:
        with lock:
            progress(evaluations, seconds)

    def make(shard: Shard) -> None:
        torch.set_num_threads(1)
        out[shard.region(plan.space, plan.time)] = make_shard(plan.task(shard), downscaler, done).quanta

    with ThreadPoolExecutor(workers if downscaler.device.type == "cpu" else 1) as pool:
        list(pool.map(make, plan.shards))
    return out


def matched(
    cubes: tuple[Cube, ...], space: int, time: int, library: Library, *, nearest: bool
) -> tuple[tuple[Cube, ...], Factor]:
    """Return the cubes and the factor that serve a request.

    With `nearest`, the cubes are regridded so that the fine grid asked for is reached by the nearest factor.

    Raises:
        FactorError: (space, time) is not served and `nearest` is off, or nothing near enough is.
    """
    if not nearest:
        try:
            return cubes, library.family.exact(space, time)
        except FactorError as e:
            advice = ""
            with suppress(FactorError):  # that nothing is near enough
                library.family.nearest(space, time)
                advice = " Or let it be regridded to the nearest, by --nearest or `nearest=True`."
            raise FactorError(f"{e}{advice}") from e
    factor = library.family.nearest(space, time).factor
    return tuple(regrid_to_factor(cube, (space, time), factor) for cube in cubes), factor


def prepared(
    cubes: tuple[Cube, ...],
    *,
    space: int,
    time: int,
    members: int,
    seed: int,
    nearest: bool,
    conserve: bool,
    device: str,
    checkpoints: str | None,
    statics: Mapping[str, StaticSource] = MappingProxyType({}),
) -> tuple[Plan, Downscaler]:
    """Plan an ensemble over the cubes of its driving members and load the networks it needs."""
    _require_within_poles(cubes[0].grid)
    library = Library.open(checkpoints)
    cubes, factor = matched(cubes, space, time, library, nearest=nearest)
    checkpoint = library.serving(factor)
    require_seen(checkpoint.card.statics, statics)
    plan = planned(cubes, factor, library, seed=seed, members=members, conserve=conserve, statics=statics)
    downscaler = Downscaler.load(checkpoint, factor, choose_device(device))
    return plan, downscaler.told(plan.recipe.served.configuration.spacing_km)


def _require_within_poles(grid: Grid) -> None:
    """Refuse cells beyond a pole, as around nodes at 90 degrees; raises GridError."""
    beyond = float(np.abs(grid.y.edges).max()) - 90.0
    if axis_attributes(grid)[0].get("standard_name") in ("latitude", "grid_latitude") and beyond > BEYOND_DEG:
        raise GridError(
            f"The rows of cells at the pole reach to {90 + beyond:g} degrees. Leave them out, by --bbox or a slice of "
            "the array, or use a product, whose target grid takes of them what there is."
        )


def _require_sensible(array: object, time_label: str | None, workers: int, **numbers: object) -> None:
    """Refuse arguments from Python that the command line has no way to give; raises ConfigurationError."""
    import xarray as xr

    if not isinstance(array, xr.DataArray):
        raise ConfigurationError(f"A {type(array).__name__} is given; an xarray.DataArray is needed, as ds['pr'].")
    for name, number in {**numbers, "workers": workers}.items():
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            raise ConfigurationError(f"{name} is {number!r}; a whole number is needed.")
    if workers < 0:
        raise ConfigurationError(f"workers is {workers}; a number of threads is needed, or 0 for one per core.")
    if time_label not in (None, *get_args(TimeLabel)):
        raise ConfigurationError(f"time_label is {time_label!r}; start, middle or end is needed.")


def downscale(
    da: xr.DataArray,
    *,
    space: int,
    time: int,
    members: int = 8,
    seed: int = 0,
    nearest: bool = False,
    conserve: bool = True,
    device: str = "auto",
    checkpoints: str | None = None,
    workers: int = 0,
    time_label: TimeLabel | None = None,
    step_h: float | None = None,
    statics: Mapping[str, StaticSource] = MappingProxyType({}),
) -> xr.DataArray:
    """Downscale an array of precipitation amounts to an ensemble, in memory.

    Args:
        da: amount per step with units, dims (time, y, x) or (time, lat, lon), on regular axes; NaN is missing. An
            axis of realizations, such as `member`, holds driving members.
        space: fine cells per cell along each axis.
        time: fine steps per step.
        members: number of members, of each driving member where there are several.
        seed: same seed, same numbers; member k does not depend on how many there are.
        nearest: serve a factor that no checkpoint was trained for by regridding to the nearest one.
        conserve: enforce that every input cell keeps its amount.
        device: "auto", "cpu" or "cuda".
        checkpoints: folder of checkpoints; None for the shipped ones.
        workers: threads on a CPU; 0 means one per core. The result does not depend on it.
        time_label: which point of its interval a time stamp names; None assumes the end and says so in the
            attribute `time_label_assumed`.
        step_h: hours of a step, of an array that has only one.
        statics: where the static fields are that the checkpoint needs, by name.

    Returns:
        `precipitation`, (member, time, y, x), float32, mm per fine step: the amount of an input cell is the
        sum over its `time` steps of the mean of its `space` x `space` cells. `driving_member` along `member`
        says which input it is of, where the input has driving members.

    Raises:
        SourceError: the array cannot be read without guessing.
        FactorError: (space, time) is not served.
        GridError: cells beyond a pole.
        ConfigurationError: an argument that cannot be.
        StoreError: an amount beyond what 16 bits hold at 0.01 mm.
    """
    import xarray as xr

    from stsr_core.sources.declared import Declared
    from stsr_core.sources.harmonise import cubes_of

    _require_sensible(da, time_label, workers, space=space, time=time, members=members, seed=seed)
    cubes = cubes_of(da, Declared(time_label=time_label or "end", step_h=step_h))
    if time_label is None:
        cubes = tuple(replace(c, attributes={**c.attributes, "time_label_assumed": "end"}) for c in cubes)
    plan, downscaler = prepared(
        cubes,
        space=space,
        time=time,
        members=members,
        seed=seed,
        nearest=nearest,
        conserve=conserve,
        device=device,
        checkpoints=checkpoints,
        statics=statics,
    )
    quanta = ensemble_quanta(plan, downscaler, workers=workers or os.cpu_count() or 1)
    layout = layout_of(plan)
    return xr.DataArray(
        amounts_of(quanta),
        dims=("member", "time", "y", "x"),
        coords=coordinates(layout),
        name=ARRAY,
        attrs={**PRECIPITATION, **layout.attributes},
    )


def layout_of(plan: Plan, attributes: Mapping[str, str] | None = None) -> StoreLayout:
    """Layout of the store that holds a plan's ensemble."""
    steps, rows, columns = plan.block
    configuration = plan.recipe.served.configuration
    stated = {
        "factor": str(configuration.factor),
        "seed": str(plan.recipe.seed),
        "checkpoint": plan.recipe.checkpoint_digest,
        "conservation": "enforced" if plan.recipe.conserve else "not enforced",
    }
    return StoreLayout(
        members=plan.fine_shape[0],
        times=plan.fine_times,
        grid=plan.fine_grid,
        member_block=plan.member_block,
        time_block=steps * plan.time,
        tile=(rows * plan.space, columns * plan.space),
        attributes={**plan.cube.attributes, **stated, **(attributes or {})},
        driving=plan.driving,
    )


def downscale_to_store(
    plan: Plan,
    downscaler: Downscaler,
    output: str,
    *,
    cluster: Cluster,
    overwrite: bool = False,
    extend: bool = False,
    storage_options: Mapping[str, object] | None = None,
    progress: Advance = lambda _, __: None,
) -> None:
    """Write a plan's ensemble to a Zarr store on a cluster; the same call again finishes what was interrupted.

    The store opens as a group only when it is whole. Damaged shards of a whole store are made again.

    Args:
        plan: what to make.
        downscaler: the plan's networks, on the CPU.
        output: folder or URL of the store; a folder is that of the driver's working directory on every worker.
        cluster: where to make it.
        overwrite: replace the store that is there, unless it is this ensemble, begun and not whole.
        extend: let a whole store grow to more members, or to a longer period; its finished shards stay.
        storage_options: of the output's filesystem.
        progress: called with the number of network evaluations just done and the seconds they took.

    Raises:
        StoreError: `output` is whole already, holds another ensemble or something else than a store of this code, or
            cannot be reached or written.
    """
    options, output = storage_options or {}, _absolute(output)
    require_answer(output, options)
    require_own(output, options)
    target, layout = Target(output, ARRAY, options), layout_of(plan)
    shards = _left_of_begun(plan, target) if overwrite else remaining(plan, target, extend=extend)
    anew = overwrite and len(shards) == len(plan.shards)
    whole = not anew and is_whole(output, options)
    if whole:
        _check_whole(output, shape_of(output, ARRAY, options), layout.shape, damage=bool(shards), extend=extend)
    with cluster.client() as client:  # first, for nothing may change where there is no cluster
        if anew:
            remove_store(output, options)
        elif whole:
            reopen(output, options)
        create_ensemble(output, layout, array=ARRAY, options=options, keep=len(shards) < len(plan.shards))
        generate(plan, shards, downscaler, target, client, cluster, progress=progress)
    require_made(plan, target)
    finish(output, layout.attributes, options)


def _left_of_begun(plan: Plan, target: Target) -> Sequence[Shard]:
    """Shards that are left of an ensemble that the same command began and did not finish; else all of them."""
    try:
        return plan.shards if is_whole(target.url, target.options) else remaining(plan, target)
    except StoreError:  # of another ensemble, or damaged
        return plan.shards


def _absolute(output: str) -> str:
    """Address that means the same on every worker; with a slash at its end objects would have two names."""
    return output.rstrip("/") if "://" in output else str(Path(output).absolute())


def _check_whole(output: str, found: tuple[int, ...], wanted: tuple[int, ...], *, damage: bool, extend: bool) -> None:
    """Refuse to touch a whole store unless it is damaged, or may grow and does."""
    if not found or found == wanted:
        if not damage:
            raise StoreError(f"{output} is there and whole. Name another output, or pass --overwrite to replace it.")
        return
    grows = found[2:] == wanted[2:] and all(a <= b for a, b in zip(found, wanted, strict=True))
    if not (extend and grows):
        raise StoreError(
            f"{output} is there and whole, of shape {found}; {wanted} is asked for. Name another output, or pass "
            f"{'--extend to let it grow, or ' if grows else ''}--overwrite to replace it."
        )
