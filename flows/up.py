"""`stsr up`: a Prefect server, an S3 server, a worker and the STAC API on this machine, while the command runs."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

import psutil

from stsr_core.errors import ConfigurationError
from stsr_core.files import whole
from stsr_core.home import at_home

START_S = 180.0  # seconds that a server has to answer
STOP_S = 20.0  # seconds that processes have to end when asked
LOOK_EVERY_S = 0.5
BUCKET = "stsr"
PLACES = ("STSR_CATALOG_FILE", "STSR_CHECKPOINTS", "STSR_RELEASES")  # settings that are folders or files of here
WEED_PORTS = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
              "s3.port.grpc")  # fmt: skip


@dataclass(frozen=True)
class Addresses:
    """Where things are; `browse` is the STAC API, or the catalogue's files where the extra `serve` is missing."""

    ui: str
    api: str
    catalogue: str
    browse: str
    folder: Path


@dataclass(frozen=True)
class Child:
    """A process of ours in a session of its own, and its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def running(
    folder: Path, *, port: int, s3_port: int, stac_port: int, metrics_port: int | None
) -> Iterator[tuple[Addresses, list[Child]]]:
    """Start everything, register the deployments, and yield where it is; no process outlives the context.

    Args:
        folder: holds the servers' state, the catalogue, logs and `.env`; the same again goes on with it.
        port: of the Prefect server and its UI.
        s3_port: of the S3 server; used only where `weed` is installed.
        stac_port: of the STAC API; used only where the extra `serve` is installed.
        metrics_port: of the worker's metrics, None for none; Prefect serves them on every interface.

    Raises:
        ConfigurationError: a port is taken, or something does not start; the message ends with its log.
    """
    folder = folder.resolve()
    (folder / "prefect").mkdir(parents=True, exist_ok=True)
    (folder / "logs").mkdir(exist_ok=True)
    weed = find_weed()
    served = find_spec("stac_fastapi") is not None
    for wanted in (port, s3_port if weed else None, stac_port if served else None, metrics_port):
        if wanted is not None:
            _require_free(wanted)
    catalogue, keys = (f"s3://{BUCKET}/catalogue", _keys(folder)) if weed else (str(folder / "catalogue"), None)
    environment = _environment(folder, port, catalogue, keys, s3_port)
    api = f"http://127.0.0.1:{port}/api"
    with ExitStack() as stack:
        stack.enter_context(_on_end(_interrupt))
        children: list[Child] = []
        stack.callback(stop, children)
        if weed and keys:
            children.append(_start("s3", _weed_command(weed, folder, keys, s3_port), folder, environment))
        server = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        children.append(_start("server", [sys.executable, *server], folder, environment))
        if keys:
            _until(lambda: _bucket_is_there(keys, s3_port), children, "s3")
        _until(lambda: _answers(f"{api}/health"), children, "server")
        _deploy(folder, environment)
        worker = ["-m", "prefect", "worker", "start", "--pool", "stsr", "--type", "process", "--name", "stsr-up"]
        metrics = {"PREFECT_CLIENT_METRICS_ENABLED": "true", "PREFECT_CLIENT_METRICS_PORT": str(metrics_port)}
        children.append(
            _start("worker", [sys.executable, *worker], folder, {**environment, **(metrics if metrics_port else {})})
        )
        files = f"http://127.0.0.1:{s3_port}/{BUCKET}/catalogue" if keys else str(folder / "catalogue")
        browse = f"http://127.0.0.1:{stac_port}/" if served else f"{files}/catalog.json"
        if served:
            serve = ["catalog", "serve", "--catalog", catalogue, "--port", str(stac_port), "--public", files]
            command = [sys.executable, "-m", "stsr_core.cli", *serve]
            children.append(_start("catalogue", command, folder, environment))
        yield Addresses(f"http://127.0.0.1:{port}", api, catalogue, browse, folder), children


def wait_for_end(children: list[Child]) -> None:
    """Return on Ctrl-C, and on the other signals that end a command.

    Raises:
        ConfigurationError: a process ended by itself.
    """
    try:
        while True:
            for child in children:
                _require_alive(child)
            time.sleep(LOOK_EVERY_S)
    except KeyboardInterrupt:
        return


def stop(children: list[Child]) -> None:
    """Ask all processes and theirs to end, the youngest first; kill what does not, and all at another Ctrl-C."""
    hurried = threading.Event()
    with _on_end(lambda *_: hurried.set()):
        for child in reversed(children):
            try:
                parent = psutil.Process(child.process.pid)
                left = [parent, *parent.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
            child.process.terminate()
            # SeaweedFS takes 10 s to end when asked politely, and holds nothing that is not on disk.
            until = time.monotonic() + (2.0 if child.name == "s3" else STOP_S)
            while left and not hurried.is_set() and time.monotonic() < until:
                _, left = psutil.wait_procs(left, timeout=LOOK_EVERY_S)
            for process in left:
                process.kill()
            psutil.wait_procs(left, timeout=STOP_S)
            child.process.wait()


@contextmanager
def _on_end(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle Ctrl-C and the other signals that end a command: as they come, a process of ours would be left behind."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _interrupt(_: int, __: FrameType | None) -> None:
    raise KeyboardInterrupt


def find_weed() -> str | None:
    """Path of the S3 server `weed`, None where the extra `up` is not installed."""
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    return str(beside) if beside.is_file() else shutil.which("weed")


def _environment(
    folder: Path, port: int, catalogue: str, keys: tuple[str, str] | None, s3_port: int
) -> Mapping[str, str]:
    """Environment of all children; what runs need of it is in `.env` as well, for commands typed in the folder."""
    settings = {"STSR_DESTINATION": catalogue}
    if keys:
        settings |= {
            "STSR_S3_ENDPOINT": f"http://127.0.0.1:{s3_port}",
            "STSR_S3_ACCESS_KEY_ID": keys[0],
            "STSR_S3_SECRET_ACCESS_KEY": keys[1],
        }
    others = _other_lines(folder / ".env", settings)
    here, there = Path.cwd() / "catalog.yaml", folder / "catalog.yaml"
    named = os.environ.get("STSR_CATALOG_FILE") or any(_name(line) == "STSR_CATALOG_FILE" for line in others)
    if here.is_file() and not there.is_file() and not named:
        others.append(f"STSR_CATALOG_FILE={here}")  # as other commands that are typed here do, runs take it
    lines = [*(f"{k}={v}" for k, v in settings.items()), *others]
    _write_secret(folder / ".env", "\n".join([*lines, ""]))
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    code = str(Path(__file__).resolve().parents[1])
    repository = next((str(p) for p in (Path(code), Path.cwd()) if (p / ".git").exists()), code)
    return {
        "STSR_REPOSITORY": repository,  # of `redeploy`, if nothing else is set
        **kept,
        **_absolute(PLACES),
        **settings,
        "PYTHONPATH": os.pathsep.join(p for p in (code, os.environ.get("PYTHONPATH", "")) if p),
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_METRICS_ENABLED": "true",
        "PREFECT_WORKER_QUERY_SECONDS": "3",
        # leases in files outlive the server; in memory a restart would leave their slots taken for ever
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "DO_NOT_TRACK": "1",
    }


def _absolute(names: Iterable[str]) -> dict[str, str]:
    """Variables that name folders and files, for processes elsewhere; without those that are empty or not set."""
    return {name: os.path.abspath(at_home(os.environ[name])) for name in names if os.environ.get(name)}  # noqa: PTH100


def _other_lines(path: Path, settings: Mapping[str, str]) -> list[str]:
    """Lines of a `.env` that set something else: an operator's."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [line for line in lines if _name(line) not in settings]


def _name(line: str) -> str:
    """Name of the variable that a line of a `.env` sets."""
    return line.partition("=")[0].strip().removeprefix("export ").strip()


def _keys(folder: Path) -> tuple[str, str]:
    """Keys of the S3 server, made once."""
    path = folder / "s3.json"
    if not path.is_file():
        key, secret = secrets.token_hex(10).upper(), secrets.token_hex(20)
        owner = {
            "name": "stsr",
            "credentials": [{"accessKey": key, "secretKey": secret}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        everybody = {"name": "anonymous", "actions": [f"Read:{BUCKET}"]}
        _write_secret(path, json.dumps({"identities": [owner, everybody]}))
    found = json.loads(path.read_text())["identities"][0]["credentials"][0]
    return found["accessKey"], found["secretKey"]


def _write_secret(path: Path, text: str) -> None:
    """Write a file that others may not read, whole or not at all: an operator's lines are in it too."""
    with whole(path.resolve()) as part:
        part.touch(mode=0o600, exist_ok=False)
        part.write_text(text)


def _weed_command(weed: str, folder: Path, keys: tuple[str, str], port: int) -> list[str]:
    data = folder / "s3"
    data.mkdir(exist_ok=True)
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in WEED_PORTS]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        ports = dict(zip(WEED_PORTS, [s.getsockname()[1] for s in sockets], strict=True))
    return [
        weed, "server", "-s3", f"-dir={data}", f"-s3.config={folder / 's3.json'}", f"-s3.port={port}",
        "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=100", "-master.volumeSizeLimitMB=256",
        "-master.volumePreallocate=false", "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
        *(f"-{name}={number}" for name, number in ports.items()),
    ]  # fmt: skip


def _start(name: str, command: list[str], folder: Path, environment: Mapping[str, str]) -> Child:
    log = folder / "logs" / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    return Child(name, process, log)


def _deploy(folder: Path, environment: Mapping[str, str]) -> None:
    command = [sys.executable, "-m", "stsr_core.cli", "deploy", "--home", str(folder), "--keep-release"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigurationError(f"The deployments were not registered: {(done.stdout + done.stderr)[-2000:]}")


def _require_free(port: int) -> None:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except OSError as e:
            raise ConfigurationError(f"Port {port} is taken ({e.strerror}). Choose another one; see --help.") from e


def _require_alive(child: Child) -> None:
    if child.process.poll() is not None:
        tail = child.log.read_text(errors="replace")[-2000:]
        raise ConfigurationError(f"The {child.name} ended with code {child.process.returncode}. {child.log}:\n{tail}")


def _until(ready: Callable[[], bool], children: list[Child], name: str) -> None:
    until = time.monotonic() + START_S
    while not ready():
        for child in children:
            _require_alive(child)
        if time.monotonic() > until:
            log = next(child.log for child in children if child.name == name)
            raise ConfigurationError(f"The {name} does not answer after {START_S:.0f} s. See {log}.")
        time.sleep(LOOK_EVERY_S)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _bucket_is_there(keys: tuple[str, str], port: int) -> bool:
    """Whether the bucket exists, made if need be, and can be written: volumes answer later than the port."""
    import s3fs

    fs = s3fs.S3FileSystem(
        endpoint_url=f"http://127.0.0.1:{port}", key=keys[0], secret=keys[1], skip_instance_cache=True
    )
    fs.retries = 1
    try:
        if not fs.exists(BUCKET):
            fs.mkdir(BUCKET)
        fs.pipe_file(f"{BUCKET}/.probe", b"1")
        fs.rm_file(f"{BUCKET}/.probe")
    except Exception:  # whatever the client raises while the server starts
        return False
    return True
