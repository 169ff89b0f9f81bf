import json
import time
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

from stsr_core import bench, bench_regrid
from stsr_core.checkpoint import Library
from stsr_core.cli import app
from stsr_core.downscaler import Downscaler, choose_device
from stsr_core.ensemble.cluster import Cluster
from stsr_core.errors import ConfigurationError
from stsr_core.factors import Factor
from tests.tiny import TINY, small_patches

SMALL = {"cells": 40, "steps": 6, "members": 5}


def test_the_engine_is_measured_for_every_number_of_workers(checkpoints, tmp_path):
    lines: list[str] = []
    options = bench.Options(Factor(space=4, time=3), **SMALL, workers=(1,), device="cpu", output=str(tmp_path))
    figures = bench.bench_engine(options, checkpoints=str(checkpoints), report=lines.append)
    run = figures["runs"][0]
    assert figures["fine_shape"] == [5, 6, 40, 40]
    assert run["network_evaluations"] > 0
    assert 0 < run["share_outside_networks"] < 1
    assert run["fine_cell_steps_per_s"] > 0
    assert run["bytes_written"] > 0
    assert 0 < run["peak_memory_per_worker"] < 4e9
    assert figures["flop_per_cell_evaluation"] > 100
    assert 0 < figures["share_of_peak"] < 1
    assert figures["rainfarm_seconds_per_member"] > 0
    assert "1 workers" in lines[0]
    assert list(tmp_path.iterdir()) == []
    json.dumps(figures)


def test_a_run_counts_the_workers_that_there_are_as_on_two_gpus_not_those_asked_for(checkpoints, tmp_path, monkeypatch):
    local = Cluster._local
    monkeypatch.setattr(Cluster, "_local", lambda self, gpus: local(replace(self, workers=min(self.workers, 2)), gpus))
    lines: list[str] = []
    options = bench.Options(Factor(space=4, time=3), **SMALL, workers=(3,), device="cpu", output=str(tmp_path))
    figures = bench.bench_engine(options, checkpoints=str(checkpoints), report=lines.append)
    assert [run["workers"] for run in figures["runs"]] == [2]
    assert lines[0].startswith("2 workers: ")


def test_the_share_outside_the_networks_is_of_the_time_of_all_workers_with_reading(checkpoints, tmp_path, monkeypatch):
    options = bench.Options(Factor(space=4, time=3), **SMALL, device="cpu")
    checkpoint = Library.open(checkpoints).serving(options.factor)
    plan = bench._plan(checkpoint, options, members=5)
    downscaler = Downscaler.load(checkpoint, options.factor, choose_device("cpu"))
    evaluations, cells = (sum(map(count, plan.shards)) for count in (plan.evaluations, plan.cell_evaluations))

    def generate(*_, progress, **__):
        (tmp_path / "out" / "precipitation" / "c").mkdir()
        time.sleep(0.2)
        progress(evaluations - 1, 1.5)
        progress(1, 0.5)

    monkeypatch.setattr(bench, "generate", generate)
    run = bench._run(plan, downscaler, 2, str(tmp_path / "out"), options, reading=3.0)
    assert (run["workers"], run["network_evaluations"]) == (2, evaluations)
    assert 0.2 < run["seconds"] < 5
    assert 1 - run["share_outside_networks"] == pytest.approx(2.0 / (2 * (3.0 + run["seconds"])))
    assert run["cell_evaluations_per_s_in_networks"] == pytest.approx(cells / 2.0)
    assert bench._rate(run) == pytest.approx(cells)  # two workers side by side


def test_a_file_of_the_users_own_is_measured_and_dry_windows_are_counted(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setenv("STSR_CHECKPOINTS", str(checkpoints))
    amount = np.zeros((48, 10, 10), np.float32)
    amount[2, 3, 4] = 5.0
    coords = {"time": xr.date_range("2001-01-01", periods=48, freq="1h"), "y": 4000.0 * np.arange(10.0, 0, -1),
              "x": 4000.0 * np.arange(10.0)}  # fmt: skip
    rain = xr.DataArray(amount, coords, ("time", "y", "x"), "rain", {"units": "mm"})
    rain.to_netcdf(tmp_path / "rain.nc")
    command = ["bench", "--factor", "4x1", "--cells", "40", "--steps", "48", "--members", "1", "--workers", "1"]
    of = ["--input", str(tmp_path / "rain.nc"), "--variable", "rain", "--declare", "time_label: end"]
    done = CliRunner().invoke(app, [*command, *of, "--json", str(tmp_path / "figures.json")])
    assert done.exit_code == 0, done.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["fine_shape"] == [1, 48, 40, 40]
    assert 0.3 < figures["windows_skipped"] < 1


def test_reading_and_regridding_are_measured_against_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_regrid, "ROUNDS", 1)
    command = ["bench", "--regrid", "0.2", "--cells", "60", "--json", str(tmp_path / "figures.json")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "times reading" in done.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["bytes"] == 4 * 292 * 60 * 60
    assert 0 < figures["raw_seconds_all"] < 60
    assert figures["regrid_peak_memory_all"] < 2e9
    assert "each further year" not in done.output
    assert not any("each_year" in name for name in figures)


def test_a_further_year_is_what_nine_tenths_of_a_year_and_more_took():
    seconds = {"raw": (1.0, 2.8), "read": (1.0, 3.7), "regrid": (2.0, 5.6)}
    found = {
        f"{n}_seconds_{part}": s for n, both in seconds.items() for part, s in zip(("tenth", "all"), both, strict=True)
    }
    assert bench_regrid._each_year(found, 1459) == {}
    years = bench_regrid._each_year(found, 2920)
    assert years == pytest.approx({f"{n}_seconds_each_year": s for n, s in (("raw", 1), ("read", 1.5), ("regrid", 2))})
    assert bench_regrid._each_year_text(found | years) == "each further year takes 1.00, 1.50 and 2.00 s; "


def test_what_reading_and_regridding_would_ignore_is_refused(tmp_path):
    others = ("--training", "--factor=5x1", f"--output={tmp_path}", "--profile", "--steps=24", "--input=a.nc")
    for other in others:
        with pytest.raises(ConfigurationError, match=f"with --cells and --json only. Leave out {other.split('=')[0]}"):
            CliRunner().invoke(app, ["bench", "--regrid", "0.2", "--cells", "60", other], catch_exceptions=False)


def test_training_steps_are_measured(monkeypatch):
    monkeypatch.setitem(bench.PRESETS, "small", TINY)
    monkeypatch.setattr(bench.Training, "validation_loss", None)  # only steps are timed
    with small_patches():
        found = bench.bench_training(Factor(space=8, time=3), preset="small", device="cpu", steps=1)
    assert set(found) == {
        "mean_patches_per_s",
        "denoiser_patches_per_s",
        "student_patches_per_s",
        "scored_patches_per_s",
    }
    assert min(found.values()) > 0


def test_a_size_of_networks_that_are_not_trained_is_refused():
    with pytest.raises(ConfigurationError, match="--preset is of the networks of --training"):
        CliRunner().invoke(app, ["bench", "--preset", "base"], catch_exceptions=False)


def test_a_profile_writes_no_figures(tmp_path):
    for other in (("--json", str(tmp_path / "a.json")), ("--output", str(tmp_path / "out")), ("--training",)):
        with pytest.raises(ConfigurationError, match="--profile prints text and nothing else"):
            CliRunner().invoke(app, ["bench", "--profile", *other], catch_exceptions=False)


def test_a_profile_says_where_the_time_goes(checkpoints, monkeypatch):
    monkeypatch.setenv("STSR_CHECKPOINTS", str(checkpoints))
    done = CliRunner().invoke(app, ["bench", "--factor", "4x3", "--cells", "16", "--steps", "3", "--profile"])
    assert done.exit_code == 0, done.output
    assert "tottime" in done.output
    assert "conv2d" in done.output
