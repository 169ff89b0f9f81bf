"""The overview of an ensemble: mean, quantiles and exceedance probabilities over its members.

Beside the arrays at full resolution lie groups 1, 2, ... with the same arrays at half the resolution of the one before,
for maps of large areas. The attribute `levels` names them: plain text, because the Zarr convention `multiscales` wants
objects, with which no dataset can be saved as NetCDF.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from stsr_core.grids import Axis, Grid
from stsr_core.store.group import finish, open_array, open_store
from stsr_core.store.layout import (
    MISSING,
    PRECIPITATION,
    QUANTUM_MM,
    StoreLayout,
    blocks,
    mapped,
    write_array,
    write_coordinates,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stsr_core.store.group import Options

QUANTILES = (0.1, 0.5, 0.9)
THRESHOLDS_MM = (1.0, 5.0, 10.0)  # amount per fine step
MAP_CELLS = 1024  # cells along a chunk: the map of one step is one request, or few
LEVEL_CELLS = 256  # cells along an edge of the coarsest level, at most
SHARD_VALUES = 2**25  # of a shard at most, 128 MB in memory while it is written

Statistics = dict[str, "NDArray[np.float32]"]
Part: TypeAlias = tuple[slice, slice, slice]
"""Steps, rows and columns."""


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
        "quantile": np.quantile(quanta, QUANTILES, axis=0) * QUANTUM_MM,
        "exceedance": np.stack([(amount > h).mean(axis=0) for h in THRESHOLDS_MM]),
    }
    return {name: np.where(missing, np.nan, values).astype(np.float32) for name, values in result.items()}


def write_overview(
    ensemble_url: str, array: str, url: str, layout: StoreLayout, options: Options | None = None
) -> None:
    """Compute the overview of a finished ensemble block by block, and write it as a group of its own."""
    source = open_array(ensemble_url, array, options, mode="r")
    finest = _create_level(url, layout, options)
    for part in blocks(layout.shape[1:], _shard_of(finest["mean"])):
        for name, values in _statistics_of(source, part).items():
            finest[name][(..., *part)] = values
    levels: list[str] = []
    while max(layout.grid.shape) > LEVEL_CELLS * 2 ** len(levels):
        levels.append(str(len(levels) + 1))
        _write_level(finest, f"{url}/{levels[-1]}", layout, 2 ** len(levels), options)
    finish(url, {**layout.attributes, **({"levels": " ".join(levels)} if levels else {})}, options)


def _shard_of(array: zarr.Array[Any]) -> tuple[int, ...]:
    """Steps, rows and columns of a shard; written whole, as zarr reads what it adds to."""
    return (array.shards or array.chunks)[-3:]


def _statistics_of(source: zarr.Array[Any], part: Part) -> Statistics:
    """Statistics of a block, chunk by chunk, for all members of all of it may be much."""
    t, y, x = part
    size = tuple(p.stop - p.start for p in part)
    lead: dict[str, tuple[int, ...]] = {
        "mean": (), "quantile": (len(QUANTILES),), "exceedance": (len(THRESHOLDS_MM),)
    }  # fmt: skip
    found = {name: np.empty((*many, *size), np.float32) for name, many in lead.items()}
    for _, rows, columns in blocks(size, (size[0], *source.chunks[2:])):
        place = (slice(p.start + o.start, p.start + o.stop) for p, o in ((y, rows), (x, columns)))
        for name, values in over_members(np.asarray(source[(slice(None), t, *place)])).items():
            found[name][..., rows, columns] = values
    return found


def _create_level(url: str, layout: StoreLayout, options: Options | None) -> dict[str, zarr.Array[Any]]:
    """Write the coordinates of a level and the metadata of its arrays; returns them by the names of `over_members`."""
    write_coordinates(url, layout.times, layout.grid, options)
    axes = {"quantile": (QUANTILES, "quantile over members", "1"), "threshold": (THRESHOLDS_MM, "threshold", "mm")}
    for name, (points, long_name, units) in axes.items():
        write_array(f"{url}/{name}", np.array(points), (name,), {"long_name": long_name, "units": units}, options)
    probability = {"long_name": "share of members above the threshold", "units": "1"}
    mean = {**PRECIPITATION, "long_name": "precipitation amount per step, mean over members"}
    return {
        "mean": _create(f"{url}/mean", layout, None, mean, options),
        "quantile": _create(f"{url}/quantile_amount", layout, "quantile", PRECIPITATION, options),
        "exceedance": _create(f"{url}/exceedance_probability", layout, "threshold", probability, options),
    }


def _write_level(
    finest: Mapping[str, zarr.Array[Any]], url: str, layout: StoreLayout, parts: int, options: Options | None
) -> None:
    """Write a level of cells of `parts` x `parts` of the finest, shard by shard: memory does not grow with the map."""
    level = replace(layout, grid=coarser_grid(layout.grid, parts))
    for name, target in _create_level(url, level, options).items():
        for part in blocks(target.shape[-3:], _shard_of(target)):
            target[(..., *part)] = _level_of(finest[name], part, parts)
    finish(url, layout.attributes, options)


def _level_of(finest: zarr.Array[Any], part: Part, parts: int) -> NDArray[np.float32]:
    """A part of a level, of which one map and one chunk of the finest are read at a time."""
    t, y, x = part
    edge = max(1, MAP_CELLS // parts)
    level = np.empty((*finest.shape[:-3], *(p.stop - p.start for p in part)), np.float32)
    for step, rows, columns in blocks(level.shape[-3:], (1, edge, edge)):
        below = (slice((p.start + o.start) * parts, (p.start + o.stop) * parts)
                 for p, o in ((y, rows), (x, columns)))  # fmt: skip
        fields = np.asarray(finest[(..., t.start + step.start, *below)])
        level[..., step.start, rows, columns] = averaged(fields, parts)
    return level


def averaged(fields: NDArray[np.float32], parts: int) -> NDArray[np.float32]:
    """Means of parts x parts cells, (..., Y, X) to (..., ceil(Y/parts), ceil(X/parts)), of those that are there.

    NaN where none is.
    """
    *lead, ny, nx = fields.shape
    rows, columns = -(-ny // parts), -(-nx // parts)
    beyond = [(0, rows * parts - ny), (0, columns * parts - nx)]
    padded = np.pad(fields, [(0, 0)] * len(lead) + beyond, constant_values=np.nan)
    blocks = padded.reshape(*lead, rows, parts, columns, parts)
    there = (~np.isnan(blocks)).sum(axis=(-3, -1))
    total = np.nansum(blocks, axis=(-3, -1), dtype=np.float64)
    return np.where(there > 0, total / np.maximum(there, 1), np.nan).astype(np.float32)


def coarser_grid(grid: Grid, parts: int) -> Grid:
    """Grid of the cells of `averaged`; the last ones may reach beyond the grid."""
    y, x = (Axis(a.first + a.step * (parts - 1) / 2, parts * a.step, -(-a.size // parts)) for a in (grid.y, grid.x))
    return Grid(y, x, grid.crs_wkt)


def _create(
    url: str, layout: StoreLayout, leading: str | None, attributes: Mapping[str, str], options: Options | None
) -> zarr.Array[Any]:
    size = {"quantile": len(QUANTILES), "threshold": len(THRESHOLDS_MM)}.get(leading or "")
    extra = (size,) if size else ()
    plane = tuple(min(n, MAP_CELLS) for n in layout.grid.shape)
    most = max(len(QUANTILES), len(THRESHOLDS_MM))  # so that shards of all arrays lie alike
    steps = min(layout.time_block, max(1, SHARD_VALUES // (most * math.prod(plane))))
    return zarr.create_array(
        open_store(url, options), shape=(*extra, *layout.shape[1:]), dtype="float32",
        chunks=(*extra, 1, *plane), shards=(*extra, steps, *plane), compressors=ZstdCodec(level=3),
        fill_value=np.nan, dimension_names=((leading,) if leading else ()) + ("time", "y", "x"),
        attributes=mapped(attributes, layout.grid), overwrite=True,
    )  # fmt: skip
