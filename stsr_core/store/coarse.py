"""The coarse totals that an ensemble was made from, published with it so that anybody can check closure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from stsr_core.errors import StoreError
from stsr_core.store.group import finish, open_store
from stsr_core.store.layout import DRIVING, PRECIPITATION, mapped, read_labels, write_coordinates, write_labels

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from stsr_core.factors import Factor
    from stsr_core.grids import Grid, TimeAxis
    from stsr_core.store.group import Options

ARRAY = "precipitation"
CHUNK_STEPS, CHUNK_CELLS = 744, 64
LEAD = "driving"  # dimension of driving members; labels may not be named like their dimension, by CF


def write_coarse(
    url: str,
    amounts: Sequence[NDArray[np.float32]],
    times: TimeAxis,
    grid: Grid,
    attributes: Mapping[str, str],
    options: Options | None = None,
    driving: Sequence[str] = (),
) -> None:
    """Write coarse totals as a group of their own.

    Args:
        url: address of the group.
        amounts: amount [mm per coarse step] of every driving member, (T, Y, X), NaN where missing.
        times: coarse time axis.
        grid: coarse grid.
        attributes: global attributes.
        options: options of the filesystem.
        driving: labels of the driving members; () for totals (time, y, x) of a source that is no ensemble.
    """
    write_coordinates(url, times, grid, options)
    if driving:
        write_labels(url, driving, LEAD, options)
    lead, labelled = ((len(driving),), {"coordinates": DRIVING}) if driving else ((), {})
    shape = amounts[0].shape
    chunks = tuple(min(n, c) for n, c in zip(shape, (CHUNK_STEPS, CHUNK_CELLS, CHUNK_CELLS), strict=True))
    target = zarr.create_array(
        open_store(f"{url}/{ARRAY}", options), shape=lead + shape, dtype=np.float32, chunks=(1,) * len(lead) + chunks,
        compressors=ZstdCodec(level=3), fill_value=np.nan,
        dimension_names=((LEAD,) if driving else ()) + ("time", "y", "x"),
        attributes=mapped({**PRECIPITATION, "long_name": "coarse precipitation amount per step", **labelled}, grid),
        overwrite=True,
    )  # fmt: skip
    for number, amount in enumerate(amounts):
        target[(number,) if driving else ...] = amount
    finish(url, attributes, options)


def read_coarse(url: str, options: Options | None = None) -> NDArray[np.float32]:
    """Read coarse totals [mm per coarse step] of every driving member, (R, T, Y, X), NaN where missing.

    Raises:
        StoreError: there are none.
    """
    try:
        array: zarr.Array[Any] = zarr.open_array(open_store(f"{url}/{ARRAY}", options), mode="r")
    except (FileNotFoundError, ValueError) as e:
        raise StoreError(f"No coarse totals are at {url} ({e}). Closure cannot be checked without them.") from e
    return np.asarray(array[:], dtype=np.float32).reshape(-1, *array.shape[-3:])


def totals_of_members(
    ensemble_url: str, coarse_url: str, members: int, options: Options | None = None
) -> NDArray[np.int64]:
    """Index of the driving member whose totals each member of an ensemble conserves, (M,), by the labels of both.

    Raises:
        StoreError: a member is of a driving member that has no totals.
    """
    of, there = read_labels(ensemble_url, options), read_labels(coarse_url, options)
    if not of and not there:
        return np.zeros(members, np.int64)
    if len(of) != members or not set(of) <= set(there):
        raise StoreError(
            f"The {members} members at {ensemble_url} are of driving members {', '.join(sorted(set(of))) or '?'}; "
            f"there are coarse totals of {', '.join(there) or 'one without a label'}. The copy is mixed up."
        )
    return np.array([there.index(label) for label in of])


def factor_between(fine: tuple[int, ...], coarse: tuple[int, ...]) -> Factor:
    """Factor between the shapes (..., time, y, x) of an ensemble and of its coarse totals, likewise.

    Raises:
        StoreError: they do not belong together.
    """
    from stsr_core.factors import Factor

    (nt, ny, nx), (ct, cy, cx) = fine[-3:], coarse[-3:]
    space, time = ny // max(cy, 1), nt // max(ct, 1)
    if space < 1 or time < 1 or (ct * time, cy * space, cx * space) != (nt, ny, nx):
        raise StoreError(f"An ensemble of {fine} is no refinement of coarse totals of {coarse}; the copy is mixed up.")
    return Factor(space=space, time=time)
