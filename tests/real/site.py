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

import yaml

from tests.real.prefect_api import Api

ROOT = Path(__file__).parents[2]
PRODUCT = "small"
CODE = ("stsr_core", "flows", "deployments", "catalog.yaml", "pyproject.toml")


@dataclass(frozen=True)
class Site:
    """A running `stsr up`."""

    process: subprocess.Popen[str]
    folder: Path
    port: int
    stac_port: int
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

    def stsr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the folder, as an operator does."""
        environment = {
            **self.environment,
            "PREFECT_API_URL": self.api.url,
            "PREFECT_HOME": str(self.folder / "prefect"),
        }
        return subprocess.run(
            [sys.executable, "-m", "stsr_core.cli", *arguments],
            cwd=self.folder, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip


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
    """A git repository of this code with the tags `good` and `broken`."""
    folder.mkdir()
    for name in CODE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=tests", "-c", "user.email=tests@example.org")
        subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)

    git("init", "--quiet")
    for tag, line in (("good", ""), ("broken", "\nraise RuntimeError('a defect of the release')\n")):
        with (folder / "flows" / "nightly.py").open("a") as opened:
            opened.write(line)
        git("add", "-A")
        git("commit", "--quiet", "--allow-empty", "-m", f"Release {tag}")
        git("tag", tag)
    return folder


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
    port, s3_port, stac_port = free_port(), free_port(), free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "stsr_core.cli", "up", "--folder", str(folder), "--port", str(port),
         "--s3-port", str(s3_port), "--stac-port", str(stac_port)],
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
    yield Site(process, folder, port, stac_port, environment)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    process.stdout.close()
