import json
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
import zarr
from pyproj import CRS

import stsr_core
from stsr_core.checkpoint import Library, Served
from stsr_core.conservation import CEILING_MM
from stsr_core.downscaler import Downscaler, choose_device
from stsr_core.ensemble.cluster import Cluster
from stsr_core.ensemble.downscale import _absolute, downscale_to_store, ensemble_quanta, matched, prepared
from stsr_core.ensemble.generate import ShardError, generate
from stsr_core.ensemble.plan import Plan, Recipe
from stsr_core.ensemble.shard import _Block, _store, fill_missing, make_shard
from stsr_core.errors import ConfigurationError, FactorError, GridError, StoreError
from stsr_core.factors import Factor, NoiseCorrelation
from stsr_core.factors import recipe as configured
from stsr_core.grids import Axis, Grid, TimeAxis
from stsr_core.sources.cube import Cube, as_cube
from stsr_core.store.layout import MISSING, QUANTUM_MM
from stsr_core.store.receipts import read_receipts
from tests.conftest import random_checkpoint

CPU = choose_device("cpu")


def cube_of(rain, x0=4000.0, hour=0):
    times = TimeAxis(datetime(2001, 1, 1, hour), timedelta(hours=1), len(rain))
    _, ny, nx = rain.shape
    return Cube(rain, times, Grid(Axis(36_000.0, -4000.0, ny), Axis(x0, 4000.0, nx)), {})


def plan_of(library, *cubes, space=4, time=1, members=2, seed=1, conserve=True, spacing_km=1):
    factor = Factor(space=space, time=time)
    checkpoint = library.serving(factor)
    served = checkpoint.card.serving(factor).told(spacing_km)
    recipe = Recipe.of(checkpoint, served, seed=seed, members=members, conserve=conserve)
    return Plan(cubes, recipe), Downscaler.load(checkpoint, factor, CPU).told(spacing_km)


def block_sums(quanta, s, t):
    m, nt, ny, nx = quanta.shape
    return quanta.astype(np.int64).reshape(m, nt // t, t, ny // s, s, nx // s, s).sum(axis=(2, 4, 6))


@pytest.mark.parametrize(("space", "time"), [(4, 1), (4, 3), (10, 1)])
def test_every_member_conserves_every_coarse_total_to_the_quantum(library, rain, space, time):
    plan, downscaler = plan_of(library, cube_of(rain), space=space, time=time, members=3)
    quanta = ensemble_quanta(plan, downscaler)
    wanted = np.rint(space**2 * rain.astype(np.float64) / QUANTUM_MM)
    np.testing.assert_array_equal(block_sums(quanta, space, time), np.broadcast_to(wanted, (3, *rain.shape)))


def test_members_do_not_depend_on_how_many_there_are_nor_on_threads(library, rain):
    few, downscaler = plan_of(library, cube_of(rain), members=3)
    many, _ = plan_of(library, cube_of(rain), members=6)
    a, b = ensemble_quanta(few, downscaler), ensemble_quanta(many, downscaler, workers=2)
    np.testing.assert_array_equal(a, b[:3])
    assert (b[0] != b[5]).any()


@pytest.mark.parametrize("windows", [1, 2, 100])
def test_members_and_windows_side_by_side_give_the_same_members(library, rain, windows):
    plan, downscaler = plan_of(library, cube_of(np.tile(rain, (1, 1, 16))), members=3)
    together = replace(downscaler, batch_cells=windows * 3 * 8 * 36 * 192)
    one, many = (make_shard(plan.task(plan.shards[0]), d) for d in (downscaler, together))
    assert one.evaluations == many.evaluations == plan.evaluations(plan.shards[0])
    assert (one.quanta == many.quanta).mean() > 0.999  # stored in steps of 0.01 mm: the same within 1e-3 mm


def test_the_windows_of_a_batch_are_alike_and_within_the_memory_of_the_device(library, rain):
    plan, downscaler = plan_of(library, cube_of(np.tile(rain, (6, 1, 7))), members=3)
    limit = 2 * 3 * 12 * 36 * 192
    block = _Block(plan.task(plan.shards[0]), replace(downscaler, batch_cells=limit))
    groups = [group.windows for group in block.groups]
    assert max(map(len, groups)) > 1
    assert len({group[0].shape for group in groups}) > 1
    for group in groups:
        assert len({w.shape for w in group}) == 1
        assert len(group) * 3 * math.prod(group[0].shape) <= limit


def test_networks_in_half_precision_make_the_same_members_but_for_rounding(library, rain):
    plan, downscaler = plan_of(library, cube_of(np.tile(rain, (1, 2, 2))), members=1)
    plain = ensemble_quanta(plan, downscaler)
    half = ensemble_quanta(plan, downscaler.on(CPU, precision="bfloat16"))
    assert half.mean() == pytest.approx(plain.mean(), rel=1e-4)
    assert np.corrcoef(half.ravel(), plain.ravel())[0, 1] > 0.999


def test_a_later_start_gives_the_same_numbers_where_windows_agree(library, rain):
    # Noise and windows lie on absolute lattices: cropping the domain changes only what is near the cut.
    plan, downscaler = plan_of(library, cube_of(np.tile(rain, (1, 8, 8))), members=1)
    whole = ensemble_quanta(plan, downscaler)
    cropped = cube_of(np.ascontiguousarray(np.tile(rain, (1, 8, 8))[:, :, 8:]), x0=4000.0 * 9)
    other, _ = plan_of(library, cropped, members=1)
    part = ensemble_quanta(other, downscaler)
    far = slice(4 * 60, None)
    same = whole[:, :, :, 32:][..., far] == part[..., far]
    assert same.mean() > 0.999


@pytest.mark.parametrize("spacing_km", [1, 4])
def test_members_do_not_depend_on_the_layout_of_shards_but_for_the_tolerance_of_seams(
    library, rain, monkeypatch, spacing_km
):
    cube = cube_of(np.tile(rain[:, :, :6], (1, 1, 14)))
    plan, downscaler = plan_of(library, cube, members=2, spacing_km=spacing_km)
    whole = ensemble_quanta(plan, downscaler).astype(float)
    monkeypatch.setattr("stsr_core.ensemble.plan.SHARD_CELLS", 64)
    monkeypatch.setattr("stsr_core.ensemble.plan.SHARD_STEPS", 4)
    smaller, _ = plan_of(library, cube, members=2, spacing_km=spacing_km)
    assert len(smaller.shards) >= 6 * len(plan.shards)
    parts = ensemble_quanta(smaller, downscaler).astype(float)
    assert (np.abs(parts - whole) <= 1).mean() > 0.99
    seams = np.arange(64, whole.shape[-1], 64)
    across = [np.abs(q[..., seams] - q[..., seams - 1]).mean() for q in (parts, whole)]
    assert across[0] == pytest.approx(across[1], rel=0.05)
    np.testing.assert_array_equal(block_sums(parts, 4, 1), block_sums(whole, 4, 1))


def test_a_block_that_cuts_windows_changes_them_near_the_cut_only(library, rain, monkeypatch):
    # 10 cells are no multiple of those that the networks take together, so a cut moves what is left of a window.
    cube = cube_of(np.tile(rain[:, :4], (1, 1, 4)) + 1)
    plan, downscaler = plan_of(library, cube, members=1, space=10)
    whole = _Block(plan.task(plan.shards[0]), downscaler).mean(lambda _, __: None)
    monkeypatch.setattr("stsr_core.ensemble.plan.SHARD_CELLS", 60)
    parts, _ = plan_of(library, cube, members=1, space=10)
    found = 0
    for shard in parts.shards:
        block = _Block(parts.task(shard), downscaler)
        (_, _, (start, stop)), (_, _, (reach, _)) = shard.box, block.reach
        found += any(cut for _, cut in (group.cut for group in block.groups))
        mine = block.mean(lambda _, __: None)[..., (start - reach) * 10 : (stop - reach) * 10]
        torch.testing.assert_close(mine, whole[..., start * 10 : stop * 10], rtol=0, atol=1e-4)
    assert found


def test_noise_correlated_next_to_nothing_is_the_white_noise_of_its_place(library, rain):
    made = []
    for before in (0.0, 1e-6):
        plan, downscaler = plan_of(library, cube_of(rain))
        noise = NoiseCorrelation(beside=before, before=before)
        configuration = plan.recipe.served.configuration.model_copy(update={"noise": noise})
        recipe = replace(plan.recipe, served=plan.recipe.served.model_copy(update={"configuration": configuration}))
        plan = replace(plan, recipe=recipe)
        made.append(_Block(plan.task(plan.shards[0]), replace(downscaler, served=recipe.served))._noise(1))
    np.testing.assert_allclose(made[1], made[0], atol=1e-4)


@pytest.mark.parametrize("factor", [(1, 6), (2, 1), (8, 3), (10, 1), (25, 6)])
def test_what_a_shard_holds_in_memory_grows_neither_with_the_domain_nor_with_the_period(factor):
    space, time = factor
    served = Served(configuration=configured(Factor(space=space, time=time)), residual_scale=1.0, evaluations=8)

    def most(steps: int, cells: int) -> int:
        dry = np.broadcast_to(np.float32(0), (steps // time, cells // space, cells // space))
        plan = Plan((as_cube(dry, Factor(space=space, time=time)),), Recipe(served, "0", seed=1, members=4))
        return max(math.prod(b - a for a, b in plan.reach(shard)) * space**2 * time for shard in plan.shards)

    assert most(720, 4000) == most(1440, 4000) <= 41e6  # fine cell-steps, 164 MB a field
    assert most(720, 2000) <= most(720, 4000)


def test_a_dry_cube_needs_no_network(library, rain):
    plan, downscaler = plan_of(library, cube_of(np.zeros_like(rain)))
    assert sum(plan.evaluations(shard) for shard in plan.shards) == 0
    assert (ensemble_quanta(plan, downscaler) == 0).all()


def test_holes_stay_missing_and_their_neighbours_keep_their_amount(library, rain):
    holed = rain.copy()
    holed[2, 4, 3] = np.nan
    plan, downscaler = plan_of(library, cube_of(holed))
    quanta = ensemble_quanta(plan, downscaler)
    hole = np.zeros(rain.shape, bool)
    hole[2, 4, 3] = True
    fine_hole = hole.repeat(4, 1).repeat(4, 2)
    assert (quanta[:, fine_hole] == MISSING).all()
    assert (quanta[:, ~fine_hole] != MISSING).all()
    wanted = np.rint(16 * rain.astype(np.float64) / QUANTUM_MM)
    np.testing.assert_array_equal(
        block_sums(quanta, 4, 1)[:, ~hole], np.broadcast_to(wanted[~hole], (2, (~hole).sum()))
    )


def test_windows_of_missing_and_dry_cells_need_no_network_and_are_planned_so(library, rain):
    sea = np.full((4, 9, 120), np.nan, np.float32)
    sea[:, :, :40], sea[:, :, 20:30] = 0.0, 1.0
    plan, downscaler = plan_of(library, cube_of(sea), members=1)
    made = make_shard(plan.task(plan.shards[0]), downscaler)
    assert 0 < made.evaluations == plan.evaluations(plan.shards[0])
    assert len(plan.windows(plan.shards[0])) * 3 > 2 * made.evaluations


def test_shards_of_nothing_but_missing_cells_are_stored_and_made_once(
    rain, checkpoints, cluster, tmp_path, monkeypatch
):
    monkeypatch.setattr("stsr_core.ensemble.plan.SHARD_CELLS", 16)
    sea = np.tile(rain, (1, 1, 2))
    sea[:, :, 8:] = np.nan
    plan = to_store(cube_of(sea), checkpoints, tmp_path / "out", cluster)
    before = files_of(tmp_path / "out")
    assert sum(name.startswith("precipitation/c/") for name in before) == len(plan.shards)
    assert xr.open_zarr(tmp_path / "out")["precipitation"][..., 32:].isnull().all()
    with pytest.raises(StoreError, match="is there and whole"):
        to_store(cube_of(sea), checkpoints, tmp_path / "out", cluster)


def test_a_dry_shard_counts_what_is_missing(library, rain):
    dry = np.zeros_like(rain)
    dry[2, 4, 3] = np.nan
    plan, downscaler = plan_of(library, cube_of(dry), members=3)
    made = make_shard(plan.task(plan.shards[0]), downscaler)
    assert made.counts["missing"] == (made.quanta == MISSING).sum() == 3 * 16


def test_networks_see_the_nearest_cell_where_one_is_missing():
    nan = np.nan
    coarse = np.array([[[1, nan, nan, 5], [2, nan, nan, 6]], [[nan] * 4] * 2], np.float32)
    filled = fill_missing(coarse)
    assert filled.tolist() == [[[1, 1, 5, 5], [2, 2, 6, 6]], [[0] * 4] * 2]
    assert np.isnan(coarse[0, 0, 1])


@pytest.mark.parametrize(("mm", "fits"), [(655.34, True), (655.35, False), (700.0, False)])
def test_amounts_that_16_bits_do_not_hold_are_refused(library, rain, mm, fits):
    plan, _ = plan_of(library, cube_of(rain), members=1, conserve=False)
    fine = torch.zeros(1, 8, 36, 44)
    fine[0, 3, 5, 7] = mm
    stored = torch.empty(fine.shape, dtype=torch.int16)
    with nullcontext() if fits else pytest.raises(StoreError, match=f"m0-t0-y0-x0 holds {mm:.0f} mm in one fine cell"):
        _store(plan.task(plan.shards[0]), fine, stored)
        assert int((stored.int() & MISSING).max()) == 65534


def test_without_conservation_the_totals_are_the_networks_own(library, rain, monkeypatch):
    monkeypatch.setattr("stsr_core.conservation.SLAB_CELLS", 1)  # a step at a time
    heaviest_first = np.sort(rain, axis=0)[::-1].copy()
    plan, downscaler = plan_of(library, cube_of(heaviest_first), conserve=False)
    made = make_shard(plan.task(plan.shards[0]), downscaler)
    off = block_sums(made.quanta, 4, 1) - np.rint(16 * heaviest_first.astype(np.float64) / QUANTUM_MM)
    assert made.closure_quanta == np.abs(off).max() > np.abs(off[:, -1]).max()
    dry = replace(plan, cubes=(cube_of(np.zeros_like(rain)),))
    made = make_shard(dry.task(dry.shards[0]), downscaler)  # what networks make of no rain stays, too
    assert made.evaluations == dry.evaluations(dry.shards[0]) > 0
    wild = replace(downscaler, served=downscaler.served.model_copy(update={"spread": 100.0}))
    assert ensemble_quanta(plan, wild).max() * QUANTUM_MM == pytest.approx(CEILING_MM)


def test_digests_follow_the_input_near_a_shard_and_not_the_number_of_members(library, rain):
    plan, _ = plan_of(library, cube_of(rain), members=4)
    more, _ = plan_of(library, cube_of(rain), members=8)
    changed = rain.copy()
    changed[0, 0, 0] += 1
    other, _ = plan_of(library, cube_of(changed), members=4)
    first = plan.task(plan.shards[0]).digest
    assert more.task(more.shards[0]).digest == first
    assert other.task(other.shards[0]).digest != first
    reseeded, _ = plan_of(library, cube_of(rain), members=4, seed=2)
    assert reseeded.task(reseeded.shards[0]).digest != first


def test_a_digest_covers_all_that_a_shard_is_made_from(library, rain, monkeypatch):
    cube = cube_of(rain)
    plan, _ = plan_of(library, cube, members=6)
    recipe, served = plan.recipe, plan.recipe.served
    fields = np.zeros((1, 36, 44), np.float32)

    def digest(number=0, **changes):
        changed = replace(plan, **changes)
        return changed.task(changed.shards[number]).digest

    def made(**changes):
        return {"recipe": replace(recipe, **changes)}

    def served_by(**changes):
        return made(served=served.model_copy(update=changes))

    several = [
        digest(),
        digest(1),
        digest(**made(seed=2)),
        digest(**made(conserve=False)),
        digest(**made(checkpoint_digest="0")),
        digest(**served_by(evaluations=3)),
        digest(**made(served=served.told(4))),
        digest(**served_by(configuration=served.configuration.model_copy(update={"context_length": 5}))),
        digest(cubes=(cube_of(rain, x0=8000.0),)),
        digest(cubes=(cube_of(rain, hour=1),)),
        digest(cubes=(replace(cube, driving="r1"),)),
        digest(statics=fields),
        digest(statics=fields + 1),
    ]
    monkeypatch.setattr("stsr_core.ensemble.plan.code_version", lambda: "another")
    several.append(digest())
    assert len(set(several)) == len(several)


def test_a_missing_amount_is_the_same_in_a_digest_whatever_its_bits(library, rain):
    holes = [rain.copy(), rain.copy()]
    for hole, nan in zip(holes, (np.nan, -np.float32(np.nan)), strict=True):
        hole[2, 3, 4] = nan
    assert holes[0].tobytes() != holes[1].tobytes()
    first, second = (plan_of(library, cube_of(hole))[0] for hole in holes)
    assert first.task(first.shards[0]).digest == second.task(second.shards[0]).digest


def test_blocks_of_the_same_input_have_digests_of_their_own(library):
    plan, _ = plan_of(library, cube_of(np.ones((400, 9, 11), np.float32)), members=2)
    assert len(plan.shards) > 8
    assert len({plan.task(shard).digest for shard in plan.shards}) == len(plan.shards)


def test_shards_tile_the_ensemble_exactly_once(library):
    cube = cube_of(np.ones((30, 140, 150), np.float32))
    plan, _ = plan_of(library, cube, members=6)
    count = np.zeros(plan.fine_shape, np.uint8)
    for shard in plan.shards:
        count[shard.region(4, 1)] += 1
    assert (count == 1).all()
    assert len({shard.key for shard in plan.shards}) == len(plan.shards)


def test_bad_counts_are_refused(library, rain):
    with pytest.raises(ConfigurationError, match="0 members are asked for"):
        plan_of(library, cube_of(rain), members=0)
    with pytest.raises(ConfigurationError, match="Seed -1"):
        plan_of(library, cube_of(rain), seed=-1)


@pytest.fixture
def array(rain):
    time = pd.date_range("2001-01-01 01:00", periods=len(rain), freq="1h")
    coords = {"time": time, "y": 36_000.0 - 4000.0 * np.arange(9), "x": 4000.0 * np.arange(1, 12)}
    return xr.DataArray(rain, dims=("time", "y", "x"), coords=coords, attrs={"units": "mm"})


def test_the_python_call_returns_the_fine_lattice(array, checkpoints):
    out = stsr_core.downscale(array, space=4, time=3, members=2, seed=3, checkpoints=str(checkpoints))
    assert out.dims == ("member", "time", "y", "x")
    assert out.dtype == np.float32
    assert out.shape == (2, 24, 36, 44)
    np.testing.assert_allclose(out["x"][:4], [2500.0, 3500.0, 4500.0, 5500.0])
    np.testing.assert_allclose(out["y"][:2], [37_500.0, 36_500.0])
    assert out["time"].values[2] == array["time"].values[0]
    assert out["time_start"].values[0] == np.datetime64("2001-01-01T00:00")
    total = out.coarsen(y=4, x=4).mean().coarsen(time=3).sum()
    np.testing.assert_allclose(total.values, np.broadcast_to(array, total.shape), atol=QUANTUM_MM / 16 + 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "gpu"}, "'gpu' is no device. Name auto, cpu or cuda"),
        ({"time_label": "begin"}, "time_label is 'begin'; start, middle or end"),
        ({"workers": -1}, "workers is -1"),
        ({"members": 2.0}, "members is 2.0; a whole number"),
        ({"seed": 1.5}, "seed is 1.5; a whole number"),
        ({"da": xr.Dataset()}, "A Dataset is given; an xarray.DataArray is needed"),
    ],
)
def test_arguments_that_cannot_be_are_refused(array, checkpoints, change, message):
    asked = {"da": array, "space": 4, "time": 1, "members": 1, "checkpoints": str(checkpoints)} | change
    with pytest.raises(ConfigurationError, match=message):
        stsr_core.downscale(**asked)


def test_an_array_of_one_step_is_downscaled_when_its_length_is_given(array, checkpoints):
    out = stsr_core.downscale(
        array.isel(time=[0]), space=4, time=3, members=1, step_h=3.0, checkpoints=str(checkpoints)
    )
    assert dict(out.sizes)["time"] == 3
    assert out["time_start"].values[0] == array["time"].values[0] - np.timedelta64(3, "h")


def test_rows_beyond_a_pole_are_refused(checkpoints):
    axes = {"lat": ("lat", 86.0 + np.arange(5), {"units": "degrees_north"}), "lon": ("lon", 4.0 * np.arange(5), {})}
    axes["time"] = np.datetime64("2001-01-01T01", "ns") + np.arange(2) * np.timedelta64(1, "h")
    polar = xr.DataArray(np.ones((2, 5, 5), np.float32), axes, ("time", "lat", "lon"), attrs={"units": "mm"})
    with pytest.raises(GridError, match="rows of cells at the pole reach to 90.5 degrees. Leave them out"):
        stsr_core.downscale(polar, space=4, time=1, members=1, checkpoints=str(checkpoints))
    out = stsr_core.downscale(polar.isel(lat=slice(0, 4)), space=4, time=1, members=1, checkpoints=str(checkpoints))
    assert float(out["y"].max()) < 90


def test_an_unsupported_factor_names_the_nearest_and_nearest_regrids_to_it(array, checkpoints):
    with pytest.raises(FactorError, match=r"\(5,1\) is not served.*nearest is \(4,1\).*--nearest"):
        stsr_core.downscale(array, space=5, time=1, checkpoints=str(checkpoints))
    out = stsr_core.downscale(array, space=5, time=1, members=1, nearest=True, checkpoints=str(checkpoints))
    assert float(out["x"][1] - out["x"][0]) == pytest.approx(4000.0 / 5)


def test_a_factor_beyond_the_family_can_be_regridded_to_the_nearest(rain, tmp_path):
    random_checkpoint(tmp_path, [(25, 1)])
    cubes, factor = matched((cube_of(rain),), 30, 1, Library.open(tmp_path), nearest=True)
    assert factor == Factor(space=25, time=1)
    assert cubes[0].grid.x.refine(25).step == pytest.approx(4000.0 / 30)
    total = cubes[0].amount.sum(axis=(1, 2), dtype=float) * (25 / 30) ** 2
    assert (total <= rain.sum(axis=(1, 2)) * (1 + 1e-5)).all()


def driving_cubes(rain, labels=("r1", "r2", "r5")):
    """Cubes of driving members: the same rain, moved in time."""
    return tuple(replace(cube_of(np.roll(rain, i, axis=0)), driving=label) for i, label in enumerate(labels))


def test_every_driving_member_gets_members_of_its_own_that_conserve_its_totals(library, rain):
    cubes = driving_cubes(rain)
    plan, downscaler = plan_of(library, *cubes, members=6)
    assert plan.driving == ("r1",) * 3 + ("r2",) * 3 + ("r5",) * 3 + ("r1",) * 3 + ("r2",) * 3 + ("r5",) * 3
    quanta = ensemble_quanta(plan, downscaler)
    assert len(quanta) == 18
    for member, label in enumerate(plan.driving):
        (cube,) = (c for c in cubes if c.driving == label)
        wanted = np.rint(16 * cube.amount.astype(np.float64) / QUANTUM_MM)
        np.testing.assert_array_equal(block_sums(quanta[member : member + 1], 4, 1)[0], wanted)
    for number, cube in enumerate(cubes):
        alone, _ = plan_of(library, cube, members=6)
        same = [i for i, label in enumerate(plan.driving) if label == cube.driving]
        np.testing.assert_array_equal(ensemble_quanta(alone, downscaler), quanta[same])
        assert plan.task(plan.shards[2 * number]).shard.driving == number


def test_the_noise_of_driving_members_is_independent_and_that_of_a_source_without_any_its_own(library, rain):
    same = tuple(replace(cube_of(rain), driving=label) for label in ("", "a", "b"))
    made = [ensemble_quanta(*plan_of(library, cube, members=1)) for cube in same]
    digests = {plan.task(plan.shards[0]).digest for plan, _ in (plan_of(library, cube, members=1) for cube in same)}
    assert len(digests) == 3
    assert (made[0] != made[1]).any()
    assert (made[1] != made[2]).any()


@pytest.mark.parametrize(("members", "block"), [(1, 1), (2, 2), (4, 4), (5, 1), (6, 3), (16, 4)])
def test_shards_of_driving_members_are_all_full_and_tile_the_ensemble(library, rain, members, block):
    plan, _ = plan_of(library, *driving_cubes(rain), members=members)
    assert plan.member_block == block
    places = sorted((shard.members, shard.driving, shard.numbers) for shard in plan.shards)
    assert [p[0] for p in places] == [(i, i + block) for i in range(0, 3 * members, block)]
    assert [plan.driving[p[0][0]] for p in places] == [plan.cubes[p[1]].driving for p in places]
    assert sorted((d, n) for _, d, (n, _) in places) == [(d, n) for d in range(3) for n in range(0, members, block)]
    assert len({plan.task(shard).digest for shard in plan.shards}) == len(plan.shards)


def to_store(cube, checkpoints, output: Path, cluster: Cluster, members: int = 2, **changes):
    overwrite, extend = changes.pop("overwrite", False), changes.pop("extend", False)
    arguments = {"space": 4, "time": 1, "seed": 1, "nearest": False, "conserve": True, "device": "cpu", **changes}
    cubes = cube if isinstance(cube, tuple) else (cube,)
    plan, downscaler = prepared(cubes, members=members, checkpoints=str(checkpoints), **arguments)
    downscale_to_store(plan, downscaler, str(output), cluster=cluster, overwrite=overwrite, extend=extend)
    return plan


def files_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_a_store_has_the_same_bytes_for_any_number_of_workers_and_resumes(rain, checkpoints, cluster, tmp_path):
    cube = cube_of(rain)
    plan = to_store(cube, checkpoints, tmp_path / "one", Cluster(device="cpu", workers=1), members=6)
    to_store(cube, checkpoints, tmp_path / "two", cluster, members=6)
    whole = files_of(tmp_path / "one")
    assert files_of(tmp_path / "two") == whole

    # What a kill leaves: one shard without receipt, and no group metadata.
    (tmp_path / "two" / "zarr.json").unlink()
    (tmp_path / "two" / "precipitation" / "receipts" / f"{plan.shards[-1].key}.json").unlink()
    (tmp_path / "two" / "precipitation" / "c" / "1" / "0" / "0" / "0").write_bytes(b"half")
    with pytest.raises(Exception, match="."):
        xr.open_zarr(tmp_path / "two")
    to_store(cube, checkpoints, tmp_path / "two", cluster, members=6)
    assert files_of(tmp_path / "two") == whole

    dataset = xr.open_zarr(tmp_path / "one")
    assert dataset["precipitation"].dims == ("member", "time", "y", "x")
    assert dataset["precipitation"].attrs["units"] == "mm"
    quanta = ensemble_quanta(plan, Downscaler.load(*_serving(checkpoints)))
    np.testing.assert_allclose(dataset["precipitation"].values, quanta * QUANTUM_MM, atol=1e-4)

    with pytest.raises(StoreError, match="there and whole.*--overwrite"):
        to_store(cube, checkpoints, tmp_path / "two", cluster, members=6)


def test_a_damaged_shard_of_a_whole_store_is_made_again_alone(rain, checkpoints, cluster, tmp_path):
    cube, out = cube_of(rain), tmp_path / "out"
    to_store(cube, checkpoints, out, cluster, members=6)
    whole = files_of(out)
    shard = out / "precipitation" / "c" / "0" / "0" / "0" / "0"
    other = out / "precipitation" / "c" / "1" / "0" / "0" / "0"
    stamp = other.stat().st_mtime_ns
    for harm in (lambda: shard.write_bytes(shard.read_bytes()[:-9]), shard.unlink):
        harm()
        to_store(cube, checkpoints, out, cluster, members=6)
        assert files_of(out) == whole
    assert other.stat().st_mtime_ns == stamp


def test_a_store_grows_to_more_members_and_a_longer_period(rain, checkpoints, cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("stsr_core.ensemble.plan.SHARD_STEPS", 24)
    long = np.tile(rain, (7, 1, 1))  # 56 h: shards of 24, 24 and 8 steps
    grown, fresh = tmp_path / "grown", tmp_path / "fresh"
    to_store(cube_of(long), checkpoints, grown, cluster, members=4)
    before = {p: p.stat().st_mtime_ns for p in (grown / "precipitation" / "c").rglob("*") if p.is_file()}
    with pytest.raises(StoreError, match="--extend to let it grow"):
        to_store(cube_of(long), checkpoints, grown, cluster, members=9)
    to_store(cube_of(long), checkpoints, grown, cluster, members=9, extend=True)
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in before.items())
    longer = np.concatenate([long, rain[::-1]])  # 64 h
    to_store(cube_of(longer), checkpoints, grown, cluster, members=9, extend=True)
    first = [p for p in before if "/c/0/0/" in str(p)]
    assert first
    assert all(p.stat().st_mtime_ns == before[p] for p in first)
    to_store(cube_of(longer), checkpoints, fresh, cluster, members=9)
    assert files_of(grown) == files_of(fresh)
    with pytest.raises(StoreError, match="pass --overwrite"):  # it never shrinks
        to_store(cube_of(long), checkpoints, grown, cluster, members=9, extend=True)
    assert files_of(grown) == files_of(fresh)


@pytest.mark.parametrize(("members", "steps"), [(4, 16), (6, 24)])
def test_a_store_grows_of_which_no_shard_is_full(rain, checkpoints, cluster, tmp_path, members, steps):
    """Two members and a shard of 16 steps: what comes changes every shard that is there."""
    cubes = {n: cube_of(np.tile(rain, (7, 1, 1))[:n]) for n in (16, steps)}
    to_store(cubes[16], checkpoints, tmp_path / "grown", cluster, members=2)
    with pytest.raises(StoreError, match="other input, arguments or code and none of this ensemble"):
        to_store(cubes[steps], checkpoints, tmp_path / "grown", cluster, members=members, seed=9, extend=True)
    before = xr.open_zarr(tmp_path / "grown")["precipitation"].load()
    to_store(cubes[steps], checkpoints, tmp_path / "grown", cluster, members=members, extend=True)
    to_store(cubes[steps], checkpoints, tmp_path / "fresh", cluster, members=members)
    assert files_of(tmp_path / "grown") == files_of(tmp_path / "fresh")
    if steps == 16:
        xr.testing.assert_equal(xr.open_zarr(tmp_path / "grown")["precipitation"][:2].load(), before)


@pytest.fixture
def killed(monkeypatch):
    """Kills runs where their first shard would be made."""

    class KilledError(Exception):
        pass

    @contextmanager
    def at_the_first_shard():
        with monkeypatch.context() as patch, pytest.raises(KilledError):
            patch.setattr("stsr_core.ensemble.downscale.generate", Mock(side_effect=KilledError))
            yield

    return at_the_first_shard


@pytest.mark.parametrize(("members", "steps"), [(4, 16), (2, 24)])
def test_growth_that_is_killed_before_its_first_shard_goes_on(
    rain, checkpoints, cluster, tmp_path, killed, members, steps
):
    cubes = {n: cube_of(np.tile(rain, (7, 1, 1))[:n]) for n in (16, steps)}
    out = tmp_path / "grown"
    to_store(cubes[16], checkpoints, out, cluster, members=2)
    before = files_of(out)
    for _ in range(2):
        with killed():
            to_store(cubes[steps], checkpoints, out, cluster, members=members, extend=True)
    to_store(cubes[16], checkpoints, out, cluster, members=2)  # what was there is whole again
    assert files_of(out) == before
    with killed():
        to_store(cubes[steps], checkpoints, out, cluster, members=members, extend=True)
    to_store(cubes[steps], checkpoints, out, cluster, members=members, extend=True)
    to_store(cubes[steps], checkpoints, tmp_path / "fresh", cluster, members=members)
    assert files_of(out) == files_of(tmp_path / "fresh")


@pytest.mark.parametrize("begun", ["driving", "factor", "size"])
def test_what_another_command_began_without_a_shard_is_begun_anew(rain, checkpoints, cluster, tmp_path, killed, begun):
    out, cube = tmp_path / "out", cube_of(rain)
    first = {"driving": driving_cubes(rain), "factor": cube, "size": cube_of(rain[:, :6, :6])}[begun]
    with killed():
        to_store(first, checkpoints, out, cluster, space=10 if begun == "factor" else 4)
    to_store(cube, checkpoints, out, cluster)
    to_store(cube, checkpoints, tmp_path / "fresh", cluster)
    assert files_of(out) == files_of(tmp_path / "fresh")


def test_damaged_metadata_of_a_begun_store_is_told(rain, checkpoints, cluster, tmp_path, killed):
    with killed():
        to_store(cube_of(rain), checkpoints, tmp_path / "out", cluster)
    (tmp_path / "out" / "precipitation" / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match=r"zarr.json is damaged .* Start over with --overwrite"):
        to_store(cube_of(rain), checkpoints, tmp_path / "out", cluster)
    to_store(cube_of(rain), checkpoints, tmp_path / "out", cluster, overwrite=True)


def test_a_store_of_driving_members_grows_and_its_shards_are_those_of_each_alone(rain, checkpoints, cluster, tmp_path):
    cubes = driving_cubes(rain)
    to_store(cubes, checkpoints, tmp_path / "all", cluster, members=4)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "all" / "precipitation" / "c").rglob("*") if p.is_file()}
    assert len(before) == 3
    with pytest.raises(StoreError, match="none of this ensemble"):  # blocks of 3 instead of 4
        to_store(cubes, checkpoints, tmp_path / "all", cluster, members=6, extend=True)
    to_store(cubes, checkpoints, tmp_path / "all", cluster, members=8, extend=True)
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in before.items())
    to_store(cubes[1], checkpoints, tmp_path / "one", cluster, members=8)
    for block, of_all in (("0", "1"), ("1", "4")):
        one, same = (tmp_path / name / "precipitation" / "c" / n / "0" / "0" / "0"
                     for name, n in (("one", block), ("all", of_all)))  # fmt: skip
        assert one.read_bytes() == same.read_bytes()
    dataset = xr.open_zarr(tmp_path / "all")
    assert dataset["driving_member"].dims == ("member",)
    assert dataset["driving_member"].values.tolist() == (["r1"] * 4 + ["r2"] * 4 + ["r5"] * 4) * 2
    assert dataset.sizes["member"] == 24


def _serving(checkpoints):
    factor = Factor(space=4, time=1)
    return Library.open(checkpoints).serving(factor), factor, CPU


def test_a_store_begun_with_other_arguments_is_refused(rain, checkpoints, cluster, tmp_path):
    to_store(cube_of(rain), checkpoints, tmp_path / "out", cluster)
    (tmp_path / "out" / "zarr.json").unlink()
    with pytest.raises(StoreError, match="made from other input, arguments or code.*--overwrite"):
        to_store(cube_of(rain), checkpoints, tmp_path / "out", cluster, seed=9)


def test_two_runs_at_once_on_one_scheduler_fill_their_own_stores(rain, checkpoints, cluster, tmp_path):
    outputs = [tmp_path / "one", tmp_path / "two"]
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(to_store, cube_of(rain), checkpoints, out, cluster, members=24) for out in outputs]
        assert [run.exception() for run in runs] == [None, None]
    assert not xr.open_zarr(outputs[0])["precipitation"].isnull().any()
    assert files_of(outputs[0]) == files_of(outputs[1])


def test_a_store_grows_with_a_crs_that_it_was_not_told_before(rain, checkpoints, cluster, tmp_path):
    cube = cube_of(rain)
    placed = replace(cube, grid=replace(cube.grid, crs_wkt=CRS.from_epsg(2154).to_wkt()))
    to_store(cube, checkpoints, tmp_path / "grown", cluster, members=4)
    to_store(placed, checkpoints, tmp_path / "grown", cluster, members=8, extend=True)
    to_store(placed, checkpoints, tmp_path / "fresh", cluster, members=8)
    assert files_of(tmp_path / "grown") == files_of(tmp_path / "fresh")


def test_a_store_that_lost_a_receipt_meanwhile_is_not_called_whole(rain, checkpoints, cluster, tmp_path, monkeypatch):
    to_store(cube_of(rain), checkpoints, tmp_path / "out", cluster, members=4)

    def losing(*args, **kwargs):
        generate(*args, **kwargs)
        (tmp_path / "out" / "precipitation" / "receipts" / "m0-t0-y0-x0.json").unlink()

    with (
        monkeypatch.context() as patch,
        pytest.raises(ShardError, match=r"1 shards of .* \(first m0-t0-y0-x0\) were lost"),
    ):
        patch.setattr("stsr_core.ensemble.downscale.generate", losing)
        to_store(cube_of(rain), checkpoints, tmp_path / "out", cluster, members=8, extend=True)
    assert not (tmp_path / "out" / "zarr.json").exists()
    to_store(cube_of(rain), checkpoints, tmp_path / "out", cluster, members=8, extend=True)
    assert not xr.open_zarr(tmp_path / "out")["precipitation"].isnull().any()


def test_a_shard_that_is_damaged_meanwhile_is_found_before_a_store_is_called_whole(
    rain, checkpoints, cluster, tmp_path, monkeypatch
):
    out = tmp_path / "out"

    def damaging(*args, **kwargs):
        generate(*args, **kwargs)
        shard = out / "precipitation" / "c" / "0" / "0" / "0" / "0"
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")

    with monkeypatch.context() as patch, pytest.raises(ShardError, match=r"1 shards of .* damaged while others were"):
        patch.setattr("stsr_core.ensemble.downscale.generate", damaging)
        to_store(cube_of(rain), checkpoints, out, cluster)
    assert not (out / "zarr.json").exists()
    to_store(cube_of(rain), checkpoints, out, cluster)
    assert not xr.open_zarr(out)["precipitation"].isnull().any()


def test_a_rebuilt_shard_at_the_edge_has_the_bytes_of_the_first(rain, checkpoints, cluster, tmp_path):
    out, cube = tmp_path / "out", cube_of(rain)
    to_store(cube, checkpoints, out, cluster)
    before = files_of(out)
    array = zarr.open_array(out / "precipitation", mode="r+")
    array.resize((8, *array.shape[1:]))
    array[2:4] = 7  # beyond the last member
    array.resize((2, *array.shape[1:]))
    to_store(cube, checkpoints, out, cluster)
    assert files_of(out) == before


@pytest.mark.parametrize("whole", [True, False])
def test_lost_metadata_of_the_array_is_made_again_and_what_is_cut_is_told(rain, checkpoints, cluster, tmp_path, whole):
    out, cube = tmp_path / "out", cube_of(rain)
    to_store(cube, checkpoints, out, cluster)
    before, metadata = files_of(out), out / "precipitation" / "zarr.json"
    if not whole:
        (out / "zarr.json").unlink()
    metadata.write_text("{")
    with pytest.raises(StoreError, match=r"zarr.json is damaged .* Start over with --overwrite"):
        to_store(cube, checkpoints, out, cluster)
    metadata.unlink()
    to_store(cube, checkpoints, out, cluster)
    assert files_of(out) == before


def test_a_store_whose_finish_was_cut_short_does_not_open_while_it_grows(rain, checkpoints, cluster, tmp_path, killed):
    out, cube = tmp_path / "out", cube_of(rain)
    to_store(cube, checkpoints, out, cluster, members=4)
    root = json.loads((out / "zarr.json").read_text())
    del root["consolidated_metadata"]
    (out / "zarr.json").write_text(json.dumps(root))
    with killed():
        to_store(cube, checkpoints, out, cluster, members=8, extend=True)
    assert not (out / "zarr.json").exists()


def test_a_shorter_input_does_not_shrink_a_store(rain, checkpoints, cluster, tmp_path):
    to_store(cube_of(np.tile(rain, (7, 1, 1))), checkpoints, tmp_path / "out", cluster)
    with pytest.raises(StoreError, match="--overwrite"):
        to_store(cube_of(rain), checkpoints, tmp_path / "out", cluster, extend=True)


def test_receipts_say_what_a_shard_was_made_on(rain, checkpoints, cluster, tmp_path):
    to_store(cube_of(rain), checkpoints, tmp_path / "out", cluster)
    found = read_receipts(str(tmp_path / "out"), "precipitation")
    assert {receipt.made_on for receipt in found.values()} == {"cpu float32"}


def test_shards_of_another_precision_do_not_join_those_that_are_there(rain, checkpoints, cluster, tmp_path):
    half = replace(cluster, precision="bfloat16")
    to_store(cube_of(rain), checkpoints, tmp_path / "out", half, members=4)
    with pytest.raises(ConfigurationError, match="made on cpu bfloat16, this .* cpu float32.*STSR_PRECISION to bfloat"):
        to_store(cube_of(rain), checkpoints, tmp_path / "out", cluster, members=8, extend=True)
    to_store(cube_of(rain), checkpoints, tmp_path / "out", half, members=8, extend=True)


def test_a_whole_store_of_other_input_is_not_taken_for_one_that_grows(rain, checkpoints, cluster, tmp_path):
    long = np.tile(rain, (7, 1, 1))
    to_store(cube_of(long), checkpoints, tmp_path / "out", cluster)
    before = files_of(tmp_path / "out")
    long[-6:] *= 2
    with pytest.raises(StoreError, match="made from other input"):
        to_store(cube_of(long), checkpoints, tmp_path / "out", cluster, extend=True)
    assert files_of(tmp_path / "out") == before


def test_what_replaces_a_store_goes_on_after_a_kill(rain, checkpoints, cluster, tmp_path):
    out, cube = tmp_path / "out", cube_of(rain)
    to_store(cube_of(2 * rain), checkpoints, out, cluster)
    to_store(cube, checkpoints, out, cluster, members=6, overwrite=True)
    whole, kept = files_of(out), out / "precipitation" / "c" / "0" / "0" / "0" / "0"
    (out / "zarr.json").unlink()
    (out / "precipitation" / "c" / "1" / "0" / "0" / "0").unlink()
    made = kept.stat().st_mtime_ns
    to_store(cube, checkpoints, out, cluster, members=6, overwrite=True)
    assert files_of(out) == whole
    assert kept.stat().st_mtime_ns == made
    to_store(cube, checkpoints, out, cluster, members=6, overwrite=True)
    assert kept.stat().st_mtime_ns > made


def test_an_output_is_the_same_place_for_every_worker(rain, checkpoints, cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the workers of `cluster` are elsewhere
    to_store(cube_of(rain), checkpoints, Path("relative"), cluster)
    assert not xr.open_zarr(tmp_path / "relative")["precipitation"].isnull().any()
    assert _absolute("s3://bucket/a.zarr/") == "s3://bucket/a.zarr"


def test_a_place_that_cannot_be_written_is_refused(rain, checkpoints, cluster, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot be written"):
        to_store(cube_of(rain), checkpoints, tmp_path / "file" / "out", cluster)


def letters(place: Path) -> None:
    for name in ("a.txt", "time/b.txt", "x/c.txt", "precipitation/receipts/d.json"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("keep me")


def foreign(place: Path, **how) -> None:
    """Write a Zarr store of another program, with our names."""
    coords = {"time": pd.date_range("2001-01-01", periods=3), "y": [0.0, 1.0], "x": [0.0, 1.0]}
    xr.DataArray(np.ones((3, 2, 2)), coords, name="precipitation").to_dataset().to_zarr(place, **how)


@pytest.mark.parametrize(
    "lies_there",
    [
        letters,
        lambda place: place.write_text("keep me"),
        lambda place: foreign(place, zarr_format=2),
        lambda place: foreign(place, zarr_format=3, consolidated=False),
        lambda place: foreign(place, zarr_format=3, consolidated=True),
    ],
    ids=["folder", "file", "zarr 2", "zarr 3", "zarr 3 consolidated"],
)
@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part:zarr.errors.ZarrUserWarning")
def test_what_others_wrote_is_never_touched(rain, checkpoints, tmp_path, lies_there):
    lies_there(tmp_path / "out")
    before = files_of(tmp_path)
    nowhere = Cluster(scheduler_address="tcp://127.0.0.1:1", device="cpu")  # it is refused before there is one
    for how in ({}, {"extend": True}, {"overwrite": True}):
        with pytest.raises(StoreError, match="out is there and no Zarr store that stsr wrote, so nothing in it is"):
            to_store(cube_of(rain), checkpoints, tmp_path / "out", nowhere, **how)
    assert files_of(tmp_path) == before
