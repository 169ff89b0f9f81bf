"""The overview of an ensemble: mean, quantiles and exceedance probabilities over its members."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

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

Statistics = dict[str, "NDArray[np.float32]"]


def statistics(quanta: NDArray[np.uint16]) -> Statistics:
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
    write_coordinates(url, layout.times, layout.grid, options)
    axes = {"quantile": (QUANTILES, "quantile over members", "1"), "threshold": (THRESHOLDS_MM, "threshold", "mm")}
    for name, (points, long_name, units) in axes.items():
        write_array(f"{url}/{name}", np.array(points), (name,), {"long_name": long_name, "units": units}, options)
    probability = {"long_name": "share of members above the threshold", "units": "1"}
    over_members = {**PRECIPITATION, "long_name": "precipitation amount per step, mean over members"}
    targets = {
        "mean": _create(f"{url}/mean", layout, None, over_members, options),
        "quantile": _create(f"{url}/quantile_amount", layout, "quantile", PRECIPITATION, options),
        "exceedance": _create(f"{url}/exceedance_probability", layout, "threshold", probability, options),
    }
    for part in _blocks(layout):
        for name, values in statistics(np.asarray(source[(slice(None), *part)])).items():
            targets[name][(..., *part)] = values
    finish(url, layout.attributes, options)


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
