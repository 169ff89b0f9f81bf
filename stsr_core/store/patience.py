"""Patience with object stores: one that has answered before may be away for a minute."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stsr_core.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fsspec import AbstractFileSystem

# s3fs waits 0.1 s * 1.7^n, at most 15 s, between requests: 90 s in all. Servers that restart take less.
TRIES = 15
BUSY = (429, 500, 502, 503, 504)  # HTTP status of a server that may answer a moment later


def made_patient(fs: AbstractFileSystem) -> AbstractFileSystem:
    """Return the filesystem, which from now on outlasts an object store that is away for a minute."""
    if "s3" in fs.protocol:
        from s3fs.core import set_custom_error_handler

        set_custom_error_handler(may_pass)
        fs.retries = TRIES
    return fs


def require_answer(url: str, options: Mapping[str, object] | None = None) -> None:
    """Ask an object store for a path, without patience: a wrong address is found in seconds.

    Raises:
        StoreError: the server does not answer, or refuses the keys.
    """
    from fsspec.core import url_to_fs

    if not url.startswith("s3://"):
        return
    fs, path = url_to_fs(url, **{**(options or {}), "skip_instance_cache": True})
    fs.retries = 2
    try:
        fs.exists(path)
    except Exception as e:
        if not (may_pass(e) or isinstance(e, PermissionError)):
            raise
        server = fs.client_kwargs.get("endpoint_url") or fs.endpoint_url or "its server"
        raise StoreError(
            f"{url} cannot be reached at {server}: {e}. Check STSR_S3_ENDPOINT, the keys and the bucket; "
            "`stsr doctor` tries them."
        ) from None  # the cause may hold a signed URL


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed a moment later: no connection, or a server that is busy."""
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in BUSY
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    return isinstance(error, exceptions.ConnectionError | exceptions.HTTPClientError | OSError)
