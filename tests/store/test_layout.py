"""Axes, chunks and shards of an ensemble, also where its writer is killed or not alone."""

import itertools
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import xarray as xr
import zarr
from fsspec.implementations.local import LocalFileSystem
from pyproj import CRS

import stsr_core.store.layout as layout_module
from stsr_core.errors import StoreError
from stsr_core.grids import Axis, Grid
from stsr_core.sources.declared import Declared
from stsr_core.sources.harmonise import read_cubes
from stsr_core.store.group import finish
from stsr_core.store.layout import create_ensemble, shard_path, write_shard
from tests.store.made import LAYOUT, REGIONS, files_of

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


def test_an_ensemble_goes_on_after_a_kill_at_any_moment(tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    create_ensemble(str(whole), LAYOUT, array="precipitation")
    (tmp_path / "0").mkdir()  # killed before the mark was written, or while it was
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "stsr.json").touch()
    written = Path.write_bytes
    objects = len(files_of(whole)) - 2  # but the mark, and the metadata of the array, the last of all
    for kill in range(objects):
        calls = itertools.count()

        def killed(path, value, calls=calls, kill=kill):
            written(path, value if (alive := next(calls) != kill) else value[:3])
            if not alive:
                raise RuntimeError("killed")

        monkeypatch.setattr(Path, "write_bytes", killed)
        with pytest.raises(RuntimeError, match="killed"):
            create_ensemble(str(tmp_path / f"{kill + 2}"), LAYOUT, array="precipitation")
    monkeypatch.undo()
    for kill in range(objects + 2):
        create_ensemble(str(tmp_path / f"{kill}"), LAYOUT, array="precipitation")
        left = {name: content for name, content in files_of(tmp_path / f"{kill}").items() if "partial" not in name}
        assert left == files_of(whole)  # what is left of an object goes when the group is finished


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
