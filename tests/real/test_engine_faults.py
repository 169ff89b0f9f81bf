"""Processes of the engine killed for real: the finished store is the same, byte for byte."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import s3fs
import xarray as xr

from tests.real.proxy import Proxy

ROOT = Path(__file__).parents[2]
MEMBERS = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(5)
    time_ = xr.date_range("2001-01-01 01:00", periods=50, freq="1h")
    coords = {"time": time_, "y": 96_000.0 - 4000.0 * np.arange(24), "x": 4000.0 * np.arange(1, 25)}
    rain = xr.DataArray(rng.gamma(0.5, 2.0, (50, 24, 24)).astype("float32"), coords, ("time", "y", "x"), "rain")
    rain.attrs["units"] = "mm"
    path = tmp_path_factory.mktemp("source") / "in.nc"
    rain.to_netcdf(path)
    return path


def start(source: Path, output: Path | str, checkpoints: Path, **settings: str) -> subprocess.Popen[str]:
    """Run `stsr downscale` in a process group of its own; settings are environment variables."""
    command = [sys.executable, "-m", "stsr_core.cli", "downscale", str(source), str(output), "--variable", "rain"]
    options = ["--space", "4", "--time", "1", "--members", str(MEMBERS), "--device", "cpu", "--workers", "2",
               "--declare", "time_label: end"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "STSR_CHECKPOINTS": str(checkpoints), **settings}
    return subprocess.Popen(
        [*command, *options], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def receipts(output: Path) -> list[Path]:
    return sorted((output / "precipitation" / "receipts").glob("*.json"))


def wait_for(condition, seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(source: Path, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("undisturbed") / "out.zarr"
    finish(start(source, output, checkpoints))
    return files(output)


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Processes that hold the networks: the busiest of all children."""
    children = psutil.Process(process.pid).children(recursive=True)
    return sorted(children, key=lambda p: sum(p.cpu_times()[:2]), reverse=True)[:2]


def test_a_worker_killed_in_the_middle_of_a_shard_changes_nothing(source, checkpoints, undisturbed, tmp_path):
    output = tmp_path / "out.zarr"
    process = start(source, output, checkpoints)
    wait_for(lambda: len(receipts(output)) >= 1)
    workers_of(process)[0].kill()
    finish(process)
    assert files(output) == undisturbed


def test_a_driver_killed_at_any_time_goes_on_with_what_is_missing(source, checkpoints, undisturbed, tmp_path):
    output = tmp_path / "out.zarr"
    process = start(source, output, checkpoints)
    wait_for(lambda: receipts(output))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finished = {p: p.stat().st_mtime_ns for p in receipts(output)}
    assert 1 <= len(finished) < len([n for n in undisturbed if "/receipts/" in n])
    assert not (output / "zarr.json").exists()
    finish(start(source, output, checkpoints))
    assert files(output) == undisturbed
    assert {p: p.stat().st_mtime_ns for p in finished} == finished


def test_two_runs_of_one_plan_at_once_make_the_same_store(source, checkpoints, undisturbed, tmp_path):
    output = tmp_path / "out.zarr"
    processes = [start(source, output, checkpoints) for _ in range(2)]
    with ThreadPoolExecutor() as pool:  # a pipe that nobody reads would hold up the other
        errors = list(pool.map(lambda process: process.communicate(timeout=300)[1], processes))
    codes = [process.returncode for process in processes]
    assert 0 in codes, errors
    for code, error in zip(codes, errors, strict=True):
        assert code == 0 or "Traceback" not in error.split("stsr: ")[-1], error
    assert files(output) == undisturbed


def test_a_full_disk_is_an_error_and_a_rerun_finishes(source, checkpoints, undisturbed, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    kilobytes = sum(map(len, undisturbed.values())) // 2048
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        process = start(source, small / "out.zarr", checkpoints)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 1
        assert "No space left" in errors
        assert "Traceback" not in errors.split("stsr: ")[-1]
        assert not (small / "out.zarr" / "zarr.json").exists()
        subprocess.run(["mount", "-o", "remount,size=100m", str(small)], check=True)
        finish(start(source, small / "out.zarr", checkpoints))
        assert files(small / "out.zarr") == undisturbed
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_workers_that_are_all_killed_one_after_another_change_nothing(source, checkpoints, undisturbed, tmp_path):
    output = tmp_path / "out.zarr"
    process = start(source, output, checkpoints)
    wait_for(lambda: len(receipts(output)) >= 1)
    for worker in workers_of(process):
        before = len(receipts(output))
        worker.kill()
        wait_for(lambda before=before: len(receipts(output)) > before or process.poll() is not None)
    finish(process)
    assert files(output) == undisturbed


def test_a_shard_corrupted_after_its_receipt_is_found_and_made_again_alone(source, checkpoints, undisturbed, tmp_path):
    output = tmp_path / "out.zarr"
    process = start(source, output, checkpoints)
    wait_for(lambda: len(receipts(output)) >= 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    chunks = [p for p in sorted((output / "precipitation" / "c").rglob("*")) if p.is_file() and p.stat().st_size]
    harmed, kept = chunks[0], {p: p.stat().st_mtime_ns for p in receipts(output)[1:]}
    harmed.write_bytes(bytes(b ^ 1 for b in harmed.read_bytes()))
    finish(start(source, output, checkpoints))
    assert files(output) == undisturbed
    assert sum(p.stat().st_mtime_ns == at for p, at in kept.items()) >= len(kept) - 1


@pytest.mark.parametrize("fault", ["cut", "503"])
def test_a_store_that_is_away_for_half_a_minute_changes_nothing(s3, source, checkpoints, undisturbed, tmp_path, fault):
    bucket = s3.make_bucket(f"away-{fault}")
    with Proxy(s3.endpoint.removeprefix("http://")) as proxy:
        keys = {"STSR_S3_ACCESS_KEY_ID": s3.key, "STSR_S3_SECRET_ACCESS_KEY": s3.secret}
        process = start(source, f"{bucket}/out.zarr", checkpoints, STSR_S3_ENDPOINT=proxy.address, **keys)
        there = s3fs.S3FileSystem(**s3.options, skip_instance_cache=True, use_listings_cache=False)
        wait_for(lambda: there.glob(f"{bucket}/out.zarr/precipitation/receipts/*.json"))
        proxy.mode = fault
        time.sleep(30)
        refused, proxy.mode = proxy.refused, "pass"
        finish(process)
    assert refused > 0
    there.get(f"{bucket}/out.zarr/", f"{tmp_path}/", recursive=True)
    root = next(tmp_path.rglob("zarr.json")).parent
    assert files(root) == undisturbed


@contextmanager
def dask_cluster(port: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A scheduler and two workers, as somebody else runs them; yields their processes, the scheduler first."""
    dask = [sys.executable, "-m", "dask"]
    worker = [*dask, "worker", f"tcp://127.0.0.1:{port}", "--nthreads", "1", "--resources", "GPU=1", "--no-dashboard"]
    commands = [[*dask, "scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"], worker, worker]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    quiet = subprocess.DEVNULL
    processes = [
        subprocess.Popen(c, env=environment, start_new_session=True, stdout=quiet, stderr=quiet) for c in commands
    ]
    try:
        yield processes
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_scheduler_that_dies_is_an_error_and_a_rerun_finishes(source, checkpoints, undisturbed, tmp_path):
    output = tmp_path / "out.zarr"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    with dask_cluster(port) as processes:
        process = start(source, output, checkpoints, STSR_SCHEDULER_ADDRESS=address)
        wait_for(lambda: receipts(output) or process.poll() is not None)
        os.killpg(processes[0].pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "scheduler" in errors.split("stsr: ")[-1]
    assert "Traceback" not in errors.split("stsr: ")[-1]
    assert not (output / "zarr.json").exists()
    with dask_cluster(port):
        finish(start(source, output, checkpoints, STSR_SCHEDULER_ADDRESS=address))
    assert files(output) == undisturbed
