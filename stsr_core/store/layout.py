"""Layout of an ensemble store: Zarr v3, CF, packed integers, one Zarr shard per unit of work.

Array metadata is written before workers start; the group that they belong to is finished last, see `store.group`.
Nothing in it depends on the clock: the same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import cftime
import numpy as np
import zarr
from zarr.codecs import ZstdCodec
from zarr.errors import ContainsArrayError
from zarr.storage import MemoryStore

from stsr_core.errors import StoreError
from stsr_core.grids import Grid, TimeAxis
from stsr_core.store.group import (
    GROUP,
    begin,
    drop,
    ensure,
    filesystem,
    is_whole,
    open_array,
    open_store,
    put,
    remove_store,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pyproj import CRS
    from zarr.abc.buffer import Buffer

    from stsr_core.factors import Factor
    from stsr_core.store.group import Options

QUANTUM_MM = 0.01  # storage quantum
MISSING = 65535  # stored where the input is missing
CHUNK_CELLS = 128  # fine cells along a chunk, at most
EPOCH = "seconds since 1970-01-01"
PRECIPITATION = {
    "standard_name": "lwe_thickness_of_precipitation_amount",
    "long_name": "precipitation amount per step",
    "units": "mm",
    "cell_methods": "time: sum area: mean",
}

# Units of length by their names in a CRS, as UDUNITS writes them.
LENGTHS = {"metre": "m", "kilometre": "km", "foot": "foot", "US survey foot": "US_survey_foot"}

DRIVING = "driving_member"  # coordinate along members
DRIVING_ATTRIBUTES: Mapping[str, Any] = {"long_name": "realization of the driving model"}

Region = tuple[slice, slice, slice, slice]


@dataclass(frozen=True)
class StoreLayout:
    """Axes of an ensemble and the size of its shards.

    Attributes:
        members: number of members.
        times: fine time axis.
        grid: fine grid.
        member_block: members of a shard.
        time_block: fine steps of a shard.
        tile: fine rows and columns of a shard.
        attributes: global attributes (provenance).
        driving: label of the driving member of every member; () where the source is no ensemble.
    """

    members: int
    times: TimeAxis
    grid: Grid
    member_block: int
    time_block: int
    tile: tuple[int, int]
    attributes: Mapping[str, str]
    driving: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(member, time, y, x)."""
        return self.members, self.times.size, *self.grid.shape

    @property
    def shard(self) -> tuple[int, int, int, int]:
        """Shape of a shard, in whole chunks; those at the far edges hold less."""
        rows, columns = (-(-cells // chunk) * chunk for cells, chunk in zip(self.tile, self.chunk[2:], strict=True))
        return self.member_block, self.time_block, rows, columns

    @property
    def chunk(self) -> tuple[int, int, int, int]:
        """Shape of a chunk: all members and steps of the shard, so that a point series is few requests."""
        rows, columns = (_chunk_cells(*sizes) for sizes in zip(self.tile, self.grid.shape, strict=True))
        return self.member_block, self.time_block, rows, columns


def _chunk_cells(tile: int, cells: int) -> int:
    """Cells of a chunk along one axis of a grid; what divides a tile, unless it is the only one and need not end there.

    A grid of 131 cells has no divisor but 1, and a store of such chunks is a hundred times as slow.
    """
    if tile < cells:
        return max(d for d in range(1, min(tile, CHUNK_CELLS) + 1) if tile % d == 0)
    return -(-tile // -(-tile // CHUNK_CELLS))


def calendar_of(times: TimeAxis) -> str:
    """CF calendar of a time axis."""
    return str(times.start.calendar) if isinstance(times.start, cftime.datetime) else "proleptic_gregorian"


def encoded_times(values: NDArray[Any], calendar: str) -> NDArray[np.int64]:
    """Encode dates as whole seconds since 1970."""
    if values.dtype == object:
        return np.rint(cftime.date2num(values, EPOCH, calendar=calendar)).astype(np.int64)
    return values.astype("datetime64[s]").astype(np.int64)


def axis_attributes(grid: Grid) -> tuple[dict[str, str], dict[str, str]]:
    """CF attributes of the y and x coordinates, whose values are in units of the CRS."""
    if grid.crs_wkt is None:
        return {"axis": "Y"}, {"axis": "X"}
    from pyproj import CRS

    crs = CRS.from_wkt(grid.crs_wkt)
    if crs.source_crs is not None and crs.is_bound:  # with a shift of datum, which says nothing of the axes
        crs = crs.source_crs
    y, x, y_units, x_units = "latitude", "longitude", "degrees_north", "degrees_east"
    if not crs.is_geographic:
        y, x = "projection_y_coordinate", "projection_x_coordinate"
        y_units = x_units = _length(crs)
    elif crs.is_derived:  # of a rotated pole
        y, x, y_units, x_units = "grid_latitude", "grid_longitude", "degrees", "degrees"
    return (
        {"standard_name": y, "units": y_units, "axis": "Y"},
        {"standard_name": x, "units": x_units, "axis": "X"},
    )


def _length(crs: CRS) -> str:
    """Unit of a projected CRS as UDUNITS writes it; one that has no name there in metres."""
    unit = crs.axis_info[0]
    return LENGTHS.get(unit.unit_name, f"{unit.unit_conversion_factor:.15g} m")


def coordinates(layout: StoreLayout) -> dict[str, Any]:
    """Decoded coordinates for an xarray.DataArray with the layout's axes; intervals as `time_start`, `time_end`."""
    y, x = axis_attributes(layout.grid)
    bounds = layout.times.bounds
    driving = {DRIVING: ("member", list(layout.driving), DRIVING_ATTRIBUTES)} if layout.driving else {}
    return {
        **driving,
        "member": ("member", np.arange(layout.members), {"standard_name": "realization"}),
        "time": ("time", layout.times.labels, {"standard_name": "time", "axis": "T"}),
        "time_start": ("time", bounds[:, 0]),
        "time_end": ("time", bounds[:, 1]),
        "y": ("y", layout.grid.y.centres, y),
        "x": ("x", layout.grid.x.centres, x),
    }


def write_array(
    url: str, data: NDArray[Any], dims: tuple[str, ...], attributes: Mapping[str, Any], options: Options | None
) -> None:
    """Write a small array as a node of its own; opened through its parent it would create the group too early.

    It is made in memory and no object of it is removed on the way, so another run of the same plan never misses one.
    """
    made: dict[str, Buffer] = {}
    zarr.create_array(
        MemoryStore(made), data=data, chunks=data.shape, dimension_names=dims, compressors=None,
        attributes=dict(attributes), fill_value="" if data.dtype.kind == "T" else 0,
    )  # fmt: skip
    fs, path = filesystem(url, options)
    for key, value in made.items():
        ensure(fs, f"{path}/{key}", value.to_bytes())


def write_coordinates(url: str, times: TimeAxis, grid: Grid, options: Options | None = None) -> None:
    """Begin a group with time, its bounds, y, x and the CRS.

    Raises:
        StoreError: something else is there.
    """
    begin(url, options)
    calendar = calendar_of(times)
    y, x = axis_attributes(grid)
    stamp = {"standard_name": "time", "long_name": "time", "axis": "T", "units": EPOCH, "calendar": calendar}
    stamp["bounds"] = "time_bnds"
    if calendar == "proleptic_gregorian":
        stamp["units_metadata"] = "leap_seconds: none"
    write_array(f"{url}/time", encoded_times(times.labels, calendar), ("time",), stamp, options)
    bounds = encoded_times(times.bounds.ravel(), calendar).reshape(-1, 2)
    write_array(f"{url}/time_bnds", bounds, ("time", "nv"), {"long_name": "time"}, options)
    write_array(f"{url}/y", grid.y.centres, ("y",), y, options)
    write_array(f"{url}/x", grid.x.centres, ("x",), x, options)
    if grid.crs_wkt is not None:
        from pyproj import CRS

        write_array(f"{url}/crs", np.array(0, np.int32), (), CRS.from_wkt(grid.crs_wkt).to_cf(), options)


def write_labels(url: str, labels: Sequence[str], dim: str, options: Options | None) -> None:
    """Write the labels of driving members along a dimension."""
    values = np.array(labels, dtype=np.dtypes.StringDType())
    write_array(f"{url}/{DRIVING}", values, (dim,), DRIVING_ATTRIBUTES, options)


def read_labels(url: str, options: Options | None = None) -> tuple[str, ...]:
    """Labels of the driving members in a group, along whatever they lie; () where it has none."""
    try:
        labels: Any = zarr.open_array(open_store(f"{url}/{DRIVING}", options), mode="r")[:]
    except FileNotFoundError:
        return ()
    return tuple(map(str, labels))


def write_members(url: str, layout: StoreLayout, options: Options | None) -> None:
    """Write the members of a group, and of which driving members they are."""
    realization = {"standard_name": "realization", "units": "1"}
    write_array(f"{url}/member", np.arange(layout.members, dtype=np.int32), ("member",), realization, options)
    if layout.driving:
        write_labels(url, layout.driving, "member", options)


def described(layout: StoreLayout) -> dict[str, str]:
    """Attributes of the precipitation of members, whatever their packing and CRS."""
    return {**PRECIPITATION, **({"coordinates": DRIVING} if layout.driving else {})}


def mapped(attributes: Mapping[str, Any], grid: Grid) -> dict[str, Any]:
    """Add the grid mapping to a variable's attributes where the CRS is known."""
    return {**attributes, **({"grid_mapping": "crs"} if grid.crs_wkt is not None else {})}


def create_ensemble(
    url: str, layout: StoreLayout, *, array: str, options: Options | None = None, keep: bool = False
) -> None:
    """Write the metadata and coordinates of an ensemble, but not its group: it does not open yet.

    Where one was begun that grows to this one, its shards stay; one with other shards or attributes is removed.

    Args:
        url: of the group.
        layout: of the ensemble.
        array: name of its array.
        options: of the filesystem.
        keep: shards are there that count, so attributes that differ are written anew and nothing is removed.

    Raises:
        StoreError: something else is there, or the place cannot be written.
    """
    stated = {**described(layout), "scale_factor": QUANTUM_MM, "_FillValue": MISSING}
    attributes = mapped(stated, layout.grid)
    try:
        begun = _begun(url, array, options)
        if begun is not None and (begun.shards, dict(begun.attrs)) != (layout.shard, attributes):
            if keep:
                begun.attrs.put(attributes)  # as of a CRS that only one of the two commands was told
            else:
                remove_store(url, options)  # another command began it, and was stopped before its first shard
                begun = None
        if not is_whole(url, options):
            drop(f"{url}/{GROUP}", options)  # of a run that was stopped while it finished
        write_coordinates(url, layout.times, layout.grid, options)
        write_members(url, layout, options)
        if begun is not None:
            begun.resize(layout.shape)
        else:
            _create_array(url, layout, array, attributes, options)
    except OSError as e:
        raise StoreError(f"{url} cannot be written ({e}). Check the path, its permissions and free space.") from e


def _create_array(
    url: str, layout: StoreLayout, array: str, attributes: dict[str, Any], options: Options | None
) -> None:
    """Write the metadata of an ensemble's array.

    Raises:
        StoreError: another command has just begun another one there.
    """
    try:
        zarr.create_array(
            open_store(f"{url}/{array}", options), shape=layout.shape, dtype="uint16",
            chunks=layout.chunk, shards=layout.shard, compressors=ZstdCodec(level=3), fill_value=MISSING,
            dimension_names=("member", "time", "y", "x"), attributes=attributes,
            config={"write_empty_chunks": True},
        )  # fmt: skip
    except ContainsArrayError as e:
        begun = open_array(url, array, options, mode="r")
        if (begun.shape, begun.shards, dict(begun.attrs)) != (layout.shape, layout.shard, attributes):
            raise StoreError(f"Another command has just begun another ensemble at {url}. Name another output.") from e


def _begun(url: str, array: str, options: Options | None) -> zarr.Array[Any] | None:
    """The array of an ensemble that was begun, or None."""
    fs, path = filesystem(url, options)
    if not fs.exists(f"{path}/{array}/{GROUP}"):  # opened to be written, zarr would make its folder
        return None
    return open_array(url, array, options, mode="r+")


def amounts_of(quanta: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Amounts [mm per fine step] of stored quanta, NaN where missing."""
    return np.where(quanta == MISSING, np.float32(np.nan), quanta * np.float32(QUANTUM_MM))


def blocks(shape: Sequence[int], block: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """Blocks of an array of any rank, slices along each axis, in order; those at its far edges end there."""
    axes = ([slice(a, min(n, a + b)) for a in range(0, n, b)] for n, b in zip(shape, block, strict=True))
    return product(*axes)


def coarse_region(region: Sequence[slice], factor: Factor) -> tuple[slice, ...]:
    """Steps, rows and columns of the coarse cells under a region whose last axes are time, y and x."""
    parts = (factor.time, factor.space, factor.space)
    return tuple(slice(r.start // n, r.stop // n) for r, n in zip(region[-3:], parts, strict=True))


def shard_path(url: str, array: str, layout_shard: tuple[int, ...], region: Region) -> str:
    """Address of the object that holds a shard."""
    index = "/".join(str(part.start // n) for part, n in zip(region, layout_shard, strict=True))
    return f"{url}/{array}/c/{index}"


def write_shard(
    url: str, array: str, region: Region, values: NDArray[np.uint16], options: Options | None = None
) -> str:
    """Write one whole shard and return the sha256 of its bytes.

    It is packed in memory: zarr would merge a shard at the edge into what is there, and store none that
    holds nothing but missing cells.

    Raises:
        StoreError: the region is not exactly one shard, its values have another shape, or writing failed.
    """
    target = open_array(url, array, options, mode="r")
    shard = target.shards or target.chunks
    for part, n, size in zip(region, shard, target.shape, strict=True):
        if part.start % n or part.stop not in (part.start + n, size):
            raise StoreError(
                f"Region {region} is not one shard of shape {shard} in {target.shape}; it would lose data."
            )
    expected = tuple(part.stop - part.start for part in region)
    if values.shape != expected or values.dtype != np.uint16:
        raise StoreError(f"Values {values.dtype} {values.shape} do not fill region {expected} of uint16.")
    made: dict[str, Buffer] = {}
    packed = zarr.create_array(
        MemoryStore(made), shape=shard, dtype=target.dtype, chunks=target.chunks, shards=target.shards,
        compressors=target.compressors, fill_value=target.fill_value, config={"write_empty_chunks": True},
    )  # fmt: skip
    packed[tuple(slice(0, n) for n in values.shape)] = values
    content = made["c/" + "/".join("0" * len(shard))].to_bytes()
    fs, path = filesystem(shard_path(url, array, shard, region), options)
    try:
        put(fs, path, content)
    except OSError as e:
        raise StoreError(f"{url} cannot be written ({e}). Check free space and permissions.") from e
    return hashlib.sha256(content).hexdigest()
