"""The coarse totals that an ensemble was made from, published with it so that anybody can check closure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from stsr_core.errors import StoreError
from stsr_core.store.layout import PRECIPITATION, finish, mapped, open_store, write_coordinates

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from stsr_core.factors import Factor
    from stsr_core.grids import Grid, TimeAxis
    from stsr_core.store.layout import Options

ARRAY = "precipitation"
CHUNK_STEPS, CHUNK_CELLS = 744, 64


def write_coarse(
    url: str,
    amount: NDArray[np.float32],
    times: TimeAxis,
    grid: Grid,
    attributes: Mapping[str, str],
    options: Options | None = None,
) -> None:
    """Write coarse totals as a group of their own.

    Args:
        url: address of the group.
        amount: amount [mm per coarse step], (T, Y, X), NaN where missing.
        times: coarse time axis.
        grid: coarse grid.
        attributes: global attributes.
        options: options of the filesystem.
    """
    write_coordinates(url, times, grid, options)
    chunks = tuple(min(n, c) for n, c in zip(amount.shape, (CHUNK_STEPS, CHUNK_CELLS, CHUNK_CELLS), strict=True))
    zarr.create_array(
        open_store(f"{url}/{ARRAY}", options), data=amount.astype(np.float32), chunks=chunks,
        compressors=ZstdCodec(level=3), fill_value=np.nan, dimension_names=("time", "y", "x"),
        attributes=mapped({**PRECIPITATION, "long_name": "coarse precipitation amount per step"}, grid),
        overwrite=True,
    )  # fmt: skip
    finish(url, attributes, options)


def read_coarse(url: str, options: Options | None = None) -> NDArray[np.float32]:
    """Read coarse totals [mm per coarse step], (T, Y, X), NaN where missing.

    Raises:
        StoreError: there are none.
    """
    try:
        array: zarr.Array[Any] = zarr.open_array(open_store(f"{url}/{ARRAY}", options), mode="r")
    except (FileNotFoundError, ValueError) as e:
        raise StoreError(f"No coarse totals are at {url} ({e}). Closure cannot be checked without them.") from e
    return np.asarray(array[:], dtype=np.float32)


def factor_between(fine: tuple[int, ...], coarse: tuple[int, ...]) -> Factor:
    """Factor between the shapes (..., time, y, x) of an ensemble and of its coarse totals.

    Raises:
        StoreError: they do not belong together.
    """
    from stsr_core.factors import Factor

    (nt, ny, nx), (ct, cy, cx) = fine[-3:], coarse
    space, time = ny // max(cy, 1), nt // max(ct, 1)
    if space < 1 or time < 1 or (ct * time, cy * space, cx * space) != (nt, ny, nx):
        raise StoreError(f"An ensemble of {fine} is no refinement of coarse totals of {coarse}; the copy is mixed up.")
    return Factor(space=space, time=time)
