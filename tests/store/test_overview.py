from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import stsr_core.store.overview as overview_module
from stsr_core.errors import StoreError
from stsr_core.store.group import finish
from stsr_core.store.overview import write_overview
from stsr_core.store.series import write_series
from tests.store.made import LAYOUT


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
