"""The manifest: size and sha256 of every object of a version, so that any copy of it can be checked."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stsr_core.catalog.addresses import inside
from stsr_core.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stsr_core.catalog.documents import Documents

NAME = "manifest.json"
THREADS = 8


class Entry(BaseModel):
    """One object."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """All objects of a version by their path below it, but the items and the manifest itself."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    format: Literal[1] = 1
    objects: dict[str, Entry]

    def encode(self) -> bytes:
        """Encode as stored; equal manifests have equal bytes."""
        ordered = Manifest(objects=dict(sorted(self.objects.items())))
        return (ordered.model_dump_json(indent=1) + "\n").encode()

    @classmethod
    def decode(cls, raw: bytes, where: str) -> Manifest:
        """Decode a stored manifest.

        Raises:
            StoreError: it is damaged, or names a path outside the version.
        """
        try:
            manifest = cls.model_validate_json(raw)
        except ValidationError as e:
            raise StoreError(f"{where} is no manifest ({e.error_count()} errors). Fetch the version again.") from e
        for path in manifest.objects:
            if not inside(f"./{path}"):
                raise StoreError(
                    f"{where} names {path!r}, outside the version. It is damaged or forged; do not use it."
                )
        return manifest


def is_item(path: str) -> bool:
    """Whether a path is that of an item document, whose links may change after publication."""
    return "/" not in path and path.startswith("v") and path.endswith(".json")


def make_manifest(documents: Documents, prefix: str, known: Mapping[str, str]) -> Manifest:
    """Make the manifest of what is stored below a prefix.

    Args:
        documents: where.
        prefix: place of the version.
        known: sha256 of objects that were hashed when they were written (shards, by their receipts), by path.
    """
    files = {p.removeprefix(f"{prefix}/"): size for p, (size, _) in documents.files(prefix).items()}
    paths = [p for p in sorted(files) if p != NAME and not is_item(p)]

    def entry(path: str) -> Entry:
        return Entry(size=files[path], sha256=known.get(path) or digest(documents, f"{prefix}/{path}")[1])

    with ThreadPoolExecutor(THREADS) as pool:
        return Manifest(objects=dict(zip(paths, pool.map(entry, paths), strict=True)))


def digest(documents: Documents, path: str) -> tuple[int, str]:
    """Size and sha256 of a stored object.

    Raises:
        StoreError: it is not there.
    """
    found = documents.fetch(path)
    if found is None:
        raise StoreError(f"{documents.destination}/{path} is missing. Fetch the version again.")
    return len(found[0]), hashlib.sha256(found[0]).hexdigest()


def compare(documents: Documents, prefix: str, manifest: Manifest) -> list[str]:
    """Re-compute every digest below a prefix, "" for all; returns what is wrong, object by object."""

    def flaw(path: str) -> str | None:
        try:
            found = digest(documents, f"{prefix}/{path}".removeprefix("/"))
        except StoreError:
            return f"{path} is missing"
        entry = manifest.objects[path]
        return None if found == (entry.size, entry.sha256) else f"{path} is not as published"

    with ThreadPoolExecutor(THREADS) as pool:
        return [f for f in pool.map(flaw, sorted(manifest.objects)) if f is not None]
