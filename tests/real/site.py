"""A running `stsr up` on a small product, as tests and an operator meet it.

with start(folder, checkpoints) as site:
    site.stsr("deploy")
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from tests.real.prefect_api import Api

ROOT = Path(__file__).parents[2]
PRODUCT = "small"
RELEASES = {  # tag, and what is added to a file of it
    "good": ("flows/nightly.py", ""),
    "broken": ("flows/nightly.py", "\nraise RuntimeError('a defect of the release')\n"),
    "unregistrable": (
        "flows/deploy.py",
        "\n\nasync def _automations(*_):\n    raise ConfigurationError('a defect of its deploy')\n",
    ),
}
CODE = ("stsr_core", "flows", "deployments", "catalog.yaml", "pyproject.toml")


@dataclass(frozen=True)
class Site:
    """A running `stsr up`."""

    process: subprocess.Popen[str]
    folder: Path
    port: int
    stac_port: int
    metrics_port: int
    environment: dict[str, str]

    @property
    def api(self) -> Api:
        return Api(f"{self.ui}/api")

    @property
    def ui(self) -> str:
        """Address of the Prefect UI."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def stac(self) -> str:
        """Address of the STAC API."""
        return f"http://127.0.0.1:{self.stac_port}"

    @property
    def metrics(self) -> str:
        """Address of the worker's metrics."""
        return f"http://127.0.0.1:{self.metrics_port}/metrics"

    @property
    def catalogue(self) -> str:
        return "s3://stsr/catalogue"

    @property
    def options(self) -> dict[str, object]:
        lines = dict(line.split("=", 1) for line in (self.folder / ".env").read_text().splitlines())
        return {
            "endpoint_url": lines["STSR_S3_ENDPOINT"],
            "key": lines["STSR_S3_ACCESS_KEY_ID"],
            "secret": lines["STSR_S3_SECRET_ACCESS_KEY"],
        }

    @property
    def for_commands(self) -> dict[str, str]:
        """Environment of commands that talk to the server."""
        return self.environment | {
            "PREFECT_API_URL": self.api.url,
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_WORKER_QUERY_SECONDS": "2",
        }

    def stsr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the folder, as an operator does."""
        return subprocess.run(
            [sys.executable, "-m", "stsr_core.cli", *arguments],
            cwd=self.folder, env=self.for_commands, capture_output=True, text=True, check=False,
        )  # fmt: skip


def engine_of(run: str) -> psutil.Process:
    """The process of a flow run."""
    for process in psutil.process_iter():
        try:
            if "prefect" in " ".join(process.cmdline()) and process.environ().get("PREFECT__FLOW_RUN_ID") == run:
                return process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    raise AssertionError(f"run {run} has no process")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def small_catalog(path: Path) -> None:
    """The shipped catalog.yaml with one product on a small box."""
    catalog = yaml.safe_load((ROOT / "catalog.yaml").read_text())
    grid = {**catalog["grids"]["provence-1km"], "x_min": 950_000.0, "x_max": 990_000.0, "y_min": 6_300_000.0,
            "y_max": 6_340_000.0}  # fmt: skip
    product = {**catalog["products"]["arpege-provence-1km"], "grid": "box", "members": 2}
    path.write_text(yaml.safe_dump({**catalog, "grids": {"box": grid}, "products": {PRODUCT: product}}))


def repository(folder: Path) -> Path:
    """A git repository of this code with a tag for each of RELEASES."""
    folder.mkdir()
    for name in CODE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    git(folder, "init", "--quiet")
    for tag, (name, lines) in RELEASES.items():
        sound = (folder / name).read_text()
        (folder / name).write_text(sound + lines)
        git(folder, "add", "-A")
        git(folder, "commit", "--quiet", "--allow-empty", "-m", f"Release {tag}")
        git(folder, "tag", tag)
        (folder / name).write_text(sound)
    return folder


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=tests", "-c", "user.email=tests@example.org")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@contextmanager
def start(folder: Path, checkpoints: Path) -> Iterator[Site]:
    """Run `stsr up` in a folder until the block ends.

    Raises:
        RuntimeError: it does not start; the message is what it said.
    """
    small_catalog(folder / "catalog.yaml")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "STSR_"))} | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "STSR_CATALOG_FILE": str(folder / "catalog.yaml"),
        "STSR_CHECKPOINTS": str(checkpoints),
        "STSR_DEVICE": "cpu",
        "STSR_WORKERS": "1",
        "STSR_REPOSITORY": str(repository(folder / "repository")),
    }
    port, s3_port, stac_port, metrics_port = (free_port() for _ in range(4))
    process = subprocess.Popen(
        [sys.executable, "-m", "stsr_core.cli", "up", "--folder", str(folder), "--port", str(port),
         "--s3-port", str(s3_port), "--stac-port", str(stac_port), "--metrics-port", str(metrics_port)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
    )  # fmt: skip
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if "Ctrl-C" in line:
            break
    else:
        raise RuntimeError(f"stsr up did not start: {said}")
    site = Site(process, folder, port, stac_port, metrics_port, environment)
    try:
        site.api.switch("nightly/nightly", active=False)  # no run but those of the tests, at any time of the day
        yield site
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(60)
        process.stdout.close()
