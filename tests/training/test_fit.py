import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from stsr_core.checkpoint import Architecture, Checkpoint
from stsr_core.downscaler import Downscaler
from stsr_core.errors import CheckpointError, ConfigurationError, SourceError
from stsr_core.factors import Factor, recipe
from stsr_core.grids import coarsen
from stsr_core.sources.declared import Declared
from stsr_core.store.layout import MISSING
from stsr_core.training.command import Data, train_checkpoint
from stsr_core.training.fit import fit
from stsr_core.training.losses import mean_loss
from stsr_core.training.patches import Region, draw_patch, fitting_spacings, load_archive, patch_cells, region_of
from stsr_core.training.run import Run
from stsr_core.training.stage import Stage, _read
from stsr_core.training.training import Training, TrainingError
from stsr_core.version import code_version
from tests.tiny import TINY, small_patches

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CONFIGURATION = recipe(Factor(space=8, time=1))
PLAIN = replace(TINY, distil_steps=0, score_steps=0)


def fine_dataset(rain: np.ndarray) -> xr.Dataset:
    """Hourly amounts (time, y, x) [mm] on a projected 1 km grid."""
    nt, ny, nx = rain.shape
    return xr.Dataset(
        {"precipitation": (("time", "y", "x"), rain, {"units": "mm"})},
        coords={
            "time": np.datetime64("2018-01-01T01", "ns") + np.arange(nt) * np.timedelta64(1, "h"),
            "y": ("y", 1000.0 * np.arange(ny)[::-1], {"units": "m", "standard_name": "projection_y_coordinate"}),
            "x": ("x", 1000.0 * np.arange(nx), {"units": "m", "standard_name": "projection_x_coordinate"}),
        },
    )


@pytest.fixture(scope="module", autouse=True)
def _patches():
    with small_patches():
        yield


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Two files of moving showers; the second has a gap in time and a hole in place."""
    folder = tmp_path_factory.mktemp("archive")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        noise = rng.random((24, 100, 120))
        rain = np.where(noise > 0.8, rng.gamma(1.0, 3.0, noise.shape), 0.0).astype(np.float32)
        segment = np.zeros(24, np.int32)
        if name == "b":
            rain[:, :20, :20] = np.nan
            segment[20:] = 1
        fine_dataset(rain).assign(segment=("time", segment)).to_netcdf(folder / f"{name}.nc")
    return [str(folder)]


@pytest.fixture(scope="module")
def regions(archive) -> list[Region]:
    return load_archive(archive)


@pytest.fixture(scope="module")
def trained(regions, tmp_path_factory):
    """A checkpoint of all four stages."""
    return fit(training(regions, tmp_path_factory.mktemp("trained")), "x", {"archive": "a"})


@pytest.fixture(scope="module")
def plain(regions, tmp_path_factory):
    """A checkpoint that was not distilled."""
    return fit(training(regions, tmp_path_factory.mktemp("plain"), PLAIN), "x", {})


def test_an_archive_is_one_region_per_gap_free_run(regions):
    assert [r.quanta.shape[0] for r in regions] == [24, 20, 4]
    assert (regions[1].quanta[:, :20, :20] == 65535).all()


def test_a_patch_is_complete_and_its_coarse_part_is_its_own_total_with_a_halo(regions):
    for seed in range(20):
        patch = draw_patch(regions, CONFIGURATION, np.random.default_rng(seed))
        n = patch_cells(CONFIGURATION.factor)
        assert patch.fine.shape == (CONFIGURATION.context_length, n * 8, n * 8)
        assert patch.coarse.shape == (CONFIGURATION.context_length + 2, n + 2, n + 2)
        assert np.isfinite(patch.fine).all()
        inner = patch.coarse[1:-1, 1:-1, 1:-1]
        np.testing.assert_allclose(inner, coarsen(patch.fine, CONFIGURATION.factor), rtol=1e-4)


def test_patches_are_the_same_for_the_same_seed_and_differ_otherwise(regions):
    draw = [draw_patch(regions, CONFIGURATION, np.random.default_rng(s)).fine for s in (1, 1, 2)]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert (draw[0] != draw[2]).any()


WIDE = (48, 150, 150)  # has room for patches of twice the spacing, not of three times
RAMP = np.broadcast_to(np.arange(150, dtype=np.float32)[None, None], WIDE) / 8


def test_patches_of_a_coarser_grid_average_the_archive_and_say_their_spacing(regions):
    assert fitting_spacings(regions, CONFIGURATION) == (1,)
    large = [region_of("ramp", RAMP)]
    assert fitting_spacings(large, CONFIGURATION) == (1, 2)
    for n in (1, 2):
        patch = draw_patch(large, CONFIGURATION, np.random.default_rng(1), augment=False, spacing=n)
        assert patch.spacing_km == n
        assert patch.fine.shape[-1] == 8 * patch_cells(CONFIGURATION.factor, n)
        np.testing.assert_allclose(np.diff(patch.fine, axis=2), n / 8, atol=0.011)
    wide = [replace(large[0], spacing_km=2.1)]
    assert draw_patch(wide, CONFIGURATION, np.random.default_rng(1), spacing=2).spacing_km == 4


def test_where_gaps_leave_no_room_for_wide_patches_training_takes_those_of_the_archive(tmp_path):
    rain = np.ones((48, 180, 180), np.float32)
    rain[:, :, 85:95] = np.nan
    gappy = [region_of("gappy", rain)]
    assert fitting_spacings(gappy, CONFIGURATION) == (1, 2)
    run = replace(training(gappy, tmp_path), validation=gappy, only_spacing=True)
    assert run.draw(1, 0).spacing_km == 1
    assert {drawn.spacing_km for drawn in run._watched} == {1}
    with pytest.raises(SourceError, match="No complete patch"):
        draw_patch(gappy, CONFIGURATION, np.random.default_rng(0), spacing=2)


def test_an_archive_may_lack_whole_blocks_and_no_patch_is_drawn_from_these(tmp_path):
    rain = np.ones((120, 100, 120), np.float32)
    rain[48:96] = np.nan  # one block that is read at a time
    fine_dataset(rain).to_netcdf(tmp_path / "a.nc")
    for cache in (None, tmp_path / "cache"):
        (region,) = load_archive([str(tmp_path / "a.nc")], cache=cache)
        assert (region.quanta[48:96] == MISSING).all()
        assert (region.quanta[:48] == 100).all()
        assert (region.quanta[96:] == 100).all()
        assert not region.weights[8:16].any()
        for seed in range(20):
            patch = draw_patch([region], CONFIGURATION, np.random.default_rng(seed), augment=False)
            np.testing.assert_array_equal(patch.fine, 1.0)


def test_regions_know_the_spacing_of_their_grid(tmp_path):
    fine_dataset(np.ones((3, 40, 40))).to_netcdf(tmp_path / "a.nc")
    degrees = fine_dataset(np.ones((3, 40, 40)))
    degrees["y"] = ("y", 45 - np.arange(40) / 24, {"units": "degrees_north", "standard_name": "latitude"})
    degrees["x"] = ("x", np.arange(40) / 24, {"units": "degrees_east", "standard_name": "longitude"})
    degrees.to_netcdf(tmp_path / "b.nc")
    unknown, known = load_archive([str(tmp_path / "a.nc"), str(tmp_path / "b.nc")])
    assert unknown.spacing_km == 1.0
    assert known.spacing_km == pytest.approx(111.1 / 24 * np.cos(np.radians(44.2)) ** 0.5, rel=3e-3)


def test_only_what_tells_the_spacing_is_trained(trained, tmp_path):
    preset = replace(TINY, distil_steps=0, score_steps=4, denoiser_steps=2, learning_rate=1e-2)
    told = replace(training([region_of("ramp", RAMP)], tmp_path / "told", preset), start=trained, only_spacing=True)
    told = replace(told, validation=told.train)
    found = fit(told, "x", {})
    assert found.card.spacings_km == (1, 2)
    assert trained.card.spacings_km == (1,)
    assert found.card.served == trained.card.served
    card = found.card.training
    assert card["archive"] == "a"
    assert card["mean_steps"] == trained.card.training["mean_steps"]
    assert (card["mean_spacing_steps"], card["scored_spacing_steps"]) == (TINY.mean_steps, 4)
    assert card["spacing_start"] == trained.digest
    begun, moved = trained.weights(), {"mean": 0, "denoiser": 0, "teacher": 0}
    for name, weights in found.weights().items():
        changed = int((weights != begun[name]).any())
        assert name.endswith("by_spacing") or not changed
        moved[name.split(".")[0]] += changed
    assert min(moved.values()) > 1
    assert found.card.serving(CONFIGURATION.factor, 4.7).configuration.spacing_km == 2
    for wrong in (replace(told, start=None), replace(told, start_share=0.5), replace(told, preset=TINY)):
        with pytest.raises(ConfigurationError, match="fine spacing is to be trained"):
            fit(replace(wrong, folder=tmp_path / "wrong"), "x", {})


def test_an_archive_too_small_for_the_factor_is_refused(regions):
    with pytest.raises(SourceError, match=r"No complete patch for factor \(25,6\)"):
        draw_patch(regions, recipe(Factor(space=25, time=6)), np.random.default_rng(0))


def test_archives_that_cannot_be_read_are_refused(archive, tmp_path):
    with pytest.raises(SourceError, match="No training files"):
        load_archive([])
    with pytest.raises(SourceError, match="No variable 'rain' in .*a.nc"):
        load_archive(archive, "rain")


def training(regions, folder, preset=TINY):
    return Training(regions[:1], regions[1:2], [CONFIGURATION], preset, folder, Run(0, 1, CPU), report=lambda _: None)


def test_a_killed_training_resumes_to_the_very_same_checkpoint(regions, trained, tmp_path):
    interrupted = training(regions, tmp_path / "killed")
    interrupted.claim()
    torch.manual_seed(0)
    stage = first_stage(steps=TINY.mean_steps)
    draw = interrupted.draw

    class KilledError(Exception):
        pass

    def dying(stage_number: int, step: int):
        if step == 5:
            raise KilledError
        return draw(stage_number, step)

    object.__setattr__(interrupted, "draw", dying)
    with pytest.raises(KilledError):
        interrupted.advance(stage, mean_loss)
    resumed = fit(training(regions, tmp_path / "killed"), "x", {})
    assert resumed.card.weights_sha256 == trained.card.weights_sha256


def test_networks_are_fitted_on_one_part_of_the_archive_and_judged_on_the_other(tmp_path):
    fitted, watched = (region_of("even", np.full((24, 200, 220), mm, np.float32)) for mm in (0.0, 7.0))
    run = replace(training([fitted], tmp_path), validation=[watched])
    assert not run.draw(1, 0).fine.any()
    assert run._watched
    assert all((drawn.fine == 7).all() for drawn in run._watched)  # not augmented
    assert (run._example(CONFIGURATION, np.random.default_rng(0)).truth == 7).all()


def test_a_step_is_bounded_and_moves_the_average_by_its_decay():
    stage = Stage("x", 1, torch.nn.Linear(2, 1), steps=1000, learning_rate=0.1)
    expected = {name: weights.clone() for name, weights in stage.average.items()}
    for step in range(1, 4):
        rate = stage.rate()
        stage.update(1e3 * stage.network(torch.ones(1, 2)).square().mean(), Run(0, 1, CPU))
        assert stage.optimiser.param_groups[0]["lr"] == rate
        assert torch.cat([p.grad.ravel() for p in stage.network.parameters()]).norm() < 1.001
        decay = (1 + step) / (10 + step)
        for name, now in stage.network.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * now
            torch.testing.assert_close(stage.average[name], expected[name])
    stage.step = 10**6
    stage.update(stage.network(torch.ones(1, 2)).square().mean(), Run(0, 1, CPU))
    for name, now in stage.network.state_dict().items():
        torch.testing.assert_close(stage.average[name], 0.998 * expected[name] + 0.002 * now)


def first_stage(steps):
    from stsr_core.networks.mean import MeanNetwork

    return Stage("mean", 1, MeanNetwork(TINY.architecture.mean_channels), steps, TINY.learning_rate)


def test_training_lowers_the_loss(regions, tmp_path):
    torch.manual_seed(0)
    seen = []
    run = replace(training(regions, tmp_path, replace(TINY, save_every=1000)), watch=seen.append)
    stage = first_stage(steps=60)
    run.advance(stage, mean_loss)
    assert np.mean(stage.losses[-10:]) < 0.9 * np.mean(stage.losses[:10])
    (progress,) = seen
    assert progress[:3] == ("mean", 60, 60)
    assert progress.loss == pytest.approx(np.mean(stage.losses))
    assert (progress.least, progress.kept) == (stage.least, 60)


def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_last_state(regions, tmp_path):
    run = training(regions, tmp_path)
    stage = first_stage(steps=6)

    def broken(network, fine, conditions, configuration, generator):
        loss = mean_loss(network, fine, conditions, configuration, generator)
        return loss * (math.nan if stage.step == 3 else 1.0)

    with pytest.raises(TrainingError, match="mean loss is nan at step 3.*kept"):
        run.advance(stage, broken)
    again = first_stage(steps=6)
    again.resume(tmp_path)
    assert again.step == 2


@pytest.mark.parametrize("name", ["mean", "denoiser", "student", "scored"])
def test_networks_that_turn_nan_in_any_stage_stop_training_and_keep_the_last_state(
    regions, tmp_path, monkeypatch, name
):
    update = Stage.update

    def breaking(stage, loss, run):
        update(stage, loss, run)
        if stage.name == name and stage.step == 3:
            for parameter in stage.network.parameters():
                parameter.data.fill_(math.nan)

    monkeypatch.setattr(Stage, "update", breaking)
    monkeypatch.setattr("stsr_core.training.training.calibrated_spread", lambda *_: 1.0)
    run = training(regions, tmp_path, replace(TINY, denoiser_steps=6, distil_steps=6, score_steps=6))
    with pytest.raises(TrainingError, match=f"{name} loss is nan at step 3.*kept"):
        fit(run, "x", {})
    meta, tensors = _read(tmp_path / f"{name}.safetensors")
    assert meta["step"] == "2"
    assert all(values.isfinite().all() for values in tensors.values())


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garble(path: Path) -> None:
    """Change 64 bytes in the middle."""
    raw = bytearray(path.read_bytes())
    middle = slice(len(raw) // 2, len(raw) // 2 + 64)
    raw[middle] = bytes(b ^ 0x55 for b in raw[middle])
    path.write_bytes(raw)


@pytest.fixture(scope="module")
def left(regions, tmp_path_factory):
    """The folder of a training that was not distilled."""
    folder = tmp_path_factory.mktemp("left")
    return folder, fit(training(regions, folder, PLAIN), "x", {})


@pytest.mark.parametrize("damage", [halve, empty, garble])
def test_a_damaged_state_is_named_and_training_goes_on_without_it(regions, left, tmp_path, damage):
    folder, before = left
    path = shutil.copytree(folder, tmp_path / "left") / "mean.safetensors"
    damage(path)
    with pytest.raises(CheckpointError, match=f"{path} is damaged .* Delete it, and the stage begins anew"):
        fit(training(regions, path.parent, PLAIN), "x", {})
    path.unlink()
    assert fit(training(regions, path.parent, PLAIN), "x", {}).card.weights_sha256 == before.card.weights_sha256


@pytest.mark.parametrize("damage", [halve, empty])
def test_what_says_which_training_is_there_is_named_where_it_is_damaged(regions, left, tmp_path, damage):
    path = shutil.copytree(left[0], tmp_path / "left") / "training.json"
    damage(path)
    with pytest.raises(CheckpointError, match=f"{path}, which says what is trained here, is damaged. Restore it"):
        training(regions, path.parent, PLAIN).claim()


def test_damaged_spreads_are_chosen_anew(regions, left, tmp_path):
    path, said = shutil.copytree(left[0], tmp_path / "left") / "spreads.json", []
    kept = json.loads(path.read_text())
    halve(path)
    found = fit(replace(training(regions, path.parent, PLAIN), report=said.append), "x", {})
    assert said[0] == f"{path} is damaged; spreads are chosen anew"
    assert json.loads(path.read_text()) == kept
    assert found.digest == left[1].digest


@pytest.mark.parametrize("damage", [halve, empty])
def test_damaged_copies_of_an_archive_are_read_anew(archive, tmp_path, damage):
    before = load_archive(archive, cache=tmp_path)
    for path in tmp_path.glob("*.npy"):
        path.rename(tmp_path / "aside")  # what is mapped must not change
        shutil.copy(tmp_path / "aside", path)
        damage(path)
    for found, expected in zip(load_archive(archive, cache=tmp_path), before, strict=True):
        np.testing.assert_array_equal(found.quanta, expected.quanta)


def test_the_weights_of_the_least_validation_loss_count(regions, tmp_path, monkeypatch):
    losses = iter([0.7, 0.5, 0.6, 0.8, 0.9])
    monkeypatch.setattr(Training, "validation_loss", lambda *_: next(losses))
    run, stage = training(regions, tmp_path), first_stage(steps=6)
    run.claim()
    candidates = []
    kept = run.advance(stage, mean_loss, lambda: candidates.append(stage.candidate())).state_dict()
    again = first_stage(steps=6)
    again.resume(tmp_path)
    assert (again.step, again.kept, again.least) == (6, 4, 0.5)
    for name, weights in candidates[1].items():
        assert torch.equal(kept[name], weights)
        assert torch.equal(again.weights()[name], weights)
    assert any((candidates[1][name] != candidates[2][name]).any() for name in kept)
    card = fit(training(regions, tmp_path, PLAIN), "x", {}).card.training
    assert {n: card[n] for n in ("mean_steps", "mean_kept", "denoiser_steps", "denoiser_kept")} == {
        "mean_steps": 6, "mean_kept": 4, "denoiser_steps": 4, "denoiser_kept": 2
    }  # fmt: skip


def test_what_an_earlier_version_left_is_not_gone_on_with(regions, tmp_path):
    from safetensors.torch import save_file

    save_file({"network.x": torch.zeros(1)}, tmp_path / "mean.safetensors", metadata={"step": "2", "losses": "[]"})
    with pytest.raises(ConfigurationError, match="left by an earlier version"):
        fit(training(regions, tmp_path), "x", {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "other seed"),
        ({"configurations": [recipe(Factor(space=10, time=1))]}, "other configurations"),
        ({"train": [region_of("elsewhere", np.ones((24, 200, 220), np.float32))]}, "other train"),
    ],
)
def test_another_training_in_the_folder_is_not_gone_on_with(regions, tmp_path, change, message):
    first = training(regions, tmp_path, PLAIN)
    first.claim()
    replace(first, preset=replace(PLAIN, mean_steps=9, learning_rate=1e-4)).claim()  # these may change
    kept = (tmp_path / "training.json").read_bytes()
    with pytest.raises(ConfigurationError, match=f"holds a training with {message}"):
        fit(replace(first, **change), "x", {})
    assert (tmp_path / "training.json").read_bytes() == kept


def test_data_of_the_same_shape_that_differ_make_another_training(regions, tmp_path):
    first = training(regions, tmp_path, PLAIN)
    first.claim()
    inches = replace(first.train[0], weights=first.train[0].weights * np.sqrt(25.4))
    with pytest.raises(ConfigurationError, match="holds a training with other train"):
        replace(first, train=[inches]).claim()


def test_what_builds_on_other_weights_than_it_did_begins_anew(regions, tmp_path):
    """More steps of an early stage make those after it useless; they must not stay as they were."""
    longer, said = replace(TINY, denoiser_steps=8), []
    fit(training(regions, tmp_path / "a"), "x", {})
    found = fit(replace(training(regions, tmp_path / "a", longer), report=said.append), "x", {})
    assert [line for line in said if "begins anew" in line] == [
        f"{name} begins anew, for what it builds on has changed; what it had is kept as {name}-before.safetensors"
        for name in ("student", "scored")
    ]
    assert (tmp_path / "a" / "student-before.safetensors").is_file()
    said.clear()
    again = fit(replace(training(regions, tmp_path / "a", longer), report=said.append), "x", {})
    assert not [line for line in said if "step" in line]
    assert again.digest == found.digest


def test_no_steps_of_a_network_leave_what_training_starts_from(regions, trained, tmp_path):
    begun, preset = training(regions, tmp_path), replace(PLAIN, denoiser_steps=0)
    fit(replace(begun, start=trained, preset=replace(preset, learning_rate=1e-2)), "x", {})
    kept = fit(replace(begun, start=trained, preset=replace(preset, mean_steps=0)), "x", {}).weights()
    for name, weights in trained.weights().items():
        assert torch.equal(kept[name], weights)


def test_networks_are_told_how_long_the_steps_of_the_archive_are(archive, tmp_path):
    rain = fine_dataset(np.random.default_rng(0).gamma(0.5, 2.0, (60, 100, 120)).astype(np.float32))
    half = rain["time"].values[0] + np.arange(60) * np.timedelta64(30, "m")
    (tmp_path / "half").mkdir()
    rain.assign_coords(time=half).to_netcdf(tmp_path / "half" / "c.nc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stsr_core.training.command.PRESETS", {"small": PLAIN})

        def trained_on(*files, factors=(CONFIGURATION.factor,)):
            return train_checkpoint(
                Data(list(files), [f"{tmp_path}/half"]), factors, folder=tmp_path / "run", name="x", device="cpu",
                seed=0, sizes={"mean_steps": 1, "denoiser_steps": 1, "distil_steps": 0}, report=print,
            ).card  # fmt: skip

        (tmp_path / "other").mkdir()
        rain.assign_coords(time=half + np.timedelta64(2, "D")).to_netcdf(tmp_path / "other" / "d.nc")
        with pytest.raises(SourceError, match=r"steps of an archive differ: 1 h in b, 0.5 h in c"):
            trained_on(archive[0])
        with pytest.raises(ConfigurationError, match=r"Factor \(8,1\) is named twice"):
            trained_on(f"{tmp_path}/other", factors=[CONFIGURATION.factor] * 2)
        card = trained_on(f"{tmp_path}/other")
    assert card.fine_step_h == 0.5
    assert card.served[0].configuration.context_length == 2 * CONFIGURATION.context_length


def test_a_step_learns_from_patches_of_one_spacing(tmp_path):
    rain = np.ones(WIDE, np.float32)
    mixed = [replace(region_of("near", rain)), replace(region_of("far", rain), spacing_km=4.0)]
    run = replace(training(mixed, tmp_path, replace(TINY, cells_per_step=400_000)), train=mixed)
    assert run.spacings_km == (1, 2, 4, 5)
    seen = set()
    for step in range(12):
        patches = run._draw_patches(CONFIGURATION, 1, np.random.default_rng(step))
        assert len(patches) > 1
        assert len({patch.spacing_km for patch in patches}) == 1
        seen.add(patches[0].spacing_km)
    assert seen == {1, 4}


def test_a_region_without_rain_can_be_drawn_from():
    dry = [region_of("dry", np.zeros((24, 200, 220), np.float32))]
    for seed in range(5):
        assert not draw_patch(dry, CONFIGURATION, np.random.default_rng(seed)).fine.any()


def test_factors_weigh_alike_in_the_validation_loss(tmp_path):
    rain = np.ones((72, 320, 320), np.float32)
    configurations = [CONFIGURATION, recipe(Factor(space=25, time=6))]
    run = replace(training([region_of("even", rain)], tmp_path), validation=[region_of("even", rain)])
    run = replace(run, configurations=configurations)
    counts = [sum(drawn.number == n for drawn in run._watched) for n in range(2)]
    assert counts[0] > counts[1] > 0

    def loss(network, fine, conditions, configuration, generator):
        return torch.tensor(float(configuration.factor.time == 6))

    assert run.validation_loss(first_stage(steps=6), loss) == pytest.approx(0.5)


def test_an_archive_too_small_for_one_of_the_factors_is_refused_before_the_first_step(regions, tmp_path):
    short = replace(
        training(regions, tmp_path, PLAIN), configurations=[CONFIGURATION, recipe(Factor(space=25, time=6))]
    )
    with pytest.raises(SourceError, match=r"No complete patch for factor \(25,6\)"):
        fit(short, "x", {})
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_learning_rate_warms_up_and_falls():
    stage = first_stage(steps=1000)
    rates = []
    for step in (0, 99, 500, 999):
        stage.step = step
        rates.append(stage.rate())
    assert rates[0] < rates[1]
    assert rates[1] > rates[2] > rates[3] > 0


def test_a_training_starts_from_the_weights_of_a_checkpoint(regions, trained, tmp_path):
    unmoved = replace(TINY, learning_rate=0.0)
    again = fit(replace(training(regions, tmp_path / "again", unmoved), start=trained), "x", {})
    assert again.card.training["start"] == trained.digest
    assert [s.residual_scale for s in again.card.served] == [s.residual_scale for s in trained.card.served]
    begun, now = trained.weights(), again.weights()
    for name in begun:  # a student begins as its teacher anew
        torch.testing.assert_close(now[name], begun[name.replace("denoiser.", "teacher.")])


def test_a_result_half_way_back_to_its_start_is_the_mean_of_both(regions, plain, tmp_path):
    start, only_mean = plain.weights(), replace(PLAIN, denoiser_steps=1, learning_rate=1e-2, save_every=9)
    ends = {}
    for share in (0.0, 0.5, 1.0):
        run = replace(training(regions, tmp_path / f"{share}", only_mean), start=plain, start_share=share)
        ends[share] = fit(run, "x", {})
        assert ends[share].card.training["start_share"] == share
    moved = 0
    for name, begun in start.items():
        torch.testing.assert_close(ends[1.0].weights()[name], begun)
        if name.startswith("mean."):  # the denoiser is trained around another mean
            end = ends[0.0].weights()[name]
            moved += int((end != begun).any())
            half = (begun.float() + end.float()) / 2
            torch.testing.assert_close(ends[0.5].weights()[name].float(), half, rtol=2e-3, atol=2e-4)
    assert moved > 5


def test_a_distilled_checkpoint_serves_the_student_and_keeps_its_teacher(plain, trained):
    assert plain.card.served[0].evaluations == 8
    assert trained.card.served[0].evaluations == 2
    assert trained.card.served[0].taught == plain.card.served[0]
    assert trained.card.training["student_steps"] == TINY.distil_steps
    student = Downscaler.load(trained, CONFIGURATION.factor, CPU)
    teacher = Downscaler.load(plain, CONFIGURATION.factor, CPU)
    found = student.teacher(trained)
    assert found.served == teacher.served
    assert teacher.teacher(plain) is teacher
    moved = 0
    for name, weights in teacher.denoiser.state_dict().items():
        torch.testing.assert_close(found.denoiser.state_dict()[name], weights)
        moved += int((student.denoiser.state_dict()[name] != weights).any())
    assert moved > 5


def test_a_checkpoint_is_distilled_without_training_it_on(regions, plain, tmp_path):
    only = replace(TINY, mean_steps=0, denoiser_steps=0)
    distilled = fit(replace(training(regions, tmp_path / "distilled", only), start=plain), "x", {}).weights()
    for name, weights in plain.weights().items():
        torch.testing.assert_close(distilled[name.replace("denoiser.", "teacher.")], weights)
    with pytest.raises(ConfigurationError, match=r"Name them with --start"):
        fit(training(regions, tmp_path / "nothing", only), "x", {})


def test_what_was_distilled_is_trained_on_by_its_scores(regions, plain, trained, tmp_path):
    only = replace(TINY, mean_steps=0, denoiser_steps=0, distil_steps=0)
    scored = fit(replace(training(regions, tmp_path / "scored", only), start=trained), "x", {})
    assert scored.card.training["scored_steps"] == TINY.score_steps
    assert "student_steps" not in scored.card.training
    assert scored.card.served[0].evaluations == 2
    begun, moved = trained.weights(), 0
    for name, weights in scored.weights().items():
        if name.startswith("denoiser."):
            moved += int((weights != begun[name]).any())
        else:
            torch.testing.assert_close(weights, begun[name])
    assert moved > 5
    for start, steps in ((plain, only), (None, replace(TINY, distil_steps=0))):
        with pytest.raises(ConfigurationError, match="2 steps towards the least CRPS .* Give --distil-steps too"):
            fit(replace(training(regions, tmp_path / "none", steps), start=start), "x", {})


def test_spreads_are_calibrated_once(regions, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "stsr_core.training.training.calibrated_spread", lambda *_: asked.append(1) or 1.0 + len(asked) / 10
    )
    first = fit(training(regions, tmp_path), "x", {})
    assert len(asked) == 3  # teacher, student, and what was trained on by scores
    again = fit(training(regions, tmp_path), "x", {})
    assert len(asked) == 3
    assert again.card == first.card
    only = replace(TINY, mean_steps=0, denoiser_steps=0, distil_steps=0)
    scored = fit(replace(training(regions, tmp_path / "scored", only), start=first), "x", {})
    assert scored.card.served[0].taught == first.card.served[0].taught
    assert len(asked) == 4
    more = fit(training(regions, tmp_path, replace(TINY, calibration_patches=2)), "x", {})
    assert len(asked) == 7
    assert more.card.training["calibration_patches"] == 2


def test_a_share_of_no_start_is_refused():
    for share, start in ((0.5, None), (1.5, "a.json"), (-0.1, "a.json")):
        with pytest.raises(ConfigurationError, match="Give one from 0 to 1 together with --start"):
            train_checkpoint(
                Data([], []), [CONFIGURATION.factor], folder="", name="x", start=start, start_share=share,
                device="cpu", seed=0, report=print,
            )  # fmt: skip


@pytest.mark.parametrize("name", ["", "..", "rain/small", "/small"])
def test_a_name_that_no_file_can_have_is_refused_before_the_work(name):
    with pytest.raises(ConfigurationError, match="cannot be the name of a file"):
        train_checkpoint(Data([], []), [CONFIGURATION.factor], folder="", name=name, device="cpu", seed=0, report=print)


def test_what_is_fitted_on_is_not_validated_on(archive):
    (folder,) = archive
    for validation in (folder, f"{folder}/b*.nc"):
        with pytest.raises(ConfigurationError, match=r"\.nc is in the data to fit on and in those to validate on"):
            Data([folder], [validation]).require_apart()
    Data([f"{folder}/a.nc"], [f"{folder}/b.nc"]).require_apart()


def test_a_file_to_fit_on_is_known_under_other_names(archive, tmp_path):
    path = Path(archive[0]) / "a.nc"
    (tmp_path / "link.nc").symlink_to(path)
    for other in (tmp_path / "link.nc", path.parent / ".." / path.parent.name / "a.nc"):
        with pytest.raises(ConfigurationError, match=rf"{path} is in the data to fit on and in those to validate on"):
            Data([str(path)], [str(other)]).require_apart()


ON_EARTH = Declared(crs="EPSG:2154")


def train_on(data: Data, folder: Path) -> None:
    train_checkpoint(data, [CONFIGURATION.factor], folder=folder, name="x", device="cpu", seed=0, report=print)


def test_a_copy_of_a_file_to_fit_on_is_not_validated_on(archive, tmp_path):
    shutil.copy(f"{archive[0]}/a.nc", tmp_path / "copy.nc")
    with pytest.raises(ConfigurationError, match="What a and copy hold is in the data to fit on"):
        train_on(Data([f"{archive[0]}/a.nc"], [str(tmp_path / "copy.nc")]), tmp_path)


@pytest.mark.parametrize("part", [{"time": slice(3, 20)}, {"time": slice(20, 24), "y": slice(50, 100)}])
def test_hours_of_a_place_to_fit_on_are_not_validated_on_in_another_file(archive, tmp_path, part):
    with xr.open_dataset(f"{archive[0]}/a.nc") as opened:
        opened.isel(part).to_netcdf(tmp_path / "part.nc")
    data = Data([f"{archive[0]}/a.nc"], [str(tmp_path / "part.nc")], declared=ON_EARTH)
    with pytest.raises(ConfigurationError, match="What a and part share, hours of one place, is in the data to fit on"):
        train_on(data, tmp_path)


def test_other_hours_of_a_place_and_other_places_of_an_hour_may_be_validated_on(archive, tmp_path):
    with xr.open_dataset(f"{archive[0]}/a.nc") as opened:
        for name, part in (("first", slice(0, 20)), ("then", slice(20, 24))):
            opened.isel(time=part).to_netcdf(tmp_path / f"{name}.nc")
        opened.assign_coords(x=opened["x"] + 120_000.0).to_netcdf(tmp_path / "beside.nc")
    paths = [str(tmp_path / f"{name}.nc") for name in ("first", "then", "beside")]
    first, then, beside = (region.extent for region in load_archive(paths, declared=ON_EARTH))
    assert first.meets(first)
    assert not first.meets(then)
    assert not first.meets(beside)
    unknown = load_archive(paths[:1])[0].extent  # files of several radars may all begin at 0 m
    assert not unknown.meets(unknown)


def test_a_checkpoint_of_another_size_is_no_start(regions, trained, tmp_path):
    wider = replace(TINY, architecture=Architecture(mean_channels=(16, 32), denoiser_channels=(8, 32)))
    with pytest.raises(ConfigurationError, match="Choose the preset and the fields it was trained with"):
        fit(replace(training(regions, tmp_path / "again", wider), start=trained), "x", {})


def test_mixed_precision_gives_the_loss_of_single_precision(regions):
    configured = training(regions, Path())
    fine, conditions, configuration, generator = configured.batch(configured.draw(1, 0))
    network = first_stage(steps=1).network
    with torch.autocast("cpu", torch.bfloat16):
        mixed = mean_loss(network, fine, conditions, configuration, generator)
    torch.testing.assert_close(mixed, mean_loss(network, fine, conditions, configuration, generator), rtol=0.01, atol=0)


def test_the_card_says_what_it_takes_to_repeat_a_training(trained):
    found = trained.card.training
    assert {name: found[name] for name in ("processes", "device", "precision", "save_every", "ema_decay", "drift")} == {
        "processes": 1, "device": "cpu", "precision": "float32", "save_every": 2, "ema_decay": 0.998, "drift": 2.0
    }  # fmt: skip
    assert found["torch"] == torch.__version__
    assert found["stsr"] == code_version()
    assert all(0 < found[f"{stage}_least"] < 10 for stage in ("mean", "denoiser", "student", "scored"))


RANK = """
import sys
from dataclasses import replace
from pathlib import Path

from stsr_core.factors import Factor
from stsr_core.training import calibrate
from stsr_core.training.command import Data, train_checkpoint
from stsr_core.training.presets import PRESETS
from tests.tiny import TINY, small_patches

folder, train, validation = sys.argv[1:]
PRESETS["small"] = replace(TINY, mean_steps=2, denoiser_steps=2, distil_steps=1, score_steps=1)
calibrate.MEMBERS, calibrate.SPREADS = 2, (1.0,)
with small_patches():
    found = train_checkpoint(
        Data([train], [validation]), [Factor(space=8, time=1)], folder=Path(folder), name="x", device="cpu", seed=0,
        report=lambda said: print(said, flush=True),
    )
    print("digest", found.digest)
"""


def test_two_processes_make_one_checkpoint(archive, tmp_path):
    with xr.open_dataset(f"{archive[0]}/a.nc") as opened:
        opened.assign_coords(x=opened["x"] + 120_000.0).to_netcdf(tmp_path / "beside.nc")
    script = tmp_path / "ranks.py"
    script.write_text(RANK)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path / "run"), f"{archive[0]}/a.nc", str(tmp_path / "beside.nc")], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    checkpoint = Checkpoint.read(tmp_path / "run" / "checkpoint" / "x.json")
    assert [line for line in lines if line.startswith("digest")] == [f"digest {checkpoint.digest}"] * 2
    assert len([line for line in lines if "are widened" in line]) == 3  # teacher, student, scored: on one rank only
    found = checkpoint.card.training
    assert (found["processes"], found["cells_per_step"]) == (2, 2)
    assert [found[f"{stage}_steps"] for stage in ("mean", "denoiser", "student", "scored")] == [2, 2, 1, 1]
    assert found["train_digests"] == [hashlib.sha256(Path(f"{archive[0]}/a.nc").read_bytes()).hexdigest()]
    assert found["archive"] == ""


def test_two_processes_learn_from_patches_of_their_own(regions, tmp_path):
    first, second = (replace(training(regions, tmp_path), run=Run(rank, 2, CPU)).draw(1, 0) for rank in (0, 1))
    assert (first.fine != second.fine).any()
    assert first.seed != second.seed
