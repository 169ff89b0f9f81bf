"""The life of a Zarr group: begun under a mark, whole once its own metadata is written, removed only if it is ours.

The first object of all is the mark, which stays: only where it lies, or nothing, anything is written or removed. The
group's metadata is written last, so a store opens as a group only when it is whole.
"""

from __future__ import annotations

import json
import uuid
import warnings
from collections.abc import Mapping
from contextlib import suppress
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import zarr
from zarr.errors import ZarrUserWarning
from zarr.storage import FsspecStore, LocalStore, MemoryStore

from stsr_core.errors import StoreError
from stsr_core.store.patience import made_patient

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from zarr.abc.buffer import Buffer
    from zarr.abc.store import Store

MARK = "stsr.json"  # object that tells a group of this code, begun or whole, from whatever else lies at an address
MARK_CONTENT = b'{"written_by": "stsr"}\n'
GROUP = "zarr.json"  # metadata of a group, or an array
BEFORE = "before.json"  # metadata of a group that was whole and is added to, until it is whole again

Options = Mapping[str, object]


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


def _is_local(fs: AbstractFileSystem) -> bool:
    return "file" in fs.protocol


def put(fs: AbstractFileSystem, path: str, content: bytes) -> None:
    """Write an object: the whole of it or nothing."""
    if not _is_local(fs):
        fs.pipe_file(path, content)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(target)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def ensure(fs: AbstractFileSystem, path: str, content: bytes) -> None:
    """Write an object unless it is there as it should be."""
    with suppress(FileNotFoundError):
        if fs.cat_file(path) == content:
            return
    put(fs, path, content)


def drop(url: str, options: Options | None) -> None:
    """Remove an object that may be there."""
    fs, path = filesystem(url, options)
    if fs.exists(path):
        fs.rm(path)


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
    if _is_local(fs):  # elsewhere it may create a bucket
        fs.makedirs(path, exist_ok=True)
    fs.pipe_file(f"{path}/{MARK}", MARK_CONTENT)  # of which part counts, but nothing beside it does


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


def shape_of(url: str, array: str, options: Options | None = None) -> tuple[int, ...]:
    """Shape of an array; of one that is lost, none.

    Raises:
        StoreError: its metadata is damaged.
    """
    try:
        return open_array(url, array, options, mode="r").shape
    except FileNotFoundError:
        return ()


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
        ensure(fs, f"{path}/{GROUP}", made[GROUP].to_bytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ZarrUserWarning)
            zarr.consolidate_metadata(store)
        drop(f"{url}/{BEFORE}", options)
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
