"""Opening: a path or URL becomes a lazy dataset; its content, a fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stsr_core.errors import SourceError
from stsr_core.sources import geotiff, messages
from stsr_core.sources.netcdf3 import open_netcdf3
from stsr_core.sources.ranges import RemoteFile, WholeFileNeeded
from stsr_core.sources.remote import patiently, shown
from stsr_core.sources.times import with_written_times

if TYPE_CHECKING:
    import xarray as xr
    from fsspec import AbstractFileSystem
    from zarr.storage import FsspecStore

PACKAGE = "package:"  # scheme of files that are installed with stsr
CHUNK_BYTES = 1 << 20
START_BYTES = 8  # of a file, which tell its kind
BLOCK_BYTES = 1 << 20  # read at a time from a server
GLOB = "*?["
MEANING = ("units", "standard_name", "cell_methods")  # attributes that files must share
REALIZATION = (
    "source_id",
    "variant_label",
    "model_id",
    "driving_source_id",
    "driving_variant_label",
)  # of CMIP, CORDEX
MEMBER = "member"  # dimension along which files of the same times are joined
ZARR_ROOTS = ("zarr.json", ".zgroup", ".zmetadata")


def located(url: str, base: Path | None = None) -> str:
    """Resolve a URL of catalog.yaml: `package:` files, and paths relative to `base`."""
    if url.startswith(PACKAGE):
        return str(files("stsr_core") / url.removeprefix(PACKAGE))
    if "://" in url or base is None or Path(url).is_absolute():
        return url
    return str(base / url)


@dataclass(frozen=True)
class Location:
    """A place on a filesystem."""

    filesystem: AbstractFileSystem
    path: str
    url: str
    options: Mapping[str, object]

    @classmethod
    def of(cls, url: str, base: Path | None, options: Mapping[str, object] | None) -> Location:
        """Find the filesystem of a URL; nothing is read.

        Raises:
            SourceError: a scheme that no installed filesystem serves.
        """
        import fsspec

        place, kept = located(url, base), dict(options or {})
        try:
            filesystem, path = fsspec.core.url_to_fs(place, **kept)
        except (ValueError, ImportError) as e:
            raise SourceError(
                f"{shown(place)} has a scheme that cannot be read here ({e}). Use a path, https:// or s3://; gs:// "
                "needs `pip install 'stsr[gs]'`, az:// 'stsr[az]'."
            ) from None
        return cls(filesystem, path, place, kept)

    @property
    def _protocols(self) -> tuple[str, ...]:
        protocol = self.filesystem.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)

    @property
    def local(self) -> bool:
        """Whether it is on a disk of this machine."""
        return "file" in self._protocols

    @property
    def in_parts(self) -> bool:
        """Whether parts of a file can be read; there are HTTP servers that send all of it or nothing."""
        if "http" not in self._protocols:
            return True
        if self.filesystem.info(self.path).get("size") is None:
            return False
        try:
            with self.filesystem.open(self.path, "rb", block_size=1, cache_type="none") as file:
                file.seek(1)
                file.read(1)
        except ValueError:  # of fsspec, which got the beginning instead
            return False
        return True

    @property
    def secrets(self) -> tuple[object, ...]:
        """What messages must not hold."""
        return tuple(v for k, v in self.options.items() if k not in ("endpoint_url", "anon", "profile"))

    def at(self, path: str) -> Location:
        """Return another place on the same filesystem."""
        return Location(self.filesystem, path, self.filesystem.unstrip_protocol(path), self.options)

    def copied(self) -> Location:
        """Return it as a local file: itself, or a copy, for what is read from a disk only, or faster."""
        from fsspec.implementations.local import LocalFileSystem

        if self.local:
            return self
        server = self.options.get("endpoint_url", "")
        named = f"{server} {self.url} {_stamp(self.filesystem.info(self.path))}"
        key = hashlib.sha256(named.encode()).hexdigest()[:32]
        folder = Path(tempfile.gettempdir()) / f"stsr-copies-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        copy = folder / key / Path(self.path).name
        copy.parent.mkdir(exist_ok=True)
        if not copy.exists():
            partial = copy.with_suffix(f".{uuid.uuid4().hex}")
            self.filesystem.get_file(self.path, str(partial))
            partial.replace(copy)
        return Location(LocalFileSystem(), str(copy), self.url, {})


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
        return _joined(place)
    if not _exists(place):
        raise SourceError(f"Nothing is at {shown(place.url)}. Check the path, and the credentials if it is a bucket.")
    if _is_zarr(place):
        return _open_zarr(place)
    if place.filesystem.isdir(place.path):
        raise SourceError(f"{shown(place.url)} is a folder without a Zarr store. Name a file, a glob or a Zarr store.")
    return _open_file(place)


def _exists(place: Location) -> bool:
    """Whether something is there; unlike fsspec's `exists`, a refusal or an outage is an error."""
    try:
        place.filesystem.info(place.path)
    except FileNotFoundError:
        return False
    return True


def _is_zarr(place: Location) -> bool:
    return any(place.filesystem.exists(f"{place.path.rstrip('/')}/{name}") for name in ZARR_ROOTS)


def _open_zarr(place: Location) -> xr.Dataset:
    """Open a Zarr store, or references in Parquet, which look like one."""
    import xarray as xr

    root, filesystem = place.path.rstrip("/"), place.filesystem
    if filesystem.exists(f"{root}/zarr.json"):
        consolidated = b"consolidated_metadata" in filesystem.cat_file(f"{root}/zarr.json")
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
    if start[:2] == b"\x1f\x8b":
        raise SourceError(f"{shown(place.url)} is compressed by gzip as a whole. Unpack it with `gunzip`.")
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
            data = open_grib(messages.OnServer(_remote(place)))
    data = open_grib(messages.OnDisk(place.copied().path)) if data is None else data
    return data if chunks is None else data.chunk(chunks)


def _open_netcdf3(place: Location, chunks: dict[str, int] | None) -> xr.Dataset:
    import xarray as xr

    if place.local:
        return _decoded(xr.open_dataset(place.path, engine="netcdf4", chunks=chunks, decode_cf=False))
    data = open_netcdf3(_remote(place))
    return _decoded(data if chunks is None else data.chunk(chunks))


def _remote(place: Location) -> RemoteFile:
    size = int(place.filesystem.info(place.path)["size"])
    return RemoteFile(place.filesystem, place.path, size, shown(place.url))


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


def _joined(place: Location) -> xr.Dataset:
    """Join the files of a glob: along time where their times differ, along `member` where they are the same."""
    import xarray as xr

    paths = sorted(place.filesystem.glob(place.path))
    if not paths:
        raise SourceError(
            f"Nothing matches {shown(place.url)}. Check the pattern, and the credentials if it is a bucket."
        )
    if all(geotiff.NAME.search(p) for p in paths):
        return geotiff.open_geotiffs([geotiff.record_of(place.at(p).copied().path) for p in paths])
    found = [_lazily(place.at(p)) for p in paths]
    if len(found) == 1:
        return found[0]
    _check_alike(found, paths)
    times = [_times(d, p) for d, p in zip(found, paths, strict=True)]
    _check_one_calendar(times, paths)
    same = all(len(t) == len(times[0]) and (t == times[0]).all() for t in times)
    dim = MEMBER if same else "time"
    if not same:
        _check_one_realization(found, paths)
        found = [d for _, d in sorted(zip((t[0] for t in times), found, strict=True), key=lambda pair: pair[0])]
    try:
        joined = xr.concat(
            found, dim, data_vars=_amounts(found[0]) if same else "minimal", coords="minimal", compat="equals",
            join="exact", combine_attrs="override",
        )  # fmt: skip
    except (ValueError, KeyError) as e:
        raise SourceError(
            f"The {len(paths)} files of {shown(place.url)} do not fit together along {dim}: "
            f"{str(e).splitlines()[0][:200]}. Name files of one grid and one set of variables."
        ) from e
    if same and not any(MEMBER in d.variables or MEMBER in d.dims for d in found):
        joined = joined.assign_coords({MEMBER: _distinct(paths)})
    stamps = joined["time"].to_index()
    if not same and stamps.has_duplicates:
        raise SourceError(
            f"Files of {shown(place.url)} hold the same time twice: {stamps[stamps.duplicated()][0]}. Name each once."
        )
    return joined


def _check_alike(found: list[xr.Dataset], paths: list[str]) -> None:
    """Refuse files whose variables differ, or mean different things: joined, all would mean what the first does."""
    names = _amounts(found[0])
    for dataset, path in zip(found[1:], paths[1:], strict=True):
        if set(_amounts(dataset)) != set(names):
            differ = ", ".join(sorted(set(_amounts(dataset)) ^ set(names)))
            raise SourceError(
                f"The files do not fit together: {differ} is not in all of them. Name files of one set of variables."
            )
        for name in names:
            one, other = ([str(d[name].attrs.get(key, "")) for key in MEANING] for d in (found[0], dataset))
            if one != other:
                raise SourceError(
                    f"The files do not fit together: {name!r} is {', '.join(filter(None, one)) or 'not described'} in "
                    f"some, {', '.join(filter(None, other)) or 'not described'} in {path}. Name files of one kind."
                )


def _check_one_calendar(times: list[Any], paths: list[str]) -> None:
    """Refuse files whose dates cannot be compared."""
    calendars = [getattr(t[0], "calendar", "standard") if t.dtype == object else "standard" for t in times]
    for calendar, path in zip(calendars[1:], paths[1:], strict=True):
        if calendar != calendars[0]:
            raise SourceError(
                f"The files do not fit together: the calendar is {calendars[0]} in {paths[0]}, {calendar} in {path}. "
                "Name files of one calendar."
            )


def _check_one_realization(found: list[xr.Dataset], paths: list[str]) -> None:
    """Refuse files of different models or realizations whose times follow each other, by what CMIP files say."""
    for key in REALIZATION:
        said = {str(d.attrs[key]): path for d, path in zip(found, paths, strict=True) if key in d.attrs}
        if len(said) > 1:
            (one, a), (other, b) = list(said.items())[:2]
            raise SourceError(
                f"The files are of several realizations, so their times make no series: {key} is {one} in {a}, {other} "
                f"in {b}. Name files of one; or of the same times, which are driving members."
            )


def _amounts(dataset: xr.Dataset) -> list[str]:
    """Variables that hold data, and may differ between members: those along time that are bounds of none."""
    bounds = {v.attrs.get("bounds") or v.encoding.get("bounds") for v in dataset.variables.values()}
    return [n for n in map(str, dataset.data_vars) if "time" in dataset[n].dims and n not in bounds]


def _distinct(paths: list[str]) -> list[str]:
    """What tells paths apart: the words that are not the same in all of them, such as r1i1p1f1; else all of each."""
    words = [re.split(r"[/._-]", path) for path in paths]
    if len({len(w) for w in words}) > 1:
        return paths
    differ = [i for i, at in enumerate(zip(*words, strict=True)) if len(set(at)) > 1]
    found = ["_".join(w[i] for i in differ) for w in words]
    return found if len(set(found)) == len(found) else paths


def _times(dataset: xr.Dataset, path: str) -> Any:
    if "time" not in dataset.variables or dataset["time"].size == 0:
        raise SourceError(f"{path} has no time, so it cannot be joined with the others. Name files with a time axis.")
    return dataset["time"].values.ravel()


def _lazily(place: Location) -> xr.Dataset:
    """Open one of many with dask, which xarray needs to join without reading; a single time becomes a dimension."""
    data = _open_zarr(place).chunk() if _is_zarr(place) else _open_file(place, chunks={})
    if "time" in data.coords and data["time"].ndim == 0:
        data = data.expand_dims("time")
    return data


def _stamp(info: Mapping[str, Any]) -> str:
    """What changes when an object does: its etag where there is one, else size and time of change."""
    etag = info.get("ETag") or info.get("etag")
    changed = info.get("mtime") or info.get("LastModified") or info.get("last_modified") or info.get("updated")
    return f"{info.get('size')} {etag or changed}"


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
        digest.update(f"{key.removeprefix(path)} {_stamp(info)}\n".encode())
    return digest.hexdigest()


def _file_fingerprint(place: Location) -> str:
    digest = hashlib.sha256()
    if not place.local:
        stamp = _stamp(place.filesystem.info(place.path))
        if not stamp.endswith("None"):
            digest.update(stamp.encode())
            return digest.hexdigest()
    with place.filesystem.open(place.path, "rb") as opened:
        while block := opened.read(CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()
