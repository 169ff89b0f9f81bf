"""Which code this is: what a shard's digest and an item's provenance say made them."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path


@cache
def code_version() -> str:
    """Version of the package, and a digest of its source as a local version: two commits of one version differ."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(
            f"{path.relative_to(folder).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
        )
    return f"{version('stsr')}+{digest.hexdigest()[:12]}"
