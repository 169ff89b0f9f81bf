from dataclasses import replace
from pathlib import Path

import numpy as np
import pyproj
import pytest
import xarray as xr
import yaml

import stsr_core
from stsr_core.checkpoint import Checkpoint, Library
from stsr_core.configuration import shipped_catalog
from stsr_core.ensemble.downscale import prepared
from stsr_core.errors import ConfigurationError, SourceError
from stsr_core.factors import Factor, recipe
from stsr_core.grids import Axis, Grid
from stsr_core.sources.declared import Declared
from stsr_core.statics import StaticSource, named_sources
from stsr_core.training import command
from stsr_core.training.patches import Region, draw_patch, region_of
from stsr_core.training.presets import PRESETS
from tests.reading import cube_of
from tests.tiny import TINY, small_patches

FACTOR = Factor(space=4, time=1)
CRS = "EPSG:3035"


def projected(values: np.ndarray, spacing: float, **attributes: str) -> xr.DataArray:
    """An array (..., y, x) on axes that start at 0 m in the south-west."""
    ny, nx = values.shape[-2:]
    axes = {
        name: (name, spacing * (np.arange(n) + 0.5), {"units": "m", "standard_name": f"projection_{name}_coordinate"})
        for name, n in (("y", ny), ("x", nx))
    }
    dims = ("time", "y", "x")[-values.ndim :]
    times = {"time": np.datetime64("2018-01-01T01", "ns") + np.arange(len(values)) * np.timedelta64(1, "h")}
    return xr.DataArray(values, dims=dims, coords=axes | (times if values.ndim == 3 else {}), attrs=attributes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An archive, two orographies that differ in the north, and coarse input."""
    folder = tmp_path_factory.mktemp("statics")
    rng = np.random.default_rng(0)
    rain = np.where(rng.random((30, 200, 200)) > 0.7, rng.gamma(1.0, 3.0, (30, 200, 200)), 0.0).astype(np.float32)
    for name, days in (("rain", 0), ("other", 2)):
        (folder / name).mkdir()
        fine = projected(rain, 1000.0, units="mm").to_dataset(name="precipitation")
        fine["time"] = fine["time"] + np.timedelta64(days, "D")
        fine.to_netcdf(folder / name / "a.nc")
    height = rng.random((100, 100)).repeat(4, 0).repeat(4, 1) * 900.0
    projected(height, 500.0, units="m").to_dataset(name="orography").to_netcdf(folder / "orography.nc")
    height[360:] += 1000.0
    projected(height, 500.0, units="m").to_dataset(name="orography").to_netcdf(folder / "raised.nc")
    return folder


def source(folder: Path, name: str = "orography.nc", variable: str = "orography") -> StaticSource:
    return StaticSource(str(folder / name), variable, CRS)


@pytest.fixture(scope="module")
def checkpoints(folder) -> Path:
    """A checkpoint that was trained with orography."""
    data = command.Data(
        [str(folder / "rain")],
        [str(folder / "other")],
        declared=Declared(crs=CRS),
        statics={"orography": source(folder)},
    )
    with pytest.MonkeyPatch.context() as patch, small_patches():
        patch.setitem(PRESETS, "small", TINY)  # type: ignore[arg-type]
        command.train_checkpoint(
            data, [Factor(space=4, time=1)], folder=folder / "run", name="o", device="cpu", seed=0,
            sizes={"mean_steps": 4, "denoiser_steps": 3, "distil_steps": 1, "score_steps": 1, "cells_per_step": 4000},
            report=lambda _: None,
        )  # fmt: skip
    return folder / "run" / "checkpoint"


def coarse() -> xr.DataArray:
    rain = np.random.default_rng(1).gamma(1.0, 3.0, (6, 50, 50)).astype(np.float32)
    return projected(rain, 4000.0, units="mm")


def plan_with(folder: Path, checkpoints: Path, name: str):
    cube = cube_of(coarse(), Declared(time_label="end", crs=CRS))
    return prepared(
        (cube,), space=4, time=1, members=1, seed=1, nearest=False, conserve=True, device="cpu",
        checkpoints=str(checkpoints), statics={"orography": source(folder, name)},
    )[0]  # fmt: skip


def test_the_card_says_how_much_a_step_learnt_from(checkpoints):
    assert Checkpoint.read(checkpoints / "o.json").card.training["cells_per_step"] == 4000


def test_a_field_is_averaged_over_the_cells_of_a_grid(folder):
    grid = Grid(Axis(199_500.0, -1000.0, 200), Axis(500.0, 1000.0, 200), None)
    found = source(folder).read(replace(grid, crs_wkt=projected_wkt()))
    with xr.open_dataset(folder / "orography.nc") as opened:
        expected = opened["orography"].values.reshape(200, 2, 200, 2).mean(axis=(1, 3))[::-1]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_column_that_closes_a_circle_is_left_out(folder, tmp_path):
    """Of a global orography from 0 to 360 degrees, under a grid that lies on Greenwich."""
    lon, lat = np.arange(0.0, 361.0), np.arange(40.0, 61.0)
    height = np.cos(np.deg2rad(lon))[None] * lat[:, None]
    axes = {"lat": ("lat", lat, {"units": "degrees_north"}), "lon": ("lon", lon, {"units": "degrees_east"})}
    grid = Grid(Axis(300e3, -20e3, 8), Axis(450e3, 20e3, 9), pyproj.CRS.from_epsg(27700).to_wkt())
    found = []
    for name, columns in (("closed", 361), ("open", 360)):
        orography = xr.DataArray(height, axes, ("lat", "lon"), attrs={"units": "m"}).isel(lon=slice(0, columns))
        orography.to_dataset(name="orography").to_netcdf(tmp_path / f"{name}.nc")
        found.append(StaticSource(str(tmp_path / f"{name}.nc"), "orography").read(grid))
    np.testing.assert_array_equal(*found)


def projected_wkt() -> str:
    return pyproj.CRS.from_user_input(CRS).to_wkt()


def test_a_field_on_a_server_is_asked_for_again(folder, cuts):
    with xr.open_dataset(folder / "orography.nc") as dataset:
        dataset.drop_encoding().to_zarr("memory://cuts/z.zarr", zarr_format=3, mode="w", consolidated=False)
    cuts.update({"orography/c": 1})
    grid = Grid(Axis(150_000.0, -4000.0, 20), Axis(50_000.0, 4000.0, 20), pyproj.CRS(CRS).to_wkt())
    found = StaticSource("memory://cuts/z.zarr", "orography", CRS).read(grid)
    np.testing.assert_array_equal(found, source(folder).read(grid))
    assert cuts == {"orography/c": 0}


def test_the_card_says_what_the_networks_see(checkpoints):
    (static,) = Library.open(checkpoints).checkpoints[0].card.statics
    assert (static.name, static.units) == ("orography", "m")
    assert static.offset == pytest.approx(450, rel=0.05)
    assert static.scale == pytest.approx(260, rel=0.05)


def test_only_shards_whose_windows_see_a_change_have_another_digest(folder, checkpoints):
    one, other = (plan_with(folder, checkpoints, name) for name in ("orography.nc", "raised.nc"))
    assert one.statics is not None and one.statics.shape == (1, 200, 200)
    assert [t.digest for t in one.tasks()] != [t.digest for t in other.tasks()]
    lower = replace(one, statics=np.where(np.arange(200)[:, None] < 100, one.statics, 0).astype(np.float32))
    task = lower.task(lower.shards[0])
    assert task.statics is not None
    np.testing.assert_array_equal(task.statics[:, :100], one.task(one.shards[0]).statics[:, :100])


def test_an_ensemble_follows_the_orography(folder, checkpoints):
    def made(name: str) -> np.ndarray:
        field = coarse()
        field.attrs["grid_mapping"] = "spatial_ref"
        field = field.assign_coords(spatial_ref=((), 0, {"crs_wkt": projected_wkt()}))
        out = stsr_core.downscale(
            field, space=4, time=1, members=1, seed=3, checkpoints=str(checkpoints), time_label="end",
            statics={"orography": source(folder, name)},
        )  # fmt: skip
        return out.values

    low, high = made("orography.nc"), made("raised.nc")
    changed = (low != high).any(axis=(0, 1, 3))
    # Rows run north to south or south to north as the input has them: south first here, the north was raised.
    assert changed[-20:].any()
    assert not changed[:100].any()


def test_flips_keep_rain_and_orography_together():
    place = np.arange(200, dtype=np.float32)[:, None] * 200 + np.arange(200, dtype=np.float32)
    rain = np.broadcast_to(1.0 + place / 200, (24, 200, 200)).astype(np.float32)
    region = replace(region_of("r", rain), statics=place[None])
    assert isinstance(region, Region)
    for seed in range(20):
        patch = draw_patch([region], recipe(FACTOR), np.random.default_rng(seed))
        order = np.argsort(patch.statics[0].ravel())
        amounts = patch.fine[0].ravel()[order]
        assert (np.diff(amounts) >= -1e-3).all()  # amounts grow with the field, whatever flips, drift and power


def test_what_is_lacking_or_does_not_fit_is_said(folder, checkpoints, tmp_path):
    with pytest.raises(ConfigurationError, match=r"needs the static field 'orography' \[m\]; named are none"):
        stsr_core.downscale(coarse(), space=4, time=1, checkpoints=str(checkpoints), time_label="end")
    with xr.open_dataset(folder / "orography.nc") as opened:
        field = opened["orography"].load()
    feet = field.assign_attrs(units="feet").to_dataset(name="orography")
    feet.to_netcdf(tmp_path / "feet.nc")
    with pytest.raises(SourceError, match="is in feet; the checkpoint was trained with m"):
        plan_with(tmp_path, checkpoints, "feet.nc")
    field.where(field.y > 50_000).to_dataset(name="orography").to_netcdf(tmp_path / "sea.nc")
    with pytest.raises(SourceError, match="is missing in 10000 of 40000 cells"):
        plan_with(tmp_path, checkpoints, "sea.nc")


def test_what_marks_missing_cells_is_no_height(tmp_path):
    height = projected(np.full((20, 20), 300.0, np.float32), 1000.0, units="m")
    height[:2, 3:6] = -9999.0
    grid = Grid(Axis(10_000.0, 2000.0, 5), Axis(10_000.0, 2000.0, 5), pyproj.CRS(CRS).to_wkt())
    away = replace(grid, y=Axis(3000.0, 2000.0, 5))
    near = replace(grid, y=Axis(1000.0, 2000.0, 5), x=Axis(3000.0, 2000.0, 5))

    def read(where, marks=(), **attributes):
        height.assign_attrs(attributes).to_dataset(name="z").to_netcdf(tmp_path / "z.nc")
        return StaticSource(str(tmp_path / "z.nc"), "z", CRS, marks).read(where)

    assert read(near).min() < -5000  # of which nobody says that it is no height
    limits = ({"valid_min": -500.0}, {"valid_range": np.array([-500.0, 9000.0])}, {"valid_min": -500, "valid_max": 300})
    for marks, stated in (((-9999.0,), {}), *(((), limit) for limit in limits)):
        with pytest.raises(SourceError, match="is missing in 2 of 25 cells"):
            read(near, marks, **stated)
        np.testing.assert_array_equal(read(away, marks, **stated), 300.0)


def test_a_field_that_the_networks_do_not_see_is_refused(folder, checkpoints):
    statics = {"orography": source(folder), "slope": source(folder)}
    with pytest.raises(ConfigurationError, match="does not see the static fields slope; it was trained with orography"):
        stsr_core.downscale(
            coarse(), space=4, time=1, checkpoints=str(checkpoints), time_label="end", statics=statics
        )  # fmt: skip


def test_fields_are_named_by_file_or_by_catalog(tmp_path):
    catalog = yaml.safe_load(shipped_catalog().read_text(encoding="utf-8"))
    static = {"url": "z.nc", "variable": "z", "crs": CRS, "description": "", "license": "", "attribution": "",
              "missing_values": [-9999.0]}  # fmt: skip
    path = tmp_path / "catalog.yaml"
    path.write_text(yaml.safe_dump({**catalog, "statics": {"orography": static}}), encoding="utf-8")
    found = named_sources(["orography", "slope=s.nc"], path)
    assert found == {
        "orography": StaticSource("z.nc", "z", CRS, (-9999.0,), tmp_path, {}),
        "slope": StaticSource("s.nc", "slope"),
    }
    with pytest.raises(ConfigurationError, match=r"No static field 'slope' in catalog.yaml; there are orography"):
        named_sources(["slope"], path)


def test_files_that_are_named_need_no_catalog(tmp_path):
    broken = tmp_path / "catalog.yaml"
    broken.write_text("sources: [", encoding="utf-8")
    assert named_sources([], broken) == {}
    assert list(named_sources(["slope=s.nc"], broken)) == ["slope"]


def test_a_start_with_other_fields_is_refused(folder, checkpoints):
    start = Library.open(checkpoints).checkpoints[0].weights_path.with_suffix(".json")
    data = command.Data([str(folder / "rain")], [str(folder / "other")], declared=Declared(crs=CRS))
    with pytest.raises(ConfigurationError, match=r"trained with the static fields \['orography'\]; \[\] are named"):
        command.train_checkpoint(
            data, [Factor(space=4, time=1)], folder=folder / "other", name="o", device="cpu", seed=0, start=start,
            report=lambda _: None,
        )  # fmt: skip
