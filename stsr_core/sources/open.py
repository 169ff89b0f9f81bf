"""Opening: a path or URL becomes a lazy dataset; its content, a fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from stsr_core.errors import SourceError

if TYPE_CHECKING:
    import xarray as xr
    from fsspec import AbstractFileSystem

PACKAGE = "package:"  # scheme of files that are installed with stsr
CHUNK_BYTES = 1 << 20


def located(url: str, base: Path | None = None) -> str:
    """Resolve a URL of catalog.yaml: `package:` files, and paths relative to `base`."""
    if url.startswith(PACKAGE):
        return str(files("stsr_core") / url.removeprefix(PACKAGE))
    if "://" in url or base is None or Path(url).is_absolute():
        return url
    return str(base / url)


def _filesystem(url: str, options: Mapping[str, object]) -> tuple[AbstractFileSystem, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url, **options)
    except (ValueError, ImportError) as e:
        raise SourceError(f"{url} has a scheme that cannot be read here ({e}). Use a path, https:// or s3://.") from e


def _is_zarr(filesystem: AbstractFileSystem, path: str) -> bool:
    return any(filesystem.exists(f"{path.rstrip('/')}/{name}") for name in ("zarr.json", ".zgroup", ".zmetadata"))


def _is_consolidated(filesystem: AbstractFileSystem, path: str) -> bool:
    root = path.rstrip("/")
    if filesystem.exists(f"{root}/.zmetadata"):
        return True
    return filesystem.exists(f"{root}/zarr.json") and b"consolidated_metadata" in filesystem.cat_file(
        f"{root}/zarr.json"
    )


def open_dataset(
    url: str, *, base: Path | None = None, storage_options: Mapping[str, object] | None = None
) -> xr.Dataset:
    """Open NetCDF or Zarr lazily.

    Args:
        url: local path, `package:` file or any fsspec URL.
        base: folder that relative paths start from.
        storage_options: options of the fsspec filesystem.

    Raises:
        SourceError: nothing there, nothing that can be reached, or no dataset.
    """
    import xarray as xr

    place, options = located(url, base), dict(storage_options or {})
    filesystem, path = _filesystem(place, options)
    try:
        if not filesystem.exists(path):
            raise SourceError(f"Nothing is at {place}. Check the path, and the credentials if it is a bucket.")
        if _is_zarr(filesystem, path):
            return xr.open_zarr(
                place,
                storage_options=options or None,
                chunks=None,
                decode_timedelta=False,
                consolidated=_is_consolidated(filesystem, path),
            )
        if filesystem.isdir(path):
            raise SourceError(f"{place} is a folder without a Zarr store. Name a NetCDF file or a Zarr store.")
        if filesystem.size(path) == 0:
            raise SourceError(f"{place} is empty (0 bytes). Fetch it again.")
        local = path if "file" in filesystem.protocol else filesystem.open(path)
        return xr.open_dataset(local, chunks=None, decode_timedelta=False)
    except SourceError:
        raise
    except Exception as e:  # whatever a backend raises on a damaged or unreachable file
        raise SourceError(
            f"{place} cannot be read ({type(e).__name__}: {_first_line(e)}). NetCDF or Zarr is needed; check that "
            "the file is whole, that the server answers, and the credentials."
        ) from e


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def fingerprint(url: str, *, base: Path | None = None, storage_options: Mapping[str, object] | None = None) -> str:
    """Return a digest of what is at a URL: sha256 of a file, or of all objects of a Zarr store with their etags.

    Raises:
        SourceError: nothing there, or nothing that can be reached.
    """
    place = located(url, base)
    filesystem, path = _filesystem(place, dict(storage_options or {}))
    digest = hashlib.sha256()
    try:
        if filesystem.isdir(path):
            for key, info in sorted(filesystem.find(path, detail=True).items()):
                stamp = info.get("ETag") or info.get("mtime") or info.get("LastModified")
                digest.update(f"{key.removeprefix(path)} {info['size']} {stamp}\n".encode())
        else:
            with filesystem.open(path, "rb") as opened:
                while block := opened.read(CHUNK_BYTES):
                    digest.update(block)
    except OSError as e:
        raise SourceError(f"{place} cannot be read ({_first_line(e)}). Check the path and the credentials.") from e
    return digest.hexdigest()
