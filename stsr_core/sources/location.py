"""Where files are: on a disk or a server, behind any URL that fsspec knows."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stsr_core.errors import SourceError
from stsr_core.sources.ranges import RemoteFile
from stsr_core.sources.remote import shown

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

OptionsOf = Callable[[str], Mapping[str, object]]  # options of the filesystem by URL
PACKAGE = "package:"  # scheme of files that are installed with stsr
STAMPS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "Last-Modified", "updated")  # the surest first
KEPT_S = 2 * 86_400.0  # that local copies are kept after their last use


def no_options(_: str) -> Mapping[str, object]:
    """Give any filesystem no options."""
    return {}


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
    def exists(self) -> bool:
        """Whether something is there; unlike fsspec's `exists`, a refusal or an outage is an error."""
        try:
            self.filesystem.info(self.path)
        except FileNotFoundError:
            return False
        return True

    @property
    def in_parts(self) -> bool:
        """Whether parts of a file can be read; there are HTTP servers that send all of it or nothing."""
        if "http" not in self._protocols:
            return True
        try:
            with self.filesystem.open(self.path, "rb", block_size=1, cache_type="none") as file:
                file.seek(1)
                file.read(1)
        except ValueError:  # of fsspec, which got the beginning instead, or knows that it would
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
        stamp = stamp_of(self.filesystem.info(self.path)) or uuid.uuid4().hex  # a copy that may be old is none
        named = f"{server} {self.url} {stamp}"
        folder = Path(tempfile.gettempdir()) / f"stsr-copies-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        _remove_unused(folder)
        copy = folder / hashlib.sha256(named.encode()).hexdigest()[:32] / Path(self.path).name
        copy.parent.mkdir(exist_ok=True)
        if not copy.exists():
            partial = copy.with_suffix(f".{uuid.uuid4().hex}")
            self.filesystem.get_file(self.path, str(partial))
            partial.replace(copy)
        os.utime(copy.parent)
        return Location(LocalFileSystem(), str(copy), self.url, {})

    def remote_file(self) -> RemoteFile:
        """Return it as a file that is read in parts."""
        return RemoteFile(self.filesystem, self.path, int(self.filesystem.info(self.path)["size"]), shown(self.url))


def _remove_unused(folder: Path) -> None:
    """Remove copies that nobody used for KEPT_S, which would fill the disk night by night."""
    for copy in folder.iterdir():
        with suppress(FileNotFoundError):  # another process was faster
            if copy.stat().st_mtime < time.time() - KEPT_S:
                shutil.rmtree(copy, ignore_errors=True)


def stamp_of(info: Mapping[str, Any]) -> str | None:
    """What changes when an object does: its etag, else its time of change, with its size; None where neither is known.

    `info` is what fsspec's `info` and `find` say; every filesystem has a name of its own for these.
    """
    changed = next((info[name] for name in STAMPS if info.get(name)), None)
    return None if changed is None else f"{info.get('size')} {changed}"
