"""The overview of an ensemble: mean, quantiles and exceedance probabilities over its members.

Beside the arrays at full resolution lie groups 1, 2, ... with the same arrays at half the resolution of the one before,
for maps of large areas. The attribute `levels` names them: plain text, because the Zarr convention `multiscales` wants
objects, with which no dataset can be saved as NetCDF.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from stsr_core.grids import Axis, Grid
from stsr_core.store.layout import (
    MISSING,
    PRECIPITATION,
    QUANTUM_MM,
    StoreLayout,
    finish,
    mapped,
    open_store,
    write_array,
    write_coordinates,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stsr_core.store.layout import Options

QUANTILES = (0.1, 0.5, 0.9)
THRESHOLDS_MM = (1.0, 5.0, 10.0)  # amount per fine step
MAP_CELLS = 1024  # cells along a chunk: the map of one step is one request, or few
LEVEL_CELLS = 256  # cells along an edge of the coarsest level, at most

Statistics = dict[str, "NDArray[np.float32]"]


def over_members(quanta: NDArray[np.uint16]) -> Statistics:
    """Mean, quantiles and exceedance probabilities over members.

    Args:
        quanta: amount in quanta of 0.01 mm, (M, T, Y, X), uint16.

    Returns:
        `mean` (T, Y, X) [mm], `quantile` (Q, T, Y, X) [mm], `exceedance` (H, T, Y, X) [1], float32; NaN where missing.
    """
    missing = (quanta == MISSING).any(axis=0)
    amount = quanta * np.float32(QUANTUM_MM)
    result = {
        "mean": amount.mean(axis=0, dtype=np.float64),
        "quantile": np.quantile(amount, QUANTILES, axis=0),
        "exceedance": np.stack([(amount > h).mean(axis=0) for h in THRESHOLDS_MM]),
    }
    return {name: np.where(missing, np.nan, values).astype(np.float32) for name, values in result.items()}


def write_overview(
    ensemble_url: str, array: str, url: str, layout: StoreLayout, options: Options | None = None
) -> None:
    """Compute the overview of a finished ensemble block by block, and write it as a group of its own."""
    source = zarr.open_array(open_store(f"{ensemble_url}/{array}", options), mode="r")
    targets = _create_level(url, layout, options)
    for part in _blocks(layout):
        for name, values in _statistics_of(source, part).items():
            targets[name][(..., *part)] = values
    levels: list[str] = []
    while max(layout.grid.shape) > LEVEL_CELLS:
        layout = replace(layout, grid=halved_grid(layout.grid))
        levels.append(str(len(levels) + 1))
        targets = _write_level(targets, f"{url}/{levels[-1]}", layout, options)
    finish(url, {**layout.attributes, **({"levels": " ".join(levels)} if levels else {})}, options)


def _statistics_of(source: zarr.Array[Any], part: tuple[slice, slice, slice]) -> Statistics:
    """Statistics of a block, chunk by chunk, for all members of all of it may be much."""
    t, y, x = part
    rows, columns = ([slice(a, min(p.stop, a + n)) for a in range(p.start, p.stop, n)]
                     for p, n in ((y, source.chunks[2]), (x, source.chunks[3])))  # fmt: skip
    bands = [[over_members(np.asarray(source[:, t, row, column])) for column in columns] for row in rows]
    return {
        name: np.concatenate([np.concatenate([one[name] for one in band], axis=-1) for band in bands], axis=-2)
        for name in bands[0][0]
    }


def _create_level(url: str, layout: StoreLayout, options: Options | None) -> dict[str, zarr.Array[Any]]:
    """Write the coordinates of a level and the metadata of its arrays; returns them by the names of `over_members`."""
    write_coordinates(url, layout.times, layout.grid, options)
    axes = {"quantile": (QUANTILES, "quantile over members", "1"), "threshold": (THRESHOLDS_MM, "threshold", "mm")}
    for name, (points, long_name, units) in axes.items():
        write_array(f"{url}/{name}", np.array(points), (name,), {"long_name": long_name, "units": units}, options)
    probability = {"long_name": "share of members above the threshold", "units": "1"}
    over_members = {**PRECIPITATION, "long_name": "precipitation amount per step, mean over members"}
    return {
        "mean": _create(f"{url}/mean", layout, None, over_members, options),
        "quantile": _create(f"{url}/quantile_amount", layout, "quantile", PRECIPITATION, options),
        "exceedance": _create(f"{url}/exceedance_probability", layout, "threshold", probability, options),
    }


def _write_level(
    finer: Mapping[str, zarr.Array[Any]], url: str, layout: StoreLayout, options: Options | None
) -> dict[str, zarr.Array[Any]]:
    """Write the level below one, shard by shard in time."""
    targets = _create_level(url, layout, options)
    for name, target in targets.items():
        for start in range(0, layout.times.size, layout.time_block):
            steps = range(start, min(layout.times.size, start + layout.time_block))
            maps = [halved(np.asarray(finer[name][..., step, :, :])) for step in steps]  # large maps, so one at a time
            target[..., steps.start : steps.stop, :, :] = np.stack(maps, axis=-3)
    finish(url, layout.attributes, options)
    return targets


def halved(fields: NDArray[np.float32]) -> NDArray[np.float32]:
    """Means of 2 x 2 cells, (..., Y, X) to (..., ceil(Y/2), ceil(X/2)), of those that are there; NaN where none is."""
    *lead, ny, nx = fields.shape
    padded = np.pad(fields, [(0, 0)] * len(lead) + [(0, ny % 2), (0, nx % 2)], constant_values=np.nan)
    blocks = padded.reshape(*lead, -(-ny // 2), 2, -(-nx // 2), 2)
    there = (~np.isnan(blocks)).sum(axis=(-3, -1))
    total = np.nansum(blocks, axis=(-3, -1), dtype=np.float64)
    return np.where(there > 0, total / np.maximum(there, 1), np.nan).astype(np.float32)


def halved_grid(grid: Grid) -> Grid:
    """Grid of the cells of `halved`; the last of an odd number reaches beyond the grid."""
    y, x = (Axis(a.first + a.step / 2, 2 * a.step, -(-a.size // 2)) for a in (grid.y, grid.x))
    return Grid(y, x, grid.crs_wkt)


def _blocks(layout: StoreLayout) -> list[tuple[slice, slice, slice]]:
    _, nt, ny, nx = layout.shape
    _, bt, by, bx = layout.shard
    return [
        (slice(t, min(nt, t + bt)), slice(y, min(ny, y + by)), slice(x, min(nx, x + bx)))
        for t in range(0, nt, bt)
        for y in range(0, ny, by)
        for x in range(0, nx, bx)
    ]


def _create(
    url: str, layout: StoreLayout, leading: str | None, attributes: Mapping[str, str], options: Options | None
) -> zarr.Array[Any]:
    size = {"quantile": len(QUANTILES), "threshold": len(THRESHOLDS_MM)}.get(leading or "")
    extra = (size,) if size else ()
    plane = tuple(min(n, MAP_CELLS) for n in layout.grid.shape)
    return zarr.create_array(
        open_store(url, options), shape=(*extra, *layout.shape[1:]), dtype="float32",
        chunks=(*extra, 1, *plane), shards=(*extra, layout.time_block, *plane), compressors=ZstdCodec(level=3),
        fill_value=np.nan, dimension_names=((leading,) if leading else ()) + ("time", "y", "x"),
        attributes=mapped(attributes, layout.grid), overwrite=True,
    )  # fmt: skip
