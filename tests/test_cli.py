"""The command line as a user meets it, in a process of its own where that is what is tested."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from click import unstyle
from typer.testing import CliRunner

from flows import embedded
from stsr_core.cli import app, main
from stsr_core.errors import ConfigurationError
from stsr_core.evaluation import command
from tests.grib_files import REGULAR, write_grib


def stsr(*arguments, checkpoints=None, cwd=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if checkpoints is not None:
        environment["STSR_CHECKPOINTS"] = str(checkpoints)
    return subprocess.run(
        [sys.executable, "-m", "stsr_core.cli", *map(str, arguments)],
        capture_output=True, text=True, env=environment, cwd=cwd, check=False,
    )  # fmt: skip


@pytest.fixture
def here(checkpoints, cluster, monkeypatch, capsys):
    """Runs `stsr` in this process, on a cluster that runs already: a process and its workers take ten seconds."""
    monkeypatch.setenv("STSR_CHECKPOINTS", str(checkpoints))
    monkeypatch.setenv("STSR_SCHEDULER_ADDRESS", cluster.scheduler_address)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["stsr", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return subprocess.CompletedProcess(sys.argv, ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def coarse(tmp_path, rain):
    time = pd.date_range("2001-01-01 01:00", periods=len(rain), freq="1h")
    coords = {"time": time, "y": 36_000.0 - 4000.0 * np.arange(9), "x": 4000.0 * np.arange(1, 12)}
    data = xr.Dataset({"rain": (("time", "y", "x"), rain, {"units": "mm"})}, coords)
    data.to_netcdf(tmp_path / "in.nc")
    return tmp_path / "in.nc"


REQUEST = ("--variable", "rain", "--space", 4, "--time", 1, "--members", 2, "--seed", 1, "--workers", 1,
           "--declare", "time_label: end")  # fmt: skip


def test_a_file_that_leaves_doubts_is_refused_until_they_are_settled(here, coarse):
    seen = here("inspect", coarse, "--variable", "rain")
    assert "time_label: end" in seen.stdout
    assert "EPSG:4326" in seen.stdout
    settled = here("inspect", coarse, "--variable", "rain", "--declare", "time_label: middle")
    assert "stamps name the middle" in settled.stdout
    refused = here("downscale", coarse, "out.zarr", *REQUEST[:-2])
    assert refused.returncode == 1
    assert "`time_label: start`, `middle` or `end` of the source in catalog.yaml, or by --declare" in refused.stderr


@pytest.mark.parametrize(
    "line",
    [
        "demo --workers=-1", "demo --members 0", "plan p --members 0", "bench --workers 0", "bench --cells 0",
        "downscale in.nc out.zarr --variable rain --space 4 --time 1 --workers=-1",
        "evaluate in.nc --space 4 --time 1 --workers=-1", "evaluate in.nc --space 4 --time 1 --hours=-5",
        "evaluate in.nc --space 4 --time 1 --cells 0", "evaluate in.nc --space 4 --time 1 --members 0",
        "train --archive a --space 4 --time 1 --seed=-1",
        "train --archive a --space 4 --time 1 --seed=9223372036854775808",
        "train --archive a --space 4 --time 1 --learning-rate=-1",
        "bench --regrid=-1",
        "catalog search --catalog c --limit 0", "catalog reconcile p --catalog c --grace-hours 99999999",
        "catalog retire p --catalog c --keep 1 --days 99999999999",
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_are_refused_at_once(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, line.split())
    assert found.exit_code == 2
    assert re.search("(less|greater) than or equal", found.output)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("catalog ls --catalog=~/none", "/none"),
        ("catalog verify ~/none", "/none"),
        ("inspect in.nc --catalog-file=~/none", "/none cannot be read"),
        ("evaluate in.nc --space 4 --time 1 --checkpoints=~/none", "/none"),
        ("evaluate in.nc --space 4 --time 1 --json=~/none/x.json", "/none"),
        ("bench --json=~/none/x.json", "/none"),
    ],
)
def test_a_leading_tilde_is_the_home_folder(line, message, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"{tmp_path}{message}" in str(CliRunner().invoke(app, line.split()).exception)


def test_figures_that_could_not_be_written_are_refused_before_they_are_made(tmp_path):
    with pytest.raises(ConfigurationError, match="There is no folder .*nowhere to write x.json to"):
        CliRunner().invoke(app, ["bench", "--json", str(tmp_path / "nowhere" / "x.json")], catch_exceptions=False)
    with pytest.raises(ConfigurationError, match="is a folder. Name a file"):
        CliRunner().invoke(app, ["bench", "--json", str(tmp_path)], catch_exceptions=False)


MEMBERS = [1, 2, 5]


def ensemble_netcdf(path, rain):
    """Three driving members of a NetCDF file: the rain, moved in time."""
    time = pd.date_range("2001-01-01 01:00", periods=len(rain), freq="1h")
    coords = {
        "time": time,
        "y": 36_000.0 - 4000.0 * np.arange(9),
        "x": 4000.0 * np.arange(1, 12),
        "realization": MEMBERS,
    }
    values = np.stack([np.roll(rain, i, axis=0) for i in range(3)], axis=1)
    data = xr.Dataset({"rain": (("time", "realization", "y", "x"), values, {"units": "mm"})}, coords)
    data.to_netcdf(path)
    return values.swapaxes(0, 1)


def ensemble_grib(path, rain):
    """Three perturbed forecasts of a GRIB file; amounts come back as it packs them."""
    values = np.stack([np.roll(rain, i, axis=0) for i in range(3)])
    shared = {
        "productDefinitionTemplateNumber": 11, "Ni": 11, "Nj": 9, "iDirectionIncrementInDegrees": 0.5,
        "jDirectionIncrementInDegrees": 0.5, "latitudeOfFirstGridPointInDegrees": 36,
        "latitudeOfLastGridPointInDegrees": 32, "longitudeOfFirstGridPointInDegrees": 141,
        "longitudeOfLastGridPointInDegrees": 146, "dataDate": 20200101, "dataTime": 0, "shortName": "tp",
        "bitsPerValue": 24,
    }  # fmt: skip
    messages = [
        (REGULAR, {**shared, "perturbationNumber": number, "stepRange": f"{step}-{step + 1}"}, values[i, step] / 1000)
        for step in range(len(rain))
        for i, number in enumerate(MEMBERS)
    ]
    write_grib(path, *messages)
    return values


@pytest.mark.parametrize(
    ("write", "variable", "declared"),
    [(ensemble_netcdf, "rain", ("--declare", "time_label: end")), (ensemble_grib, "tp", ())],
)
def test_every_driving_member_of_a_file_is_downscaled_and_conserved(here, tmp_path, rain, write, variable, declared):
    truth = write(tmp_path / "in", rain)
    seen = here("inspect", tmp_path / "in", "--variable", variable, *declared)
    assert "driving   3 members: 1, 2, 5" in seen.stdout
    request = (
        "--variable",
        variable,
        "--space",
        4,
        "--time",
        1,
        "--members",
        2,
        "--seed",
        1,
        "--workers",
        1,
        *declared,
    )
    done = here("downscale", tmp_path / "in", tmp_path / "out.zarr", *request)
    assert done.returncode == 0, done.stderr
    assert "6 members (2 of each of 3 driving members)" in done.stdout
    out = xr.open_zarr(tmp_path / "out.zarr")["precipitation"].load()
    assert out["driving_member"].values.tolist() == ["1", "1", "2", "2", "5", "5"]
    total = out.coarsen(y=4, x=4).mean().values.reshape(3, 2, *rain.shape)
    np.testing.assert_allclose(total, np.repeat(truth[:, None], 2, axis=1), atol=0.01 / 16 + 1e-4)


def test_downscale_writes_a_store_that_opens_and_conserves(coarse, checkpoints, tmp_path, rain):
    done = stsr("downscale", coarse, tmp_path / "out.zarr", *REQUEST, checkpoints=checkpoints)
    assert done.returncode == 0, done.stderr
    assert "precipitation of 2 members, 8 steps, 36 x 44 cells" in done.stdout
    assert "network evaluations" in done.stderr
    out = xr.open_zarr(tmp_path / "out.zarr")["precipitation"]
    total = out.coarsen(y=4, x=4).mean().values
    np.testing.assert_allclose(total, np.broadcast_to(rain, total.shape), atol=0.01 / 16 + 1e-5)

    again = stsr("downscale", coarse, tmp_path / "out.zarr", *REQUEST, checkpoints=checkpoints)
    assert again.returncode == 1
    assert again.stderr.strip().startswith("stsr: ")
    assert "--overwrite" in again.stderr


def test_downscale_takes_the_cells_that_a_box_touches(here, tmp_path, rain):
    ny, nx = rain.shape[1:]
    coords = {
        "time": pd.date_range("2001-01-01 01:00", periods=len(rain), freq="1h"),
        "lat": ("lat", 46.5 - 0.04 * np.arange(ny), {"units": "degrees_north"}),
        "lon": ("lon", 5.02 + 0.04 * np.arange(nx), {"units": "degrees_east"}),
    }
    data = xr.Dataset({"rain": (("time", "lat", "lon"), rain, {"units": "mm"})}, coords)
    data.to_netcdf(tmp_path / "in.nc")
    box = "5.1,46.3,5.3,60"  # columns 2 to 7, rows 0 to 5
    done = here("downscale", tmp_path / "in.nc", tmp_path / "out.zarr", *REQUEST, "--bbox", box)
    assert done.returncode == 0, done.stderr
    assert "8 steps, 24 x 24 cells" in done.stdout
    total = xr.open_zarr(tmp_path / "out.zarr")["precipitation"].coarsen(y=4, x=4).mean().values
    np.testing.assert_allclose(total, np.broadcast_to(rain[:, :6, 2:8], total.shape), atol=0.01 / 16 + 1e-5)
    nothing = here("downscale", tmp_path / "in.nc", tmp_path / "none.zarr", *REQUEST, "--bbox", "50,10,51,11")
    assert nothing.returncode == 1
    assert "Choose another target grid or box" in nothing.stderr
    assert not (tmp_path / "none.zarr").exists()


def test_downscale_tells_of_steps_that_the_networks_do_not_know(here, coarse, tmp_path):
    daily = xr.open_dataset(coarse)
    first = daily["time"].values[0]
    daily = daily.assign_coords(time=first + np.arange(daily.sizes["time"]) * np.timedelta64(24, "h"))
    daily.to_netcdf(tmp_path / "daily.nc")
    done = here("downscale", tmp_path / "daily.nc", tmp_path / "out.zarr", *REQUEST)
    assert done.returncode == 0, done.stderr
    assert "not trained on such a fine grid: steps of 24 h, not 1 h" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to take")
def test_the_device_is_that_of_the_settings_unless_it_is_named(here, coarse, tmp_path, monkeypatch):
    monkeypatch.delenv("STSR_SCHEDULER_ADDRESS")
    monkeypatch.setenv("STSR_DEVICE", "cuda")
    done = here("downscale", coarse, tmp_path / "o.zarr", *REQUEST)
    assert done.returncode == 1
    assert "cuda is asked for" in done.stderr


def test_workers_and_checkpoints_are_those_of_the_settings_unless_they_are_named(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(embedded, "run_embedded", lambda to, *, settings, **_: asked.update(demo=settings))
    monkeypatch.setattr(command, "evaluate_checkpoint", lambda *given, **named: asked.update(given=given, **named))
    monkeypatch.setattr(command, "table_text", lambda _: sys.exit())
    monkeypatch.setenv("STSR_WORKERS", "3")
    monkeypatch.setenv("STSR_CHECKPOINTS", str(tmp_path))
    for own, workers in (([], 3), (["--workers", "5"], 5)):
        CliRunner().invoke(app, ["demo", *own])
        CliRunner().invoke(app, ["evaluate", "x.nc", "--space", "10", "--time", "1", *own])
        assert (asked["demo"].workers, asked["demo"].checkpoints) == (workers, str(tmp_path))
        assert (asked["given"][3].workers, asked["checkpoints"]) == (workers, tmp_path)
    CliRunner().invoke(app, ["evaluate", "x.nc", "--space", "10", "--time", "1", "--checkpoints", "other"])
    assert asked["checkpoints"] == Path("other")


def test_evaluate_takes_declarations_and_archives(monkeypatch):
    asked = {}
    monkeypatch.setattr(command, "evaluate_checkpoint", lambda *given, **_: asked.update(urls=given[0], of=given[3]))
    monkeypatch.setattr(command, "table_text", lambda _: sys.exit())
    factor = ["--space", "10", "--time", "1"]
    CliRunner().invoke(app, ["evaluate", "x.nc", *factor, "--declare", "units: mm/h", "--seed", "4"])
    assert (asked["urls"], asked["of"].declared.units, asked["of"].seed) == (["x.nc"], "mm/h", 4)
    CliRunner().invoke(app, ["evaluate", "--archive", "comephore", *factor])
    assert (asked["of"].variable, asked["of"].declared.units) == ("RR", "0.1 mm")
    assert asked["urls"] == ("archives/comephore/H_COMEPHORE_2018*.tar",)


def test_no_conserve_is_accepted(here, coarse, tmp_path):
    done = here("downscale", coarse, tmp_path / "o.zarr", *REQUEST, "--no-conserve")
    assert done.returncode == 0, done.stderr
    assert xr.open_zarr(tmp_path / "o.zarr").attrs["conservation"] == "not enforced"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--variable": "snow"}, "No variable 'snow' in the file; it has rain"),
        ({"--members": 0}, "0 members are asked for"),
        ({"--space": 5}, r"(5,1) is not served"),
        ({"--device": "cuda"}, "cuda is asked for"),
    ],
)
def test_mistakes_are_one_paragraph_without_traceback_and_leave_nothing(
    here, coarse, tmp_path, monkeypatch, changes, message
):
    monkeypatch.delenv("STSR_SCHEDULER_ADDRESS")
    request = dict(zip(REQUEST[::2], REQUEST[1::2], strict=True)) | changes
    arguments = [a for pair in request.items() for a in pair]
    done = here("downscale", coarse, tmp_path / "out.zarr", *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.zarr").exists()


@pytest.mark.parametrize("command", ["downscale", "train", "evaluate"])
@pytest.mark.parametrize("option", ["--space", "--time"])
@pytest.mark.parametrize("number", ["0", "-1"])
def test_a_factor_below_1_is_refused_with_the_name_of_the_option(command, option, number):
    refused = CliRunner().invoke(app, [command, option, number])
    assert refused.exit_code == 2
    assert f"Invalid value for '{option}'" in unstyle(refused.output)


@pytest.mark.parametrize("factor", ["8", "0x1", "8x0"])
def test_what_is_no_factor_is_refused(factor):
    with pytest.raises(ConfigurationError, match=f"Factor '{factor}' is no SPACExTIME of numbers from 1"):
        CliRunner().invoke(app, ["bench", "--factor", factor], catch_exceptions=False)


def test_debug_shows_the_traceback(tmp_path, checkpoints):
    done = stsr("--debug", "downscale", tmp_path / "none.nc", tmp_path / "o", *REQUEST, checkpoints=checkpoints)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "Nothing is at" in done.stderr


def test_an_unwritable_output_is_an_error(here, coarse, tmp_path):
    (tmp_path / "file").write_text("")
    done = here("downscale", coarse, tmp_path / "file" / "out.zarr", *REQUEST)
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_teaches():
    done = stsr("downscale", "--help")
    assert done.returncode == 0
    for word in ("--variable", "--nearest", "mm per fine step", "finishes what was interrupted"):
        assert word in done.stdout


def test_catalog_of_nothing_says_so(here, tmp_path):
    done = here("catalog", "ls", "--catalog", tmp_path)
    assert done.returncode == 1
    assert "No catalogue is at" in done.stderr
