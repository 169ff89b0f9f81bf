"""PostgreSQL, a Prefect server on it, and a process worker: each can be killed alone.

with start(folder, checkpoints) as site:
    run = site.api.start("nightly/nightly")
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.real import postgres
from tests.real.prefect_api import Api
from tests.real.site import PRODUCT, ROOT, free_port

WAIT_S = 240.0


@dataclass
class Site:
    """Database, Prefect server and worker as processes that can be killed one by one."""

    folder: Path
    database: postgres.Postgres
    environment: dict[str, str]
    port: int
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def api(self) -> Api:
        return Api(f"http://127.0.0.1:{self.port}/api")

    @property
    def catalogue(self) -> Path:
        return self.folder / "catalogue"

    def deploy(self, *arguments: str, **settings: str) -> None:
        command = [sys.executable, "-m", "stsr_core.cli", "deploy", "--home", str(self.folder), *arguments]
        environment = self.environment | settings
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def run(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", *arguments], cwd=self.folder, env=self.environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def run_server(self) -> None:
        self.run("server", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port))
        wait_for(lambda: answers(f"{self.api.url}/health"), "the server to answer")

    def run_worker(self) -> None:
        self.run("worker", "prefect", "worker", "start", "--pool", "stsr", "--type", "process", "--name", "test")

    def kill(self, name: str) -> None:
        """Kill a process at once, and only that one."""
        self.processes[name].kill()
        self.processes[name].wait()

    def attempts(self) -> set[str]:
        return {path.name for path in (self.catalogue / PRODUCT / "data").glob("*")}

    def receipts(self) -> int:
        return len(list((self.catalogue / PRODUCT / "data").rglob("receipts/*.json")))


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.HTTPError:
        return False


def wait_for(happens: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + WAIT_S
    while not happens():
        assert time.monotonic() < until, f"waited {WAIT_S:.0f} s for {what}"
        time.sleep(0.1)


@contextmanager
def start(folder: Path, checkpoints: Path, **settings: str) -> Iterator[Site]:
    """Run all of it on the catalog.yaml of a folder, with more settings if need be, until the block ends."""
    port = free_port()
    with postgres.start() as database:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "STSR_"))} | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "STSR_CATALOG_FILE": str(folder / "catalog.yaml"),
            "STSR_CHECKPOINTS": str(checkpoints),
            "STSR_DESTINATION": str(folder / "catalogue"),
            "STSR_DEVICE": "cpu",
            "STSR_WORKERS": "1",
            "PREFECT_HOME": str(folder),
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
            "PREFECT_API_DATABASE_CONNECTION_URL": database.url.replace("postgresql:", "postgresql+asyncpg:"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "DO_NOT_TRACK": "1",
            **settings,
        }
        site = Site(folder, database, environment, port)
        try:
            site.run_server()
            site.deploy()
            site.run_worker()
            yield site
        finally:
            for process in site.processes.values():
                with suppress(ProcessLookupError):  # a test killed it, and nothing of it is left
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
