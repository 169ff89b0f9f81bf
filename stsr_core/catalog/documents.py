"""Small JSON documents in a folder or bucket, with the two writes that publishing rests on.

`create` never overwrites, and `replace` succeeds only if nobody else replaced the document meanwhile. In
buckets both are conditional writes of the server; on local disks a lock file stands in for the second.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stsr_core.errors import PublicationError

Options = Mapping[str, object]
S3_NAMES = {"endpoint_url": "endpoint", "key": "access_key_id", "secret": "secret_access_key"}  # s3fs to obstore
Document = dict[str, Any]


class ConflictError(PublicationError):
    """Another publisher was faster."""


def encode(document: Document) -> bytes:
    """Encode a document as it is stored."""
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True)
class Documents:
    """Documents below a destination, a local folder or s3://bucket/prefix; paths are relative to it."""

    destination: str
    options: Options = field(default_factory=dict, repr=False)

    def _bucket(self) -> Any:
        from obstore.store import S3Store

        o: dict[str, Any] = dict(self.options)
        return S3Store.from_url(
            self.destination,
            **{name: o[key] for key, name in S3_NAMES.items() if key in o},
            skip_signature=bool(o.get("anon", False)),
            region="us-east-1",
            client_options={"allow_http": True},
        )

    @property
    def _local(self) -> Path | None:
        return None if "://" in self.destination else Path(self.destination)

    def read(self, path: str) -> tuple[Document, str] | None:
        """Return a document and the tag of its state, None where there is none.

        Raises:
            PublicationError: the document is no JSON object, or the store cannot be reached.
        """
        found = self._read_local(path) if self._local is not None else self._read_bucket(path)
        if found is None:
            return None
        raw, tag = found
        try:
            document = json.loads(raw)
        except ValueError as e:
            raise PublicationError(
                f"{self.destination}/{path} is damaged ({e}). Restore it from a backup before you publish."
            ) from e
        return document, tag

    def _read_local(self, path: str) -> tuple[bytes, str] | None:
        assert self._local is not None
        try:
            raw = (self._local / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return raw, hashlib.sha256(raw).hexdigest()

    def _read_bucket(self, path: str) -> tuple[bytes, str] | None:
        import obstore

        try:
            result = obstore.get(self._bucket(), path)
            return bytes(result.bytes()), str(result.meta["e_tag"])
        except FileNotFoundError:
            return None
        except obstore.exceptions.BaseError as e:
            raise self._unreachable(e) from e

    def create(self, path: str, document: Document) -> None:
        """Write a document that is not there yet.

        Raises:
            ConflictError: it is there.
            PublicationError: the destination cannot be written.
        """
        if self._local is not None:
            target = self._local / path
            with self._locked(target):
                if target.exists():
                    raise ConflictError(f"{target} exists already; it is never overwritten.")
                _write_atomically(target, encode(document))
            return
        import obstore

        try:
            obstore.put(self._bucket(), path, encode(document), mode="create")
        except obstore.exceptions.AlreadyExistsError as e:
            raise ConflictError(f"{self.destination}/{path} exists already; it is never overwritten.") from e
        except obstore.exceptions.BaseError as e:
            raise self._unreachable(e) from e

    def replace(self, path: str, document: Document, tag: str) -> None:
        """Replace a document that is still in the state `tag`.

        Raises:
            ConflictError: somebody else replaced it.
            PublicationError: the destination cannot be written.
        """
        if self._local is not None:
            target = self._local / path
            with self._locked(target):
                now = self._read_local(path)
                if now is None or now[1] != tag:
                    raise ConflictError(f"{target} was changed by another publisher.")
                _write_atomically(target, encode(document))
            return
        import obstore

        try:
            obstore.put(self._bucket(), path, encode(document), mode={"e_tag": tag})
        except (obstore.exceptions.PreconditionError, FileNotFoundError) as e:
            raise ConflictError(f"{self.destination}/{path} was changed by another publisher.") from e
        except obstore.exceptions.BaseError as e:
            raise self._unreachable(e) from e

    def remove(self, path: str) -> None:
        """Remove a document or everything below a prefix."""
        from stsr_core.store.layout import filesystem

        fs, root = filesystem(self.destination, self.options)
        if fs.exists(f"{root}/{path}"):
            fs.rm(f"{root}/{path}", recursive=True)

    def names(self, prefix: str) -> list[str]:
        """Names directly below a prefix."""
        from stsr_core.store.layout import filesystem

        fs, root = filesystem(self.destination, self.options)
        if not fs.isdir(f"{root}/{prefix}"):
            return []
        return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(f"{root}/{prefix}", detail=False))

    def _unreachable(self, error: Exception) -> PublicationError:
        first = str(error).strip().split("\n")[0][:200]
        return PublicationError(f"{self.destination} cannot be used ({first}). Check address, credentials and rights.")

    @contextmanager
    def _locked(self, target: Path) -> Iterator[None]:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(target.parent / ".lock", os.O_RDWR | os.O_CREAT)
        except OSError as e:
            raise PublicationError(
                f"{target.parent} cannot be written ({e.strerror}). Check the path and its permissions."
            ) from e
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _write_atomically(target: Path, data: bytes) -> None:
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    part.write_bytes(data)
    part.replace(target)
