"""Layout, receipts, overview and gates on one small store, written once."""

import io
import itertools
import json
import shutil
from dataclasses import replace
from datetime import datetime, timedelta
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from matplotlib.image import imread
from pyproj import CRS

import stsr_core.store.layout as layout_module
import stsr_core.store.overview as overview_module
import stsr_core.store.verify as verify_module
from stsr_core.catalog.integrity import _closure as closure_of_version
from stsr_core.configuration import Gates, LikeCard
from stsr_core.ensemble.sums import sums
from stsr_core.errors import GateError, StoreError
from stsr_core.factors import Factor
from stsr_core.grids import Axis, Grid, TimeAxis
from stsr_core.sources.declared import Declared
from stsr_core.sources.harmonise import read_cubes
from stsr_core.store.coarse import write_coarse
from stsr_core.store.group import filesystem, finish, is_whole, remove_store
from stsr_core.store.layout import MISSING, QUANTUM_MM, StoreLayout, create_ensemble, shard_path, write_shard
from stsr_core.store.overview import coarser_grid, write_overview
from stsr_core.store.pictures import summary, thumbnail
from stsr_core.store.receipts import Receipt, read_receipts, write_receipt
from stsr_core.store.series import write_series
from stsr_core.store.statistics import STATISTICS, statistics
from stsr_core.store.verify import Expected, Stored, verify

FACTOR = Factor(space=2, time=1)
LAYOUT = StoreLayout(
    members=3,
    times=TimeAxis(datetime(2001, 1, 1), timedelta(hours=1), 4),
    grid=Grid(Axis(5500.0, -1000.0, 6), Axis(500.0, 1000.0, 8)),
    member_block=4,
    time_block=2,
    tile=(4, 4),
    attributes={"title": "test"},
)
REGIONS = [
    (slice(0, 3), slice(t, t + 2), slice(y, min(6, y + 4)), slice(x, x + 4))
    for t in (0, 2)
    for y in (0, 4)
    for x in (0, 4)
]


def key_of(region):
    return f"m0-t{region[1].start // 2}-y{region[2].start // 4}-x{region[3].start // 4}"


def sums_of(quanta):
    amount = np.where(quanta == MISSING, np.nan, quanta * 0.01).astype(np.float32)
    return sums([torch.from_numpy(amount)], FACTOR)


@pytest.fixture
def quanta():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 500, LAYOUT.shape).astype(np.uint16)
    values[:, 1, 2:4, 2:4] = MISSING
    # Every member must have the same coarse totals.
    blocks = values.reshape(3, 4, 3, 2, 4, 2)
    blocks[1:] = blocks[0]
    blocks[1] = blocks[1][:, :, ::-1]
    return values


@pytest.fixture
def coarse(quanta):
    totals = quanta[0].reshape(4, 3, 2, 4, 2).mean(axis=(2, 4)) * 0.01
    totals[1, 1, 1] = np.nan
    return totals.astype(np.float32)


@pytest.fixture
def store(tmp_path, quanta):
    url = str(tmp_path / "e.zarr")
    create_ensemble(url, LAYOUT, array="precipitation")
    for region in REGIONS:
        part = quanta[region]
        digest = write_shard(url, "precipitation", region, part)
        receipt = Receipt(
            shard=key_of(region), plan_digest="p" + key_of(region), bytes_digest=digest, closure_quanta=0,
            network_evaluations=1, wet=10, missing=int((part == MISSING).sum()), sum_mm=1.0, max_mm=5.0,
            rain_mm=1.0, spread_mm=0.5, sums=sums_of(part),
        )  # fmt: skip
        write_receipt(url, "precipitation", receipt)
    return url


def report_of(store, coarse, gates=None, regions=REGIONS, members=3):
    expected = [Expected(key_of(r), r, "p" + key_of(r)) for r in regions]
    stored = Stored(store, "precipitation", FACTOR, [coarse], members, conserved=True)
    return verify(stored, expected, read_receipts(store, "precipitation"), gates or Gates())


def failed(report):
    return {gate.name: gate for gate in report.gates if not gate.passed}


def test_a_store_opens_only_when_it_is_finished(store, quanta):
    assert not is_whole(store)
    with pytest.raises(FileNotFoundError):
        xr.open_zarr(store, consolidated=False)
    finish(store, LAYOUT.attributes)
    assert is_whole(store)
    data = xr.open_zarr(store)
    np.testing.assert_allclose(
        data["precipitation"].values, np.where(quanta == MISSING, np.nan, quanta * 0.01), atol=1e-5
    )
    assert data["time"].values[0] == np.datetime64("2001-01-01T01:00")
    assert data["time_bnds"].values[0, 0] == np.datetime64("2001-01-01T00:00")
    assert data.attrs["title"] == "test"
    assert "consolidated_metadata" in json.loads(Path(store, "zarr.json").read_text())


ROTATED = "+proj=ob_tran +o_proj=longlat +o_lat_p=39.25 +lon_0=18 +o_lon_p=0"


@pytest.mark.parametrize(
    ("crs", "step", "names", "units"),
    [
        ("EPSG:2154", 1000.0, "projection_{}_coordinate", ("m", "m")),
        ("+proj=laea +lat_0=52 +lon_0=10 +units=km", 1.0, "projection_{}_coordinate", ("km", "km")),
        ("+proj=laea +lat_0=52 +units=km +towgs84=1,2,3", 1.0, "projection_{}_coordinate", ("km", "km")),
        ("EPSG:2263", 3280.0, "projection_{}_coordinate", ("US_survey_foot", "US_survey_foot")),
        ("EPSG:2222", 3280.0, "projection_{}_coordinate", ("foot", "foot")),
        ("+proj=laea +units=kmi", 0.5, "projection_{}_coordinate", ("1852 m", "1852 m")),
        ("EPSG:4326", 0.01, "{}", ("degrees_north", "degrees_east")),
        (ROTATED, 0.01, "grid_{}", ("degrees", "degrees")),
        (f"{ROTATED} +towgs84=1,2,3", 0.01, "grid_{}", ("degrees", "degrees")),
    ],
)
def test_axes_are_named_for_their_crs_and_read_back_where_they_are(tmp_path, crs, step, names, units):
    grid = Grid(Axis(20 * step, -step, 6), Axis(30 * step, step, 8), CRS.from_user_input(crs).to_wkt())
    url = str(tmp_path / "e.zarr")
    create_ensemble(url, replace(LAYOUT, members=1, member_block=1, grid=grid), array="precipitation")
    zarr.open_array(f"{url}/precipitation")[:] = 1
    finish(url, {})
    with xr.open_zarr(url) as data:
        axes = ("y", "x") if "projection" in names else ("latitude", "longitude")
        assert [data[a].attrs["standard_name"] for a in ("y", "x")] == [names.format(a) for a in axes]
        assert tuple(data[a].attrs["units"] for a in ("y", "x")) == units
        (cube,) = read_cubes(data, "precipitation", Declared())
    for found, wanted in zip((cube.grid.y, cube.grid.x), (grid.y, grid.x), strict=True):
        np.testing.assert_allclose(found.edges, wanted.edges, rtol=1e-9)
    assert CRS.from_wkt(cube.grid.crs_wkt).equals(CRS.from_wkt(grid.crs_wkt))


@pytest.mark.parametrize(
    "region",
    [
        (slice(0, 3), slice(1, 3), slice(0, 4), slice(0, 4)),
        (slice(0, 3), slice(0, 2), slice(0, 4), slice(0, 3)),
        (slice(0, 2), slice(0, 2), slice(0, 4), slice(0, 4)),
    ],
)
def test_a_region_that_is_not_one_shard_is_refused(store, region):
    values = np.zeros([r.stop - r.start for r in region], np.uint16)
    with pytest.raises(StoreError, match="is not one shard"):
        write_shard(store, "precipitation", region, values)


def test_values_of_another_shape_are_refused(store):
    with pytest.raises(StoreError, match="do not fill region"):
        write_shard(store, "precipitation", REGIONS[0], np.zeros((1, 2, 4, 4), np.uint16))


def test_a_sound_store_passes_every_gate(store, coarse):
    report = report_of(store, coarse)
    assert report.passed, report
    assert {g.name for g in report.gates} == {
        "receipts", "stored bytes", "closure", "missing cells", "plausible range", "spread", "wet fraction",
        "card: spread over skill", "card: wet fraction over truth", *(f"like card: {name}" for name in STATISTICS),
    }  # fmt: skip
    report.raise_if_failed()


def shard_file(store, region):
    return f"{store}/precipitation/c/0/{region[1].start // 2}/{region[2].start // 4}/{region[3].start // 4}"


@pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
def test_a_damaged_shard_is_found_and_named(store, coarse, damage, tmp_path):
    path = Path(shard_file(store, REGIONS[5]))
    raw = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(raw[:-9] if damage == "truncated" else bytes([raw[0] ^ 1]) + raw[1:])
    report = report_of(store, coarse)
    assert failed(report)["stored bytes"].where == key_of(REGIONS[5])
    with pytest.raises(GateError, match="stored bytes: found 1 damaged.*m0-t1-y0-x1.*kept for inspection"):
        report.raise_if_failed()


def test_a_missing_receipt_is_found_and_named(store, coarse):
    Path(f"{store}/precipitation/receipts/{key_of(REGIONS[2])}.json").unlink()
    gate = failed(report_of(store, coarse))["receipts"]
    assert gate.found == "7 valid receipts"
    assert gate.where == key_of(REGIONS[2])


def test_a_receipt_of_another_plan_does_not_count(store, coarse):
    expected = [Expected(key_of(r), r, "other") for r in REGIONS]
    stored = Stored(store, "precipitation", FACTOR, [coarse], 3, conserved=True)
    assert "receipts" in failed(verify(stored, expected, read_receipts(store, "precipitation"), Gates()))


def test_closure_is_recomputed_from_the_stored_bytes(store, coarse):
    wrong = coarse.copy()
    wrong[3, 2, 3] += 0.01
    gate = failed(report_of(store, wrong))["closure"]
    assert gate.found == "4 quanta"
    assert gate.where == "m0-t1-y1-x1"


def test_missing_cells_must_be_those_of_the_input(store, coarse):
    filled = np.nan_to_num(coarse)
    assert "missing cells" in failed(report_of(store, filled))
    holed = coarse.copy()
    holed[0, 0, 0] = np.nan
    assert failed(report_of(store, holed))["missing cells"].where == "m0-t0-y0-x0"


def test_receipts_are_found_where_the_path_of_a_store_looks_like_a_pattern(tmp_path, store):
    receipts = read_receipts(store, "precipitation")
    for name in ("run [1]", "all*", "which?"):
        assert read_receipts(f"{tmp_path}/{name}", "precipitation") == {}
        for receipt in receipts.values():
            write_receipt(f"{tmp_path}/{name}", "precipitation", receipt)
        assert read_receipts(f"{tmp_path}/{name}", "precipitation") == receipts


def test_a_receipt_asks_nothing_of_an_object_store_but_to_keep_it(store, monkeypatch):
    receipt = read_receipts(store, "precipitation")[key_of(REGIONS[0])]
    monkeypatch.setattr(MemoryFileSystem, "makedirs", Mock(side_effect=AssertionError))  # which may create a bucket
    write_receipt("memory://receipts/e.zarr", "precipitation", receipt)
    assert read_receipts("memory://receipts/e.zarr", "precipitation") == {receipt.shard: receipt}


def test_receipts_vouch_for_shards_that_are_not_read_back(store, coarse, monkeypatch):
    monkeypatch.setattr(verify_module, "SAMPLE", 1)
    for region, change in ((REGIONS[5], {"closure_quanta": 3}), (REGIONS[6], {"missing": 12})):
        receipt = read_receipts(store, "precipitation")[key_of(region)]
        write_receipt(store, "precipitation", receipt.model_copy(update=change))
    gates = failed(report_of(store, coarse))
    assert (gates["closure"].found, gates["closure"].where) == ("3 quanta", key_of(REGIONS[5]))
    assert gates["missing cells"].where == key_of(REGIONS[6])


def test_range_and_spread_have_bounds(store, coarse):
    assert "plausible range" in failed(report_of(store, coarse, Gates(max_mm=4.0)))
    assert "spread" in failed(report_of(store, coarse, Gates(min_relative_spread=0.6)))
    assert "spread" not in failed(report_of(store, coarse, Gates(min_relative_spread=0.6), members=1))


def test_statistics_must_be_in_line_with_rain_and_card(store, coarse):
    # 8 shards say 10 wet cells each; 48 of the 48 coarse cells but one are wetter than 0.1 mm, of 4 cells and 3 members
    wet = failed(report_of(store, coarse, Gates(min_wet_fraction=0.2)))["wet fraction"]
    assert wet.found == f"{80 / (int((coarse > 0.1).sum()) * 12):.2f} of the cells where it rains"
    expected = [Expected(key_of(r), r, "p" + key_of(r)) for r in REGIONS]
    for skill in (0.4, 1.6):
        scores = {"spread_skill": skill, "wet_fraction_ratio": 1.74}
        stored = Stored(store, "precipitation", FACTOR, [coarse], 3, conserved=True, scores=scores)
        report = verify(stored, expected, read_receipts(store, "precipitation"), Gates())
        assert {name: (g.found, g.needed) for name, g in failed(report).items()} == {
            "card: spread over skill": (f"{skill:.2f}", "0.5 to 1.5")
        }


@pytest.mark.parametrize(("amount", "found"), [(0.15, "no rain"), (0.25, "0.00 of the cells where it rains")])
def test_cells_are_wet_above_a_tenth_of_a_millimetre_in_each_fine_step(amount, found):
    stored = Stored("", "", Factor(space=1, time=2), [np.full((1, 1, 1), amount, np.float32)], 1, conserved=True)
    assert verify_module._wet_fraction(stored, [], Gates()).found == found


def like_card(store, coarse, card, gates=None):
    """Results of the gates against the statistics of a card, by statistic."""
    expected = [Expected(key_of(r), r, "p" + key_of(r)) for r in REGIONS]
    stored = Stored(store, "precipitation", FACTOR, [coarse], 3, conserved=True, statistics=card)
    gates = verify(stored, expected, read_receipts(store, "precipitation"), gates or Gates()).gates
    return {g.name.removeprefix("like card: "): g for g in gates if g.name.startswith("like card: ")}


def test_statistics_must_be_like_those_of_the_card(store, coarse, quanta, monkeypatch):
    whole = statistics(sums_of(quanta))
    monkeypatch.setattr(verify_module, "JUDGED", 40)  # there are 47 wet coarse cells and steps
    assert all(gate.passed for gate in like_card(store, coarse, whole).values())
    for times in (0.7, 1.4):
        other = {**whole, "members": whole["members"] / times}
        results = like_card(store, coarse, other)
        assert [name for name, gate in results.items() if not gate.passed] == ["members"]
    assert results["members"].found.endswith(f", on the card {other['members']:.3f}")
    assert results["members"].needed == "0.75 to 1.35 times the card's"
    wider = Gates(like_card=LikeCard(members=(0.5, 1.5)))
    assert like_card(store, coarse, other, wider)["members"].passed


def test_a_card_without_statistics_and_an_ensemble_with_little_rain_are_not_judged_and_say_so(store, coarse):
    assert {g.found for g in like_card(store, coarse, {}).values()} == {"not judged: not on the card"}
    little = like_card(store, coarse, dict.fromkeys(STATISTICS, 99.0))
    assert all(g.passed and g.found.startswith("not judged: fewer than 50 wet coarse cells") for g in little.values())


def test_a_receipt_cut_short_counts_as_absent(store):
    harmed = key_of(REGIONS[2])
    whole = read_receipts(store, "precipitation")
    Path(f"{store}/precipitation/receipts/{harmed}.json").write_text("{")
    assert read_receipts(store, "precipitation") == {key: r for key, r in whole.items() if key != harmed}


def test_the_overview_is_the_statistics_over_members(store, quanta, tmp_path):
    finish(store, {})
    write_overview(store, "precipitation", str(tmp_path / "o.zarr"), LAYOUT)
    data = xr.open_zarr(tmp_path / "o.zarr")
    amount = xr.open_zarr(store)["precipitation"]
    np.testing.assert_allclose(data["mean"], amount.mean("member", skipna=False), rtol=1e-5)
    expected = amount.quantile([0.1, 0.5, 0.9], "member", skipna=False)
    np.testing.assert_allclose(data["quantile_amount"], expected, rtol=1e-5)
    for threshold in (1.0, 5.0, 10.0):
        over = (amount > threshold).mean("member").where(amount[0].notnull())
        np.testing.assert_allclose(data["exceedance_probability"].sel(threshold=threshold), over, rtol=1e-6)


@pytest.mark.parametrize("copied", [write_series, write_overview])
def test_an_ensemble_whose_metadata_are_damaged_is_an_error_that_says_so(store, tmp_path, copied):
    Path(store, "precipitation", "zarr.json").write_text("{")
    with pytest.raises(StoreError, match=r"precipitation/zarr.json is damaged"):
        copied(store, "precipitation", str(tmp_path / "copy"), LAYOUT)


def test_an_amount_at_a_threshold_does_not_exceed_it():
    quanta = np.array([100, 101], np.uint16).reshape(2, 1, 1, 1)  # of 0.01 mm
    assert overview_module.over_members(quanta)["exceedance"].ravel().tolist() == [0.5, 0.0, 0.0]


def test_what_a_killed_writer_began_is_no_part_of_a_finished_store(store):
    began = Path(shard_file(store, REGIONS[5])).with_suffix(".0a.partial")
    began.write_bytes(b"half")
    finish(store, {})
    assert not began.exists()


def test_the_map_holds_the_total_and_the_largest_step_of_the_mean(tmp_path):
    nan = np.nan
    mean = np.array([[[1, 3, nan]], [[4, nan, nan]], [[2, 1, nan]]], np.float32)
    zarr.create_array(str(tmp_path / "mean"), data=mean, chunks=(2, 1, 3))
    np.testing.assert_array_equal(summary(str(tmp_path)), [[[7, 4, nan]], [[4, 3, nan]]])


@pytest.mark.parametrize("step", [1000.0, -1000.0])
def test_north_is_at_the_top_of_a_thumbnail(step):
    total = np.zeros((4, 4), np.float32)
    total[-1 if step > 0 else 0] = 500.0
    axis = Axis(0.0, step, 4)
    pixels = imread(io.BytesIO(thumbnail(total, Grid(axis, axis))))[..., :3]
    assert (pixels[1:] == 1).all()
    assert (pixels[0] != 1).any()


def test_the_overview_has_levels_for_maps(store, tmp_path, monkeypatch):
    finish(store, {})
    monkeypatch.setattr(overview_module, "LEVEL_CELLS", 2)
    url = str(tmp_path / "o.zarr")
    write_overview(store, "precipitation", url, LAYOUT)
    base = xr.open_zarr(url)
    assert base.attrs["levels"] == "1 2"
    width = float(base["x"][1] - base["x"][0])
    for level in base.attrs["levels"].split():
        data, parts = xr.open_zarr(f"{url}/{level}"), 2 ** int(level)  # consolidated: opens over plain http
        # Of all cells of the finest that are there: means of means would count those at a border or a hole for more.
        expected = base.coarsen(y=parts, x=parts, boundary="pad").mean()
        for name in ("mean", "quantile_amount", "exceedance_probability"):
            np.testing.assert_allclose(data[name], expected[name], rtol=1e-6)
        assert float(data["x"][1] - data["x"][0]) == parts * width
        assert float(data["x"][0]) == float(base["x"][0]) + (parts - 1) * width / 2
    assert data["mean"].shape == (4, 2, 2)


def test_levels_are_made_of_a_chunk_of_one_map_at_a_time(store, tmp_path, monkeypatch):
    finish(store, {})
    monkeypatch.setattr(overview_module, "LEVEL_CELLS", 2)
    write_overview(store, "precipitation", str(tmp_path / "o.zarr"), LAYOUT)
    read, averaged = [], overview_module.averaged

    def watched(fields, parts):
        read.append(fields.shape)
        return averaged(fields, parts)

    monkeypatch.setattr(overview_module, "averaged", watched)
    monkeypatch.setattr(overview_module, "MAP_CELLS", 4)
    write_overview(store, "precipitation", str(tmp_path / "p.zarr"), LAYOUT)
    assert {max(shape[-2:]) for shape in read} == {4}
    for level in ("1", "2"):
        one, other = (xr.open_zarr(tmp_path / name / level).load() for name in ("o.zarr", "p.zarr"))
        xr.testing.assert_equal(one, other)


def test_a_grid_without_divisors_has_chunks_of_many_cells(tmp_path):
    grid = Grid(Axis(130.5, -1.0, 131), Axis(0.5, 1.0, 257))
    layout = replace(LAYOUT, grid=grid, tile=grid.shape)
    assert layout.chunk[2:] == (66, 86)
    url, quanta = str(tmp_path / "p.zarr"), np.zeros(layout.shape, np.uint16)
    quanta[..., -1] = 7
    create_ensemble(url, layout, array="precipitation")
    for t in (0, 2):
        region = (slice(0, 3), slice(t, t + 2), slice(0, 131), slice(0, 257))
        write_shard(url, "precipitation", region, quanta[region])
    np.testing.assert_array_equal(zarr.open_array(f"{url}/precipitation", mode="r")[:], quanta)
    assert replace(LAYOUT, grid=Grid(Axis(0.5, 1.0, 900), Axis(0.5, 1.0, 250)), tile=(500, 250)).shard[2:] == (500, 250)


def test_a_shard_that_is_there_stays_until_its_successor_is(store, quanta, monkeypatch):
    region = REGIONS[2]  # at the edge of the grid
    address = shard_path(store, "precipitation", LAYOUT.shard, region)
    before = Path(address).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", Mock(side_effect=AssertionError))
        patch.setattr(LocalFileSystem, "rm", Mock(side_effect=AssertionError))
        write_shard(store, "precipitation", region, quanta[region])
    assert Path(address).read_bytes() == before
    Path(address).write_bytes(before[: len(before) // 2])
    write_shard(store, "precipitation", region, quanta[region])
    assert Path(address).read_bytes() == before


def test_a_full_disk_is_told_when_a_store_is_finished(store, monkeypatch):
    monkeypatch.setattr(zarr, "consolidate_metadata", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(StoreError, match=r"cannot be finished .*No space left.* Check free space"):
        finish(store, {})
    assert not is_whole(store)


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def test_remove_store_refuses_what_is_no_store(tmp_path, store):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a").write_text("keep me")
    xr.Dataset({"a": ("time", [1.0])}).to_zarr(tmp_path / "other.zarr", zarr_format=3, consolidated=False)
    for name in ("letters", "other.zarr"):
        before = files_of(tmp_path / name)
        with pytest.raises(StoreError, match="no Zarr store that stsr wrote"):
            remove_store(str(tmp_path / name))
        assert files_of(tmp_path / name) == before
    remove_store(store)
    assert not (tmp_path / "e.zarr").exists()
    remove_store(store)


def test_a_removal_cut_short_can_be_done_again(store, monkeypatch):
    finish(store, {})
    removed = LocalFileSystem.rm
    for left in range(1, 4):
        calls = itertools.count()

        def killed(fs, path, calls=calls, left=left, **how):
            if next(calls) == left:
                raise KeyboardInterrupt
            removed(fs, path, **how)

        monkeypatch.setattr(LocalFileSystem, "rm", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_store(store)
        assert f"{store}/stsr.json" in map(str, Path(store).iterdir())
    monkeypatch.undo()
    remove_store(store)
    assert not Path(store).exists()


def test_an_ensemble_goes_on_after_a_kill_at_any_moment(tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    create_ensemble(str(whole), LAYOUT, array="precipitation")
    (tmp_path / "0").mkdir()  # killed before the mark was written, or while it was
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "stsr.json").touch()
    written = LocalFileSystem.pipe_file
    objects = len(files_of(whole)) - 1  # but the metadata of the array, the last of all
    for kill in range(objects):
        calls = itertools.count()

        def killed(fs, path, value, *args, calls=calls, kill=kill, **kwargs):
            if next(calls) == kill:
                written(fs, path, value[:3])
                raise RuntimeError("killed")
            written(fs, path, value, *args, **kwargs)

        monkeypatch.setattr(LocalFileSystem, "pipe_file", killed)
        with pytest.raises(RuntimeError, match="killed"):
            create_ensemble(str(tmp_path / f"{kill + 2}"), LAYOUT, array="precipitation")
    monkeypatch.undo()
    for kill in range(objects + 2):
        create_ensemble(str(tmp_path / f"{kill}"), LAYOUT, array="precipitation")
        assert files_of(tmp_path / f"{kill}") == files_of(whole)


def begin_at_once(url, barrier, errors):
    for number in range(10):
        barrier.wait()
        try:
            create_ensemble(f"{url}/{number}.zarr", LAYOUT, array="precipitation")
        except Exception as e:
            errors.put(repr(e))
    errors.put(None)


def test_two_that_begin_the_same_ensemble_at_once_do_not_meet(tmp_path):
    context = get_context("spawn")
    barrier, errors = context.Barrier(2), context.Queue()
    both = [context.Process(target=begin_at_once, args=(str(tmp_path), barrier, errors)) for _ in range(2)]
    for process in both:
        process.start()
    assert [errors.get(timeout=60) for _ in both] == [None, None]
    for process in both:
        process.join()
    create_ensemble(str(tmp_path / "alone"), LAYOUT, array="precipitation")
    for number in range(10):
        assert files_of(tmp_path / f"{number}.zarr") == files_of(tmp_path / "alone")


def test_an_ensemble_that_another_command_just_began_is_left_alone(tmp_path, monkeypatch):
    create_ensemble(str(tmp_path), replace(LAYOUT, members=8), array="precipitation")
    before = files_of(tmp_path)["precipitation/zarr.json"]
    monkeypatch.setattr(layout_module, "_begun", Mock(return_value=None))  # it looked before the other wrote
    with pytest.raises(StoreError, match="Another command has just begun another ensemble at .*Name another output"):
        create_ensemble(str(tmp_path), LAYOUT, array="precipitation")
    assert files_of(tmp_path)["precipitation/zarr.json"] == before


def test_an_object_store_is_held_to_the_same():
    fs = filesystem("memory://place")[0]
    fs.pipe_file("/place/time/c/0", b"keep me")
    with pytest.raises(StoreError, match="memory://place is there and no Zarr store that stsr wrote.*another output"):
        create_ensemble("memory://place", LAYOUT, array="precipitation")
    assert fs.find("/place") == ["/place/time/c/0"]
    for _ in range(2):
        create_ensemble("memory://place/e.zarr", LAYOUT, array="precipitation")
    remove_store("memory://place/e.zarr")
    assert fs.find("/place") == ["/place/time/c/0"]
    fs.rm("/place", recursive=True)


def test_members_conserve_the_totals_of_their_own_driving_member(tmp_path):
    url, layout = str(tmp_path / "data.zarr"), replace(LAYOUT, members=4, member_block=2, driving=("a", "a", "b", "b"))
    region = [slice(0, n) for n in (4, 4, 6, 8)]
    create_ensemble(f"{url}/ensemble", layout, array="precipitation")
    amounts = [np.full((4, 3, 4), mm, np.float32) for mm in (1.0, 2.0)]
    for first, mm in ((0, 1.0), (2, 2.0)):
        for t, y, x in itertools.product((0, 2), (0, 4), (0, 4)):
            part = slice(first, first + 2), slice(t, t + 2), slice(y, min(6, y + 4)), slice(x, x + 4)
            values = np.full([p.stop - p.start for p in part], round(mm / QUANTUM_MM), np.uint16)
            write_shard(f"{url}/ensemble", "precipitation", part, values)
    finish(f"{url}/ensemble", layout.attributes)
    for labels, worst in ((("a", "b"), 0), (("b", "a"), 400)):
        write_coarse(f"{url}/coarse", amounts, layout.times, coarser_grid(layout.grid, 2), {}, driving=labels)
        assert closure_of_version(str(tmp_path), None, conserved=True)[0] == worst
        with xr.open_zarr(f"{url}/coarse") as totals:
            assert totals["precipitation"].dims == ("driving", "time", "y", "x")
            assert totals["driving_member"].values.tolist() == list(labels)
        shutil.rmtree(f"{url}/coarse")
    write_coarse(f"{url}/coarse", amounts[:1], layout.times, coarser_grid(layout.grid, 2), {}, driving=("a",))
    with pytest.raises(StoreError, match="members .* are of driving members a, b; there are coarse totals of a"):
        closure_of_version(str(tmp_path), None, conserved=True)
    write_series(f"{url}/ensemble", "precipitation", f"{url}/series", layout)
    with xr.open_zarr(f"{url}/series") as series:
        assert series["driving_member"].values.tolist() == ["a", "a", "b", "b"]
        assert series["precipitation"].values[tuple(region)].mean(axis=(1, 2, 3)).tolist() == [1.0, 1.0, 2.0, 2.0]


def test_a_store_whose_name_is_a_pattern_is_not_removed_from_an_object_store():
    for name in ("out1.zarr", "out[1].zarr"):
        create_ensemble(f"memory://patterns/{name}", LAYOUT, array="precipitation")
    with pytest.raises(StoreError, match="other stores may fit that"):
        remove_store("memory://patterns/out[1].zarr")
    remove_store("memory://patterns/out1.zarr")
    assert [name.rsplit("/", 1)[-1] for name in filesystem("memory://")[0].ls("/patterns", detail=False)] == [
        "out[1].zarr"
    ]
