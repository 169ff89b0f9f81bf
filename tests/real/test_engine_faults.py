"""Processes of the engine killed for real: the finished store is the same, byte for byte."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import xarray as xr

ROOT = Path(__file__).parents[2]
MEMBERS = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(5)
    time_ = xr.date_range("2001-01-01 01:00", periods=26, freq="1h")
    coords = {"time": time_, "y": 96_000.0 - 4000.0 * np.arange(24), "x": 4000.0 * np.arange(1, 25)}
    rain = xr.DataArray(rng.gamma(0.5, 2.0, (26, 24, 24)).astype("float32"), coords, ("time", "y", "x"), "rain")
    rain.attrs["units"] = "mm"
    path = tmp_path_factory.mktemp("source") / "in.nc"
    rain.to_netcdf(path)
    return path


def start(source: Path, output: Path, checkpoints: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "stsr_core.cli", "downscale", str(source), str(output), "--variable", "rain"]
    options = ["--space", "4", "--time", "1", "--members", str(MEMBERS), "--device", "cpu", "--workers", "2",
               "--declare", "time_label: end"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "STSR_CHECKPOINTS": str(checkpoints)}
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
    first, second = start(source, output, checkpoints), start(source, output, checkpoints)
    errors = []
    readers = [
        threading.Thread(target=lambda p=p: errors.append(p.communicate(timeout=300)[1])) for p in (first, second)
    ]
    for r in readers:
        r.start()
    for r in readers:
        r.join()
    assert 0 in (first.returncode, second.returncode), errors
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
