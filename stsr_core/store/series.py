"""The ensemble once more, laid out for time series: all members and a year of steps of a few cells in one chunk.

A shard of the ensemble is a unit of work and holds some hours of a large tile, so that a year at a point would take
thousands of requests there. Here it takes three: the shard's index, a chunk, and the coordinates before them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from stsr_core.store.group import finish, open_array, open_store
from stsr_core.store.layout import (
    MISSING,
    QUANTUM_MM,
    StoreLayout,
    blocks,
    described,
    mapped,
    write_coordinates,
    write_members,
)

if TYPE_CHECKING:
    from stsr_core.store.group import Options

CHUNK_MEMBERS = 64
CHUNK_STEPS = 8784  # a leap year of hours
CHUNK_VALUES = 2**21  # 4 MB before compression, a fraction of it after
SHARD_VALUES = 2**27  # 256 MB in memory while it is written


def chunk_of(layout: StoreLayout) -> tuple[int, int, int, int]:
    """Shape of a chunk: members and steps of a point first, then as many cells as fit."""
    members, steps = min(layout.members, CHUNK_MEMBERS), min(layout.times.size, CHUNK_STEPS)
    edge = _edge(CHUNK_VALUES, members * steps)
    return members, steps, edge, edge


def shard_of(layout: StoreLayout) -> tuple[int, int, int, int]:
    """Shape of a shard: whole chunks, at most those that reach over the grid."""
    members, steps, edge, _ = chunk_of(layout)
    most = max(edge, _edge(SHARD_VALUES, members * steps))
    rows, columns = (min(most, -(-n // edge) * edge) for n in layout.grid.shape)
    return members, steps, rows, columns


def _edge(values: int, series: int) -> int:
    """Largest power of two, 1 to 512, whose square of series holds at most so many values."""
    return int(2 ** np.clip(np.floor(np.log2(max(1.0, values / series)) / 2), 0, 9))


def write_series(ensemble_url: str, array: str, url: str, layout: StoreLayout, options: Options | None = None) -> None:
    """Copy a finished ensemble, shard by shard, into a group laid out for time series."""
    source = open_array(ensemble_url, array, options, mode="r")
    write_coordinates(url, layout.times, layout.grid, options)
    write_members(url, layout, options)
    shard = shard_of(layout)
    target = zarr.create_array(
        open_store(f"{url}/{array}", options), shape=layout.shape, dtype="uint16", chunks=chunk_of(layout),
        shards=shard, compressors=ZstdCodec(level=3), fill_value=MISSING,
        dimension_names=("member", "time", "y", "x"), overwrite=True,
        attributes={**mapped(described(layout), layout.grid), "scale_factor": QUANTUM_MM, "_FillValue": MISSING},
    )  # fmt: skip
    for region in blocks(layout.shape, shard):
        target[region] = source[region]
    finish(url, layout.attributes, options)
