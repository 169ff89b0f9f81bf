"""Layout of an ensemble store: Zarr v3, CF, packed integers, one Zarr shard per unit of work.

Array metadata is written before workers start; the group's own metadata is written last, so a store opens as
a group only when it is whole. Nothing in it depends on the clock: the same input gives the same bytes.

The first object of all is a mark, which stays: only where it lies, or nothing, anything is written or removed.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from glob import has_magic
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import cftime
import numpy as np
import zarr
from zarr.codecs import ZstdCodec
from zarr.errors import ContainsArrayError, ZarrUserWarning
from zarr.storage import FsspecStore, LocalStore, MemoryStore

from stsr_core.errors import StoreError
from stsr_core.grids import Grid, TimeAxis
from stsr_core.store.patience import made_patient

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from numpy.typing import NDArray
    from pyproj import CRS
    from zarr.abc.buffer import Buffer
    from zarr.abc.store import Store

    from stsr_core.factors import Factor

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

MARK = "stsr.json"  # object that tells a group of this code, begun or whole, from whatever else lies at an address
MARK_CONTENT = b'{"written_by": "stsr"}\n'
GROUP = "zarr.json"  # metadata of a group, or an array
BEFORE = "before.json"  # metadata of a group that was whole and is added to, until it is whole again

DRIVING = "driving_member"  # coordinate along members
DRIVING_ATTRIBUTES: Mapping[str, Any] = {"long_name": "realization of the driving model"}

Options = Mapping[str, object]
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


def filesystem(url: str, options: Options | None = None) -> tuple[AbstractFileSystem, str]:
    """Return the fsspec filesystem of a URL, and the path in it."""
    import fsspec

    fs, path = fsspec.core.url_to_fs(url, **dict(options or {}))
    return made_patient(fs), path


def open_store(url: str, options: Options | None = None) -> Store:
    """Return the Zarr store at a local path or fsspec URL."""
    if "://" in url:
        store = FsspecStore.from_url(url, storage_options=dict(options or {}) or None)
        made_patient(store.fs)
        return store
    return LocalStore(url)


def require_own(url: str, options: Options | None = None) -> None:
    """Make sure that nothing but a group of this code, begun or whole, is at a URL.

    Raises:
        StoreError: something else is there, or what is there cannot be read.
    """
    fs, path = filesystem(url, options)
    try:
        own = _marked(fs, path) or not _contents(fs, path) or _marked(fs, path)  # begun by another meanwhile
    except OSError as e:
        raise StoreError(f"{url} cannot be read ({e}). Check the path and its permissions.") from e
    if not own:
        raise StoreError(
            f"{url} is there and no Zarr store that stsr wrote, so nothing in it is changed. Name another output, or "
            "remove it yourself."
        )


def _contents(fs: AbstractFileSystem, path: str) -> list[str]:
    """Paths of what is in a folder; of a file, its own. None where nothing is, and in an empty folder."""
    fs.invalidate_cache()  # others may have written since this process looked
    try:
        names = [str(name) for name in fs.ls(path, detail=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    if _is_local(fs):
        return names
    return [name for name in names if _holds_objects(fs, name)]


def _holds_objects(fs: AbstractFileSystem, path: str) -> bool:
    """Whether an object is at or below a path.

    Servers such as SeaweedFS list folders that hold none any more, the last of them as an object whose name ends in /.
    """
    levels = (files.values() for _, _, files in fs.walk(path, detail=True))
    return any(info["type"] == "file" and not info["name"].endswith("/") for files in levels for info in files)


def _marked(fs: AbstractFileSystem, path: str) -> bool:
    """Whether the mark is there; part of it counts, for its writer may have been killed."""
    try:
        return MARK_CONTENT.startswith(fs.cat_file(f"{path}/{MARK}"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False


def begin(url: str, options: Options | None = None) -> None:
    """Mark a place as that of a group of this code, before anything else is written there.

    Raises:
        StoreError: something else is there.
    """
    require_own(url, options)
    fs, path = filesystem(url, options)
    put(fs, f"{path}/{MARK}", MARK_CONTENT)


def _is_local(fs: AbstractFileSystem) -> bool:
    return "file" in fs.protocol


def put(fs: AbstractFileSystem, path: str, content: bytes) -> None:
    """Write an object, below folders that are made only on a local disk: elsewhere that may create a bucket."""
    if _is_local(fs):
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    fs.pipe_file(path, content)


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
        _ensure(fs, f"{path}/{key}", value.to_bytes())


def _ensure(fs: AbstractFileSystem, path: str, content: bytes) -> None:
    """Write an object unless it is there as it should be."""
    with suppress(FileNotFoundError):
        if fs.cat_file(path) == content:
            return
    put(fs, path, content)


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
            _drop(f"{url}/{GROUP}", options)  # of a run that was stopped while it finished
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


def open_array(url: str, array: str, options: Options | None = None, *, mode: Literal["r", "r+"]) -> zarr.Array[Any]:
    """Open the array of an ensemble.

    Raises:
        FileNotFoundError: it is not there.
        StoreError: its metadata is damaged.
    """
    try:
        return zarr.open_array(open_store(f"{url}/{array}", options), mode=mode)
    except FileNotFoundError:  # which zarr makes a ValueError too
        raise
    except ValueError as e:
        raise StoreError(f"{url}/{array}/{GROUP} is damaged ({e}). Start over with --overwrite.") from e


def finish(url: str, attributes: Mapping[str, str], options: Options | None = None) -> None:
    """Write the group's metadata, consolidated: from now on the store opens and counts as whole.

    Another run of the same plan may have done so already.

    Raises:
        StoreError: it cannot be written.
    """
    store = open_store(url, options)
    if isinstance(store, LocalStore):
        for begun in store.root.rglob("*.partial"):  # by zarr, whose writer was killed
            begun.unlink(missing_ok=True)
    made: dict[str, Buffer] = {}
    zarr.create_group(MemoryStore(made), attributes={"Conventions": "CF-1.11", **attributes})
    fs, path = filesystem(url, options)
    try:
        _ensure(fs, f"{path}/{GROUP}", made[GROUP].to_bytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ZarrUserWarning)
            zarr.consolidate_metadata(store)
        _drop(f"{url}/{BEFORE}", options)
    except OSError as e:
        raise StoreError(f"{url} cannot be finished ({e}). Check free space and permissions; go on then.") from e


def reopen(url: str, options: Options | None = None) -> None:
    """Put the group's metadata aside: the store no longer counts as whole, until `finish`."""
    fs, path = filesystem(url, options)
    fs.pipe_file(f"{path}/{BEFORE}", fs.cat_file(f"{path}/{GROUP}"))
    fs.rm(f"{path}/{GROUP}")


def whole_shape(url: str, array: str, options: Options | None = None) -> tuple[int, ...]:
    """Shape of an array when its group was last whole; as it is, where that never was."""
    fs, path = filesystem(url, options)
    if is_whole(url, options) or not fs.exists(f"{path}/{BEFORE}"):
        return shape_of(url, array, options)
    try:
        return tuple(json.loads(fs.cat_file(f"{path}/{BEFORE}"))["consolidated_metadata"]["metadata"][array]["shape"])
    except ValueError:  # written in part, so the group is still as it was
        return shape_of(url, array, options)


def shape_of(url: str, array: str, options: Options | None = None) -> tuple[int, ...]:
    """Shape of an array; of one that is lost, none.

    Raises:
        StoreError: its metadata is damaged.
    """
    try:
        return open_array(url, array, options, mode="r").shape
    except FileNotFoundError:
        return ()


def is_whole(url: str, options: Options | None = None) -> bool:
    """Whether the store at a URL was finished."""
    fs, path = filesystem(url, options)
    try:
        return "consolidated_metadata" in json.loads(fs.cat_file(f"{path}/{GROUP}"))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError as e:
        raise StoreError(f"{url}/{GROUP} is damaged ({e}). Remove the store, or write it again.") from e


def remove_store(url: str, options: Options | None = None) -> None:
    """Remove the group at a URL, begun or whole; its mark last, so that a removal cut short can be done again.

    Raises:
        StoreError: something else is there.
    """
    require_own(url, options)
    fs, path = filesystem(url, options)
    if not _is_local(fs) and has_magic(path):  # fsspec would remove whatever fits the pattern
        raise StoreError(
            f"{url} has *, ? or [ in its name, so it is not removed: other stores may fit that. Remove it yourself, or "
            "name another output."
        )
    for name in _contents(fs, path):
        if name != f"{path}/{MARK}":
            fs.rm(name, recursive=True)
    if fs.exists(path):
        fs.rm(path, recursive=True)


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


def read_object(url: str, options: Options | None = None) -> bytes:
    """Read one object.

    Raises:
        StoreError: it is not there or cannot be read.
    """
    fs, path = filesystem(url, options)
    try:
        return bytes(fs.cat_file(path))
    except OSError as e:
        raise StoreError(f"{url} cannot be read ({e.__class__.__name__}). It is missing, or the store is gone.") from e


def write_shard(
    url: str, array: str, region: Region, values: NDArray[np.uint16], options: Options | None = None
) -> str:
    """Write one whole shard and return the sha256 of its stored bytes.

    Raises:
        StoreError: the region is not exactly one shard, its values have another shape, or writing failed.
    """
    target = open_array(url, array, options, mode="r+")
    shard = target.shards or target.chunks
    for part, n, size in zip(region, shard, target.shape, strict=True):
        if part.start % n or part.stop not in (part.start + n, size):
            raise StoreError(
                f"Region {region} is not one shard of shape {shard} in {target.shape}; it would lose data."
            )
    expected = tuple(part.stop - part.start for part in region)
    if values.shape != expected or values.dtype != np.uint16:
        raise StoreError(f"Values {values.dtype} {values.shape} do not fill region {expected} of uint16.")
    address = shard_path(url, array, shard, region)
    try:
        try:
            target[region] = values
        except (ValueError, RuntimeError):  # zarr merges a shard at the edge into what is there, which may be damaged
            _drop(address, options)
            target[region] = values
    except OSError as e:
        raise StoreError(f"{url} cannot be written ({e}). Check free space and permissions.") from e
    return hashlib.sha256(read_object(address, options)).hexdigest()


def _drop(url: str, options: Options | None) -> None:
    """Remove an object that may be there."""
    fs, path = filesystem(url, options)
    if fs.exists(path):
        fs.rm(path)
