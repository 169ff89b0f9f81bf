"""A real PostgreSQL server on loopback, from Debian's packages, with a data folder of its own.

with start() as server:
    psycopg.connect(server.url)
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

USER = "stsr"


@dataclass(frozen=True)
class Postgres:
    """A running server."""

    port: int
    folder: Path
    control: Path
    owner: str | None

    def crash(self) -> None:
        """End it as a power cut would: nothing is written back, connections are cut."""
        self._do("-m", "immediate", "stop")

    def restart(self) -> None:
        """Start it on the data that is there."""
        options = f"-c listen_addresses=127.0.0.1 -p {self.port} -k {self.folder} -c fsync=off -c max_connections=300"
        self._do("-w", "-l", self.folder / "log", "-o", options, "start")

    def _do(self, *arguments: object) -> None:
        _run([self.control, "-D", self.folder / "data", *arguments], self.owner)

    @property
    def url(self) -> str:
        """Address of its database, for libpq."""
        return f"postgresql://{USER}@127.0.0.1:{self.port}/postgres"


def programs() -> Path | None:
    """Folder of `initdb` and `pg_ctl`, None where PostgreSQL is not installed."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    return next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)


def has_postgis() -> bool:
    """Whether databases can have the extension PostGIS."""
    return any(Path("/usr/share/postgresql").glob("*/extension/postgis.control"))


@contextmanager
def start() -> Iterator[Postgres]:
    """Run a server with a temporary data folder; both end with the block.

    Raises:
        RuntimeError: PostgreSQL is not installed.
        subprocess.CalledProcessError: it does not start.
    """
    there = programs()
    if there is None:
        raise RuntimeError("PostgreSQL is not installed. Install Debian's package `postgresql`.")
    # not below pytest's folders: PostgreSQL refuses root, and they are closed to the package's own user
    with tempfile.TemporaryDirectory(prefix="stsr-postgres-", ignore_cleanup_errors=True) as name:
        folder, owner = Path(name), "postgres" if os.geteuid() == 0 else None
        if owner:
            shutil.chown(folder, owner)
        initdb = [there / "initdb", "-D", folder / "data", "-U", USER, "-A", "trust", "-E", "UTF8", "--no-sync"]
        _run(initdb, owner)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        server = Postgres(port, folder, there / "pg_ctl", owner)
        server.restart()
        try:
            yield server
        finally:
            server.crash()


def _run(command: list[object], user: str | None) -> None:
    subprocess.run([str(c) for c in command], check=True, stdout=subprocess.DEVNULL, user=user, cwd="/")
