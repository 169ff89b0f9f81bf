"""Benchmark of reading and regridding: years of 6-hourly input, against reading the same bytes and nothing else."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pyproj import CRS, Transformer

from stsr_core.grids import Axis, Grid
from stsr_core.regrid import regrid
from stsr_core.sources.harmonise import find
from stsr_core.sources.open import open_dataset

if TYPE_CHECKING:
    from numpy.typing import NDArray

STEPS_PER_YEAR = 1460  # 6-hourly, without leap days
CHUNK_STEPS = 120
ROUNDS = 3
MEASURED = ("raw", "read", "regrid")
SPACING_DEGREES = 0.1
SPACING_M = 10_000.0
LAEA = "EPSG:3035"
SOUTH_WEST = (42.0, 0.0)  # latitude and longitude of the first cell
Report = Callable[[str], None]


def bench_regridding(years: float, *, cells: int = 200, report: Report = print) -> dict[str, float]:
    """Write years of 6-hourly rain on `cells` x `cells` of 0.1 degrees, read it, regrid it to 10 km, block by block.

    Every measurement has a process of its own, which has imported what it needs. `raw` reads the values and nothing
    else; `read` makes amounts of them with all checks; `regrid` also regrids them. Seconds and peak memory are those of
    a tenth of the period and of all of it, and their difference says what goes on, from a year on, and what is done
    once; what is regridded is not kept. All is measured in ROUNDS, one after the other; the shortest time of each
    counts, which others on the machine lengthened least.

    Returns:
        Seconds, bytes and ratios, ready for json.dump.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/rain.zarr"
        steps = max(2 * CHUNK_STEPS, round(years * STEPS_PER_YEAR))
        _write(store, steps, cells)
        found: dict[str, float] = {"steps": steps, "cells": cells, "bytes": 4.0 * steps * cells**2}
        for part, size in (("tenth", steps // 10), ("all", steps)):
            for name, seconds, peak in _rounds(store, size, cells):
                found |= {f"{name}_seconds_{part}": seconds, f"{name}_peak_memory_{part}": peak}
        found |= _each_year(found, steps)
        for name in ("raw", "read"):
            found[f"regrid_over_{name}"] = found["regrid_seconds_all"] / found[f"{name}_seconds_all"]
        found["stored_bytes"] = sum(f.stat().st_size for f in Path(store).rglob("*") if f.is_file())
    report(
        f"{steps} steps of {cells} x {cells} ({found['bytes'] / 1e9:.2f} GB): read {found['raw_seconds_all']:.1f} s, "
        f"with checks {found['read_seconds_all']:.1f} s, regridded {found['regrid_seconds_all']:.1f} s "
        f"({found['regrid_over_read']:.2f} times reading with checks, {found['regrid_over_raw']:.2f} times without); "
        + _each_year_text(found)
        + f"peak memory {found['regrid_peak_memory_tenth'] / 1e9:.2f} GB for a tenth of it, "
        f"{found['regrid_peak_memory_all'] / 1e9:.2f} GB for all"
    )
    return found


def _each_year(found: Mapping[str, float], steps: int) -> dict[str, float]:
    """Seconds that a further year takes; none of less than a year, where they are smaller than what others add."""
    if steps < STEPS_PER_YEAR:
        return {}
    later = {name: found[f"{name}_seconds_all"] - found[f"{name}_seconds_tenth"] for name in MEASURED}
    return {f"{name}_seconds_each_year": s * STEPS_PER_YEAR / (steps - steps // 10) for name, s in later.items()}


def _each_year_text(found: Mapping[str, float]) -> str:
    if f"{MEASURED[0]}_seconds_each_year" not in found:
        return ""
    raw, read, regridded = (found[f"{name}_seconds_each_year"] for name in MEASURED)
    return f"each further year takes {raw:.2f}, {read:.2f} and {regridded:.2f} s; "


def _rounds(store: str, steps: int, cells: int) -> list[tuple[str, float, float]]:
    """Name, seconds and peak memory [bytes] of every measurement, see `bench_regridding`."""
    actions = dict(zip(MEASURED, (_read_raw, _read, _regrid), strict=True))
    rounds = [[_alone(action, store, steps, cells) for action in actions.values()] for _ in range(ROUNDS)]
    each = zip(*rounds, strict=True)
    return [(name, min(r[0] for r in runs), max(r[1] for r in runs)) for name, runs in zip(actions, each, strict=True)]


def _write(store: str, steps: int, cells: int) -> None:
    """A flux with dry places and wet ones, another in every chunk."""
    import zarr

    group = zarr.open_group(store, mode="w")
    rng = np.random.default_rng(0)
    south, west = SOUTH_WEST

    def put(name: str, values: NDArray[np.generic], dims: tuple[str, ...], **attributes: str) -> None:
        group.create_array(name, data=values, dimension_names=dims).attrs.update(attributes)

    hours = 6.0 * np.arange(steps + 1)
    put("time", hours[1:], ("time",), units="hours since 2001-01-01", calendar="noleap", bounds="time_bnds")
    put("time_bnds", np.stack((hours[:-1], hours[1:]), axis=1), ("time", "nv"))
    put("lat", south + SPACING_DEGREES * np.arange(cells), ("lat",), units="degrees_north")
    put("lon", west + SPACING_DEGREES * np.arange(cells), ("lon",), units="degrees_east")
    rain = group.create_array(
        "pr", shape=(steps, cells, cells), chunks=(CHUNK_STEPS, cells, cells), dtype="float32",
        dimension_names=("time", "lat", "lon"), attributes={"units": "kg m-2 s-1"},
    )  # fmt: skip
    for first in range(0, steps, CHUNK_STEPS):
        some = rng.gamma(0.2, 5e-4, (min(CHUNK_STEPS, steps - first), cells, cells)).astype(np.float32)
        rain[first : first + len(some)] = np.where(some < 1e-5, np.float32(0), some)


def _alone(action: Callable[[str, int, int], None], store: str, steps: int, cells: int) -> tuple[float, float]:
    """Seconds and peak resident memory [bytes] of something that a new process does."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measured, action, store, steps, cells).result()


def _measured(action: Callable[[str, int, int], None], store: str, steps: int, cells: int) -> tuple[float, float]:
    _read_raw(store, 1, cells)  # imports
    started = time.perf_counter()
    action(store, steps, cells)
    return time.perf_counter() - started, peak_memory()


def peak_memory() -> int:
    """Peak resident memory of this process [bytes]."""
    status = Path("/proc/self/status").read_text()  # getrusage would know of the parent's memory too
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def _read_raw(store: str, steps: int, cells: int) -> None:
    del cells
    with open_dataset(store) as dataset:
        for first in range(0, steps, CHUNK_STEPS):
            dataset["pr"].isel(time=slice(first, min(first + CHUNK_STEPS, steps))).values  # noqa: B018


def _read(store: str, steps: int, cells: int) -> None:
    del cells
    with open_dataset(store) as dataset:
        for _ in find(dataset, "pr", first_steps=steps).blocks():
            pass


def _regrid(store: str, steps: int, cells: int) -> None:
    grid, total = _inside(cells), 0.0
    with open_dataset(store) as dataset:
        for (block,) in find(dataset, "pr", first_steps=steps).blocks():
            total += float(regrid(block, grid).amount[-1].sum(dtype=np.float64))  # of one step, as sums take time too
    assert total > 0


def _inside(cells: int) -> Grid:
    """The largest grid of 10 km in LAEA that lies within the input, but for a margin of 5 %."""
    margin, side = 0.05 * cells * SPACING_DEGREES, 0.95 * cells * SPACING_DEGREES
    south, west = SOUTH_WEST
    edge = np.linspace(margin, side, 50)
    to_laea = Transformer.from_crs("EPSG:4326", LAEA, always_xy=True).transform
    y_south, y_north = (
        to_laea(west + edge, np.full(50, south + margin))[1],
        to_laea(west + edge, np.full(50, south + side))[1],
    )
    x_west, x_east = (
        to_laea(np.full(50, west + margin), south + edge)[0],
        to_laea(np.full(50, west + side), south + edge)[0],
    )
    x0, x1 = math.ceil(x_west.max() / SPACING_M), math.floor(x_east.min() / SPACING_M)
    y0, y1 = math.ceil(y_south.max() / SPACING_M), math.floor(y_north.min() / SPACING_M)
    return Grid(
        Axis((y1 - 0.5) * SPACING_M, -SPACING_M, y1 - y0), Axis((x0 + 0.5) * SPACING_M, SPACING_M, x1 - x0),
        CRS.from_user_input(LAEA).to_wkt(),
    )  # fmt: skip
