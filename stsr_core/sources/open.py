"""Opening: a path or URL becomes a lazy dataset; its content, a fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stsr_core.errors import SourceError
from stsr_core.sources import geotiff, messages
from stsr_core.sources.joined import joined
from stsr_core.sources.location import Location, stamp_of
from stsr_core.sources.netcdf3 import open_netcdf3
from stsr_core.sources.ranges import WholeFileNeeded
from stsr_core.sources.remote import patiently, shown
from stsr_core.sources.times import with_time_named, with_written_times

if TYPE_CHECKING:
    import xarray as xr
    from zarr.storage import FsspecStore

CHUNK_BYTES = 1 << 20
START_BYTES = 8  # of a file, which tell its kind
BLOCK_BYTES = 1 << 20  # read at a time from a server
GLOB = "*?["
PACKED = {  # by their first bytes: what packed a file, and what unpacks it
    b"\x1f\x8b": ("gzip", "gunzip"), b"BZh": ("bzip2", "bunzip2"), b"\xfd7zXZ": ("xz", "unxz"), b"PK": ("zip", "unzip"),
}  # fmt: skip
# Units of dates that count from a day since 1901, from where on the Julian calendar has the leap years of the standard
# one until 2100. Satellite products such as IMERG name that calendar and write dates of this one.
AFTER_1900 = re.compile(r"since\s+(19(?!00)\d\d|20\d\d)-")
ZARR_ROOTS = ("zarr.json", ".zgroup", ".zmetadata")


def open_dataset(
    url: str, *, base: Path | None = None, storage_options: Mapping[str, object] | None = None
) -> xr.Dataset:
    """Open NetCDF, GRIB, GeoTIFF, Zarr or kerchunk references lazily; a glob of files is joined along time or member.

    Args:
        url: local path, `package:` file or any fsspec URL; `*`, `?` and `[` make it a glob.
        base: folder that relative paths start from.
        storage_options: options of the fsspec filesystem.

    Raises:
        SourceError: nothing there, nothing that can be reached, no dataset, or files that do not fit together.
    """
    place = Location.of(url, base, storage_options)
    return patiently(lambda: _open(place), place.url, secrets=place.secrets)


def _open(place: Location) -> xr.Dataset:
    if any(c in place.path for c in GLOB) and not place.filesystem.exists(place.path):
        return _open_glob(place)
    if not place.exists:
        raise SourceError(f"Nothing is at {shown(place.url)}. Check the path, and the credentials if it is a bucket.")
    if _is_zarr(place):
        return _with_variables(_open_zarr(place), place)
    if place.filesystem.isdir(place.path):
        raise SourceError(f"{shown(place.url)} is a folder without a Zarr store. Name a file, a glob or a Zarr store.")
    return _open_file(place)


def _is_zarr(place: Location) -> bool:
    return any(place.filesystem.exists(f"{place.path.rstrip('/')}/{name}") for name in ZARR_ROOTS)


def _with_variables(data: xr.Dataset, place: Location) -> xr.Dataset:
    """Return a Zarr group that has variables, or say which groups it has instead."""
    if data.variables:
        return data
    folders = [p.rpartition("/")[2] for p in place.filesystem.ls(place.path, detail=False)]
    groups = ", ".join(sorted(n for n in folders if _is_zarr(place.at(f"{place.path.rstrip('/')}/{n}")))[:20])
    raise SourceError(
        f"{shown(place.url)} has no variables but in groups ({groups or 'none'}). Name that of the precipitation."
    )


def _open_zarr(place: Location) -> xr.Dataset:
    """Open a Zarr store, or references in Parquet, which look like one."""
    import xarray as xr

    root, filesystem = place.path.rstrip("/"), place.filesystem
    if filesystem.exists(f"{root}/zarr.json"):
        consolidated = bool(json.loads(filesystem.cat_file(f"{root}/zarr.json")).get("consolidated_metadata"))
        options = dict(place.options) or None
        return _decoded(
            xr.open_zarr(place.url, storage_options=options, chunks=None, decode_cf=False, consolidated=consolidated)
        )
    consolidated = filesystem.exists(f"{root}/.zmetadata")
    if consolidated and b'"record_size"' in filesystem.cat_file(f"{root}/.zmetadata"):
        from fsspec.implementations.reference import LazyReferenceMapper

        return _open_references(place, LazyReferenceMapper(root, fs=filesystem, engine="pyarrow"))
    return _decoded_zarr2(place.url, dict(place.options) or None, consolidated=consolidated)


def _decoded_zarr2(
    store: str | FsspecStore, options: dict[str, object] | None = None, *, consolidated: bool
) -> xr.Dataset:
    """Open a Zarr v2 store; a fill value of 0 is the default of whoever wrote it there, and marks no missing cells."""
    import xarray as xr

    raw = xr.open_zarr(store, storage_options=options, chunks=None, decode_cf=False, consolidated=consolidated)
    for variable in raw.variables.values():
        packed = "scale_factor" in variable.attrs or "add_offset" in variable.attrs
        if not packed and np.ndim(variable.attrs.get("_FillValue")) == 0 and variable.attrs.get("_FillValue") == 0:
            del variable.attrs["_FillValue"]
    return _decoded(raw)


def _decoded(raw: xr.Dataset) -> xr.Dataset:
    """Decode by CF; dates that cannot be decoded stay numbers, to be refused where they are needed."""
    import xarray as xr

    for variable in raw.variables.values():
        if str(variable.attrs.get("calendar")) == "julian" and AFTER_1900.search(str(variable.attrs.get("units"))):
            variable.attrs["calendar"] = "standard"
    try:
        return with_written_times(xr.decode_cf(raw, decode_timedelta=False))
    except ValueError:
        numbers = {n: v for n, v in raw.variables.items() if not _is_decodable(v)}
        return with_written_times(xr.decode_cf(raw.drop_vars(numbers), decode_timedelta=False).assign(numbers))


def _is_decodable(variable: xr.Variable) -> bool:
    import xarray as xr

    try:
        xr.decode_cf(xr.Dataset({"it": variable}), decode_timedelta=False)
    except ValueError:
        return False
    return True


def _open_file(place: Location, chunks: dict[str, int] | None = None) -> xr.Dataset:
    place = place if place.in_parts else place.copied()
    with place.filesystem.open(place.path, "rb", block_size=START_BYTES, cache_type="none") as file:
        start = file.read(START_BYTES)
    if not start:
        raise SourceError(f"{shown(place.url)} is empty (0 bytes). Fetch it again.")
    if start[:4] == messages.MAGIC:
        return _open_grib(place, chunks)
    if start[:4] in geotiff.STARTS:
        return geotiff.open_geotiffs([geotiff.record_of(place.copied().path)])
    if place.path.endswith(".tar"):
        return geotiff.open_geotiffs(geotiff.records_in_tar(place.copied().path))
    if start[:1] == b"{" or place.path.endswith(".json"):
        return _open_references(place, _json_references(place))
    if start[:3] == b"CDF":
        return _open_netcdf3(place, chunks)
    if start[:4] == b"\x89HDF":
        return _open_hdf5(place, chunks)
    for magic, (kind, command) in PACKED.items():
        if start.startswith(magic):
            raise SourceError(f"{shown(place.url)} is compressed by {kind} as a whole. Unpack it with `{command}`.")
    raise SourceError(
        f"{shown(place.url)} cannot be read: it starts with {start!r}, which is neither NetCDF, GRIB, GeoTIFF nor "
        "kerchunk JSON. Fetch it again, or convert it."
    )


def _open_grib(place: Location, chunks: dict[str, int] | None) -> xr.Dataset:
    """Open GRIB on a disk or a server, or a copy of it where that is better."""
    from stsr_core.sources.grib import open_grib

    data = None
    if not place.local:
        with suppress(WholeFileNeeded):
            data = open_grib(messages.OnServer(place.remote_file()))
    data = open_grib(messages.OnDisk(place.copied().path)) if data is None else data
    return data if chunks is None else data.chunk(chunks)


def _open_netcdf3(place: Location, chunks: dict[str, int] | None) -> xr.Dataset:
    import xarray as xr

    data = open_netcdf3(place.remote_file())  # or an error where the end of it is lost, which netCDF reads as zeros
    if place.local:
        return _decoded(xr.open_dataset(place.path, engine="netcdf4", chunks=chunks, decode_cf=False))
    return _decoded(data if chunks is None else data.chunk(chunks))


def _open_hdf5(place: Location, chunks: dict[str, int] | None) -> xr.Dataset:
    """Open NetCDF4 or HDF5, of which a group where the root holds nothing else, as in IMERG."""
    import xarray as xr

    def opened(group: str | None = None) -> xr.Dataset:
        engine: Any = "netcdf4" if place.local else "h5netcdf"
        return xr.open_dataset(_seekable(place), engine=engine, group=group, chunks=chunks, decode_cf=False)

    data = opened()
    return _decoded(data if data.variables else opened(_only_group(place)))


def _seekable(place: Location) -> Any:
    if place.local:
        return place.path
    return place.filesystem.open(place.path, block_size=BLOCK_BYTES, cache_type="readahead")


def _only_group(place: Location) -> str:
    import h5netcdf

    with h5netcdf.File(_seekable(place), "r") as file:
        groups = list(map(str, file.groups))
    if len(groups) != 1:
        raise SourceError(
            f"{shown(place.url)} has no variables but in groups ({', '.join(groups[:20]) or 'none'}). Copy the group "
            "of the precipitation to a file of its own."
        )
    return groups[0]


def _json_references(place: Location) -> Mapping[str, Any]:
    """Kerchunk references: a JSON that says which bytes of which files are the chunks of a Zarr store."""
    try:
        content = json.loads(place.filesystem.cat_file(place.path))
    except ValueError as e:
        raise SourceError(f"{shown(place.url)} is no valid JSON ({e}). Kerchunk references are needed.") from e
    refs = content.get("refs", content) if isinstance(content, dict) else {}
    if not any(str(k).endswith((".zgroup", ".zarray", "zarr.json")) for k in refs):
        raise SourceError(f"{shown(place.url)} is JSON, but holds no kerchunk references. Name a file or a store.")
    return content


def _open_references(place: Location, references: Mapping[str, Any]) -> xr.Dataset:
    """Open references to the chunks of a Zarr store, read from JSON or lazily from Parquet."""
    from fsspec.implementations.reference import ReferenceFileSystem
    from zarr.storage import FsspecStore

    parts = references.get("refs", references) if isinstance(references, dict) else references
    targets = (str(v[0]) for v in parts.values() if isinstance(v, list))
    remote = next((t.partition("://")[0] for t in targets if "://" in t), "file")
    options = dict(place.options) if remote != "file" else {"auto_mkdir": False}
    filesystem = ReferenceFileSystem(
        fo=references if isinstance(references, dict) else {}, remote_protocol=remote,
        remote_options={**options, "asynchronous": True}, asynchronous=True,
    )  # fmt: skip
    if not isinstance(references, dict):
        filesystem.references = references
    return _decoded_zarr2(FsspecStore(filesystem, read_only=True, path=""), consolidated=False)


def _open_glob(place: Location) -> xr.Dataset:
    paths = sorted(place.filesystem.glob(place.path))
    if not paths:
        raise SourceError(
            f"Nothing matches {shown(place.url)}. Check the pattern, and the credentials if it is a bucket."
        )
    if all(geotiff.NAME.search(p) for p in paths):
        return geotiff.open_geotiffs([geotiff.record_of(place.at(p).copied().path) for p in paths])
    found = [_lazily(place.at(p)) for p in paths]
    return found[0] if len(found) == 1 else joined(found, paths, shown(place.url))


def _lazily(place: Location) -> xr.Dataset:
    """Open one of many with dask, which xarray needs to join without reading; a single time becomes a dimension."""
    data = _open_zarr(place).chunk() if _is_zarr(place) else _open_file(place, chunks={})
    data = with_time_named(data)
    if "time" in data.coords and data["time"].ndim == 0:
        data = data.expand_dims("time")
    return data


def fingerprint(url: str, *, base: Path | None = None, storage_options: Mapping[str, object] | None = None) -> str:
    """Return a digest of what is at a URL, without reading it where a server states etags or times of change.

    A local file is digested by its content, so that a copy of it is the same source; stores and globs by name, size and
    etag or time of change of every object.

    Raises:
        SourceError: nothing there, or nothing that can be reached.
    """
    place = Location.of(url, base, storage_options)
    return patiently(lambda: _fingerprint(place), place.url, secrets=place.secrets)


def _fingerprint(place: Location) -> str:
    filesystem, path = place.filesystem, place.path
    digest = hashlib.sha256()
    if any(c in path for c in GLOB) and not filesystem.exists(path):
        found = filesystem.glob(path, detail=True)
        if not found:
            raise SourceError(f"Nothing matches {shown(place.url)}. Check the pattern.")
    elif filesystem.isdir(path):
        found = filesystem.find(path, detail=True)
    else:
        return _file_fingerprint(place)
    for key, info in sorted(found.items()):
        one = place.at(key)  # of which listings of web servers say no more than its name
        stamp = _fingerprint(one) if info["type"] == "directory" else stamp_of(info) or _file_fingerprint(one)
        digest.update(f"{key.removeprefix(path)} {stamp}\n".encode())
    return digest.hexdigest()


def _file_fingerprint(place: Location) -> str:
    if not place.local and (stamp := stamp_of(place.filesystem.info(place.path))):
        return hashlib.sha256(stamp.encode()).hexdigest()
    digest = hashlib.sha256()
    with place.filesystem.open(place.path, "rb") as opened:
        while block := opened.read(CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()
