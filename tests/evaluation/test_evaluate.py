import html
import json
import math
import re
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from stsr_core.checkpoint import Checkpoint, Library
from stsr_core.errors import ConfigurationError, FactorError, SourceError
from stsr_core.evaluation import evaluate
from stsr_core.evaluation.baselines import BASELINES
from stsr_core.evaluation.command import chosen_data, evaluate_checkpoint, table_text
from stsr_core.evaluation.evaluate import OURS, Evaluation, Options
from stsr_core.evaluation.truth import read_truth
from stsr_core.factors import Factor
from stsr_core.store.statistics import STATISTICS
from stsr_core.version import code_version
from tests.conftest import random_checkpoint

FACTOR = Factor(space=4, time=3)


def write(path: Path, hours: int = 12, cells: int = 40, seed: int = 0, **extra: np.ndarray) -> str:
    rng = np.random.default_rng(seed)
    amount = rng.gamma(0.3, 3.0, (hours, cells, cells + 3)).astype(np.float32)
    xr.Dataset(
        {"precipitation": (("time", "y", "x"), amount, {"units": "mm"})} | {k: ("time", v) for k, v in extra.items()},
        coords={
            "time": np.datetime64("2018-01-01T01", "ns") + np.arange(hours) * np.timedelta64(1, "h"),
            "y": ("y", 1000.0 * np.arange(cells), {"units": "m", "standard_name": "projection_y_coordinate"}),
            "x": ("x", 1000.0 * np.arange(cells + 3), {"units": "m", "standard_name": "projection_x_coordinate"}),
        },
    ).to_netcdf(path)
    return str(path)


def test_places_share_one_size_and_whole_coarse_cells(tmp_path):
    paths = [write(tmp_path / "a.nc"), write(tmp_path / "b.nc", hours=8, cells=31)]
    truth = read_truth(paths, FACTOR, hours=24, cells=384, variable="precipitation")
    assert truth.names == ("a", "b")
    assert truth.fine.shape == (2, 6, 28, 28)
    assert truth.coarse.shape == (2, 2, 7, 7)


def test_truth_is_averaged_to_a_coarser_grid_before_all_else(tmp_path):
    path = write(tmp_path / "a.nc", hours=3)
    fine = read_truth([path], FACTOR, hours=3, cells=40, variable="precipitation")
    coarser = read_truth([path], FACTOR, hours=3, cells=40, variable="precipitation", coarser=2)
    assert (fine.spacing_km, coarser.spacing_km) == (1.0, 2.0)
    assert coarser.fine.shape == (1, 3, 20, 20)
    whole = xr.load_dataset(path)["precipitation"].to_numpy()[:, :, :42]
    np.testing.assert_allclose(coarser.fine[0], whole.reshape(3, 20, 2, 21, 2).mean((2, 4))[..., :20], rtol=1e-5)


def test_places_of_other_cells_or_steps_are_no_one_sample(tmp_path):
    path = write(tmp_path / "a.nc")
    data = xr.load_dataset(path)
    half = data.assign_coords(time=data["time"].values[0] + np.arange(12) * np.timedelta64(30, "m"))
    half.to_netcdf(tmp_path / "half.nc")
    names = {"y": {"units": "degrees_north", "standard_name": "latitude"},
             "x": {"units": "degrees_east", "standard_name": "longitude"}}  # fmt: skip
    wide = {axis: (axis, 0.02 * np.arange(data.sizes[axis]), named) for axis, named in names.items()}
    data.assign_coords(wide).to_netcdf(tmp_path / "wide.nc")
    assert read_truth([str(tmp_path / "half.nc")], FACTOR, hours=6, cells=40, variable="precipitation").step_h == 0.5
    for other in ("half", "wide"):
        with pytest.raises(SourceError, match="cells or steps differ"):
            read_truth([path, str(tmp_path / f"{other}.nc")], FACTOR, hours=6, cells=40, variable="precipitation")


def published(path: Path) -> str:
    """Write files that say neither their units nor which value marks missing cells, as COMEPHORE's."""
    data = xr.load_dataset(write(path, hours=6, cells=24))
    raw = (10 * data["precipitation"]).round()
    raw[:, 0, 1] = 65535.0
    raw.drop_attrs().rename("RR").to_netcdf(path)
    return str(path)


def test_files_are_read_as_declared(tmp_path):
    path = published(tmp_path / "a.nc")
    expected = xr.load_dataset(write(tmp_path / "b.nc", hours=6, cells=24))["precipitation"].to_numpy()
    lines = ["units: 0.1 mm", "missing_values: [65535]"]
    urls, options = chosen_data([path], None, Options(), variable="RR", declare=lines, catalog_file=tmp_path / "none")
    truth = read_truth(
        urls, FACTOR, hours=6, cells=24, variable=options.variable, declared=options.declared, base=options.base
    )
    np.testing.assert_allclose(truth.fine[0, :, 4:, 4:], expected[:, 4:24, 5:25], atol=0.051)
    assert np.argwhere(np.isnan(truth.coarse)).tolist() == [[0, 0, 0, 0], [0, 1, 0, 0]]


def test_the_validation_files_of_an_archive_are_read_as_the_catalogue_declares(tmp_path):
    published(tmp_path / "a.nc")
    catalog = tmp_path / "catalog.yaml"
    catalog.write_text(
        """
sources: {}
grids: {}
products: {}
archives:
  radar:
    train: ['b.nc']
    validation: ['a.nc']
    variable: RR
    units: 0.1 mm
    missing_values: [65535]
    description: radar
    license: none
    attribution: nobody
"""
    )
    chosen = partial(chosen_data, options=Options(), variable=None, declare=[], catalog_file=catalog)
    urls, options = chosen([], "radar")
    assert (options.variable, options.declared.units, options.declared.missing_values) == ("RR", "0.1 mm", (65535.0,))
    truth = read_truth(urls, FACTOR, hours=6, cells=24, variable="RR", declared=options.declared, base=options.base)
    assert truth.names == ("a",)
    assert 5 < np.nanmax(truth.fine) < 60
    _, options = chosen([], "radar", declare=["units: mm"])
    assert (options.declared.units, options.declared.missing_values) == ("mm", (65535.0,))
    for urls, archive in (([], None), (["a.nc"], "radar")):
        with pytest.raises(ConfigurationError, match="fine files, or an archive of catalog.yaml; one of the two"):
            chosen(urls, archive)


def test_the_wettest_hours_stay_inside_one_run(tmp_path):
    path = write(tmp_path / "a.nc", segment=np.repeat([0, 1], 6))
    data = xr.load_dataset(path)
    data["precipitation"][:] = 0.1
    data["precipitation"][4:8] = 9.0
    data.to_netcdf(path, mode="w")
    truth = read_truth([path], Factor(space=4, time=1), hours=4, cells=40, variable="precipitation")
    np.testing.assert_allclose(sorted(truth.fine[0, :, 0, 0]), [0.1, 0.1, 9, 9])


@pytest.mark.parametrize(("missing", "first"), [(slice(0, 50), 50), (slice(0, 1), 48), (slice(52, 100), 48)])
def test_the_wettest_hours_avoid_steps_without_a_value(tmp_path, missing, first):
    path = write(tmp_path / "a.nc", hours=100, cells=8)
    data = xr.load_dataset(path)
    data["precipitation"][:] = 0.0
    data["precipitation"][50:52] = data["precipitation"][60] = 1.0
    data["precipitation"][missing] = np.nan
    data.to_netcdf(path, mode="w")
    expected = data["precipitation"].to_numpy()[first : first + 4, :, :8]
    truth = read_truth([path], Factor(space=4, time=1), hours=4, cells=8, variable="precipitation")
    np.testing.assert_array_equal(truth.fine[0], expected)


def test_missing_truth_makes_whole_coarse_cells_missing(tmp_path):
    path = write(tmp_path / "a.nc", hours=3)
    data = xr.load_dataset(path)
    data["precipitation"][0, 0, 1] = np.nan
    data.to_netcdf(path, mode="w")
    truth = read_truth([path], FACTOR, hours=3, cells=40, variable="precipitation")
    assert np.isnan(truth.coarse).sum() == 1
    assert np.isnan(truth.fine[0, :, :4, :4]).all()
    assert np.isnan(truth.fine).sum() == 3 * 16


def test_truth_that_cannot_be_scored_is_an_error(tmp_path):
    path = write(tmp_path / "a.nc", hours=2)
    with pytest.raises(SourceError, match="no gap-free run of 3 steps"):
        read_truth([path], FACTOR, hours=24, cells=40, variable="precipitation")
    with pytest.raises(ConfigurationError, match="--hours 2 is less than the 3 of a coarse cell .* Ask for --hours 3"):
        read_truth([path], FACTOR, hours=2, cells=40, variable="precipitation")
    with pytest.raises(ConfigurationError, match="--cells 3 is less than the 4 of a coarse cell .* Ask for --cells 4"):
        read_truth([path], FACTOR, hours=24, cells=3, variable="precipitation")
    with pytest.raises(SourceError, match="No variable 'rain' in .*a.nc; it has precipitation"):
        read_truth([path], FACTOR, hours=24, cells=40, variable="rain")
    data = xr.load_dataset(path)
    data["precipitation"][:, ::4, ::4] = np.nan
    data.to_netcdf(path, mode="w")
    with pytest.raises(
        SourceError, match="A part of every coarse cell of factor .* is missing in the middle of .*a.nc"
    ):
        read_truth([path], Factor(space=4, time=1), hours=2, cells=40, variable="precipitation")
    with pytest.raises(SourceError, match="no whole coarse cell"):
        read_truth([write(tmp_path / "b.nc", cells=20)], Factor(space=25, time=1), hours=2, cells=40,
                   variable="precipitation")  # fmt: skip


def assert_complete(numbers: dict, found: Evaluation, checkpoint: Checkpoint) -> None:
    defined = {name: value if math.isfinite(value) else None for name, value in found.table[OURS].items()}
    assert numbers["scores"]["stsr"] == pytest.approx(defined)
    assert numbers["intervals_95"]["crps_over_linear"] == numbers["intervals_95"]["spread_skill"] == [None, None]
    assert numbers["resampled"] == {"what": "blocks of 6 steps and 128 cells", "number": 1}
    assert numbers["checkpoint"] == {"name": "tiny", "digest": checkpoint.digest}
    assert (numbers["seed"], numbers["precision"], numbers["code"]) == (7, "float32", code_version())
    assert numbers["truth"]["maximum"] == pytest.approx(found.truth.fine.max())
    assert [len(numbers["power_by_wavenumber"][name]) for name in ("truth", "linear")] == [18, 18]
    assert {bar["score"]: bar["verdict"] for bar in numbers["bars"]}["closure_quanta"] == "met"
    assert set(numbers["ablations"]["methods"]) == set(found.table) - {OURS, *BASELINES}
    assert "none was trained anew" in numbers["ablations"]["how"]


def test_an_evaluation_scores_every_method_and_writes_page_and_numbers(tmp_path):
    random_checkpoint(tmp_path / "checkpoints", [(4, 3)], distilled=True)
    path = write(tmp_path / "a.nc", hours=6, cells=24)
    lines: list[str] = []
    begun, done = {}, {}

    @contextmanager
    def watch(name, total):
        begun[name], done[name] = total, 0

        def advance(steps, _seconds):
            done[name] += steps

        yield advance

    found = evaluate_checkpoint(
        [path], 4, 3, Options(members=3, hours=6, cells=24, seed=7, ablations=True, warming=True),
        checkpoints=tmp_path / "checkpoints", record=False, json_file=tmp_path / "s.json",
        html_file=tmp_path / "s.html", device="cpu", report=lines.append, watch=watch,
    )  # fmt: skip
    methods = {OURS, *BASELINES, "mean only", "f exact", "without conservation", "twice L"}
    assert methods | {"without attention over time", "half of beta"} <= set(found.table)
    assert all(found.table[name]["crps"] > 0 for name in methods)
    crps = [found.table[name]["crps"] for name in ("stsr", "not distilled", "half the evaluations")]
    assert len(set(crps)) == 3
    stsr = found.table["stsr"]
    assert stsr["closure_quanta"] == 0
    assert stsr["crps_over_linear"] == pytest.approx(stsr["crps"] / found.table["linear"]["crps"])
    assert np.isnan(found.intervals["crps_over_linear"]).all()  # of one block
    assert set(found.ranks) == set(found.table)
    assert found.ranks[OURS].sum() == pytest.approx(1.0)
    for name in set(found.table) - {"without conservation", "linear"}:
        assert found.table[name]["closure_mm"] < 1e-3
        assert found.table[name]["closure_quanta"] <= 1
    assert found.table["linear"]["closure_mm"] > 0.1
    assert found.table["linear"]["closure_quanta"] > 100
    assert found.table["without conservation"]["closure_mm"] > 0.1
    for raised in ("1.07", "1.2"):  # conservation carries the signal of the mean through
        assert found.signal[raised]["mean"] == pytest.approx(float(raised), rel=1e-3)
    numbers = json.loads((tmp_path / "s.json").read_text())
    assert_complete(numbers, found, Library.open(tmp_path / "checkpoints").checkpoints[0])
    page = (tmp_path / "s.html").read_text()
    assert "none was trained anew" in page
    assert "There are none: 24 steps are needed, 6 are scored" in page
    assert "unknown: 6 blocks of 6 steps and 128 cells are needed, not 1" in page
    assert len(re.findall('src="data:image/png;base64,', page)) == 2
    assert "http" not in page.replace("http-equiv", "")
    assert {"closure_quanta", "crps_over_rainfarm"} <= {bar.score for bar in found.bars}
    assert "crps_over_rainfarm" in table_text(found.table)
    assert any("members done" in line for line in lines)
    assert done == begun
    assert {*found.table, "input x 1.2", "scores"} - {"even", "linear"} <= set(begun)


def test_an_evaluation_of_enough_hours_and_places_has_intervals(tmp_path, checkpoints):
    data = xr.load_dataset(write(tmp_path / "a.nc", hours=36, cells=8))
    data.to_netcdf(tmp_path / "b.nc")
    found = evaluate_checkpoint(
        [str(tmp_path / "a.nc"), str(tmp_path / "b.nc")], 4, 3, Options(members=2, hours=18, cells=8),
        checkpoints=checkpoints, record=False, json_file=None, html_file=None, device="cpu", report=lambda _: None,
    )  # fmt: skip
    assert found.blocks == 6
    for name in ("crps_over_linear", "spread_skill"):
        low, high = found.intervals[name]
        assert low < found.table["stsr"][name] < high


def test_baselines_that_cannot_be_run_are_bars_that_are_not_judged(tmp_path, checkpoints, monkeypatch):
    monkeypatch.setattr(evaluate, "without_rainfarm", lambda *_, **__: "install it with pip install 'stsr[evaluate]'.")
    found = evaluate_checkpoint(
        [write(tmp_path / "a.nc", hours=6, cells=16)], 4, 3, Options(members=2, hours=6, cells=16),
        checkpoints=checkpoints, record=False, json_file=tmp_path / "s.json", html_file=tmp_path / "s.html",
        device="cpu", report=lambda _: None,
    )  # fmt: skip
    verdicts = {bar.score: bar.verdict for bar in found.bars}
    assert "not judged: install it with pip" in verdicts["crps_over_rainfarm"]
    assert verdicts["crps_over_linear"] in {"met", "missed"}
    assert html.escape(verdicts["crps_over_rainfarm"]) in (tmp_path / "s.html").read_text()
    assert {bar["score"]: bar["found"] for bar in json.loads((tmp_path / "s.json").read_text())["bars"]}[
        "crps_over_rainfarm"
    ] is None


def test_data_without_rain_have_scores_that_are_undefined(tmp_path, checkpoints):
    path = write(tmp_path / "a.nc", hours=6, cells=24)
    dry = xr.load_dataset(path)
    dry["precipitation"][:] = 0.0
    dry.to_netcdf(path, mode="w")
    found = evaluate_checkpoint(
        [path], 4, 3, Options(members=2, hours=6, cells=24, warming=True),
        checkpoints=checkpoints, record=False, json_file=tmp_path / "s.json", html_file=tmp_path / "s.html",
        device="cpu", report=lambda _: None,
    )  # fmt: skip
    assert found.table["stsr"]["crps"] == 0
    assert json.loads((tmp_path / "s.json").read_text())["scores"]["stsr"]["spread_skill"] is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"json_file": Path("nowhere/s.json")}, ConfigurationError, "no folder .*nowhere to write s.json to"),
        ({"options": Options(reference=True)}, FactorError, "authors give no setting"),
    ],
)
def test_what_cannot_end_well_is_refused_before_the_work(tmp_path, checkpoints, change, error, message):
    begun = []
    arguments = {
        "options": Options(), "checkpoints": checkpoints, "record": False, "json_file": None, "html_file": None,
        "device": "cpu", "report": begun.append, **change,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        evaluate_checkpoint([write(tmp_path / "a.nc")], 4, 3, **arguments)
    assert not begun


def test_recorded_scores_are_on_the_card(tmp_path, checkpoints):
    folder = shutil.copytree(checkpoints, tmp_path / "checkpoints")
    path = write(tmp_path / "a.nc", hours=6, cells=24)
    found = evaluate_checkpoint(
        [path], 4, 3, Options(members=2, hours=6, cells=24),
        checkpoints=folder, record=True, json_file=None, html_file=None, device="cpu", report=lambda _: None,
    )  # fmt: skip
    card = Library.open(folder).serving(FACTOR).card.serving(FACTOR).measured_here
    assert card.scores["crps_over_linear"] == pytest.approx(found.table["stsr"]["crps_over_linear"], abs=1e-4)
    assert set(card.statistics) == set(STATISTICS)  # what the gates hold a product's ensemble against
    assert card.statistics == pytest.approx(found.statistics, abs=1e-4)


def told_two_spacings(tmp_path, checkpoints, **options):
    """Record scores at a multiple of the spacing of the data, on a card of networks that know 1 and 2 km."""
    folder = shutil.copytree(checkpoints, tmp_path / "checkpoints")
    before = (folder / "tiny.json").read_text().replace('"spacings_km": [\n  1\n ]', '"spacings_km": [1, 2]')
    (folder / "tiny.json").write_text(before)
    path, lines = write(tmp_path / "a.nc", hours=6, cells=48), []
    evaluate_checkpoint(
        [path], 4, 3, Options(members=2, hours=6, **options),
        checkpoints=folder, record=True, json_file=tmp_path / "s.json", html_file=None, device="cpu",
        report=lines.append,
    )  # fmt: skip
    assert "cells of 2 km (networks are told 2 km)" in lines[0]
    return Library.open(folder).serving(FACTOR).card.serving(FACTOR)


def test_scores_at_another_spacing_are_recorded_as_such(tmp_path, checkpoints):
    served = told_two_spacings(tmp_path, checkpoints, cells=24, coarser=2)
    written = json.loads((tmp_path / "s.json").read_text())
    assert (written["spacing_km"], written["told_km"]) == (2.0, 2)
    assert served.measured_here.scores == {}
    assert served.told(2).measured_here.statistics == pytest.approx(written["statistics"], abs=1e-4)


def test_scores_at_a_spacing_that_networks_are_not_told_are_not_recorded(tmp_path, checkpoints):
    with pytest.raises(ConfigurationError, match="a grid of 3 km are not recorded: the networks are told 2 km"):
        told_two_spacings(tmp_path, checkpoints, cells=16, coarser=3)
    assert json.loads((tmp_path / "s.json").read_text())["told_km"] == 2
    card = Library.open(tmp_path / "checkpoints").serving(FACTOR).card
    assert not any(served.measured for served in card.served)
