from pathlib import Path

import numpy as np
import xarray as xr

from flows.tasks import complete, missing
from stsr_core.catalog.publish import Attempt
from stsr_core.ensemble.cluster import Cluster
from stsr_core.ensemble.downscale import ARRAY, prepared
from stsr_core.ensemble.generate import Target, generate
from stsr_core.store.group import is_whole
from tests.ensemble.test_downscale import cube_of


def test_what_was_made_of_a_lost_shard_is_made_again(rain, checkpoints, cluster: Cluster, tmp_path):
    attempt = Attempt.begin(str(tmp_path), "rain")
    plan, downscaler = prepared(
        (cube_of(rain),), space=4, time=1, members=6, seed=1, nearest=False, conserve=True, device="cpu",
        checkpoints=str(checkpoints),
    )  # fmt: skip

    def run() -> int:
        with cluster.client() as client:
            todo = missing(plan, attempt)
            target = Target(attempt.group_url("ensemble"), ARRAY, {})
            generate(plan, todo, downscaler, target, client, cluster, progress=lambda *_: None)
        return len(todo)

    assert run() == 2
    lost = Path(attempt.group_url("ensemble")) / ARRAY / "c" / "1" / "0" / "0" / "0"
    lost.unlink()
    complete(plan, attempt)
    assert np.isnan(xr.open_zarr(attempt.group_url("series"))["precipitation"]).any()
    assert run() == 1
    assert not is_whole(attempt.group_url("ensemble"))
    complete(plan, attempt)
    ensemble, series = (xr.open_zarr(attempt.group_url(group))["precipitation"] for group in ("ensemble", "series"))
    np.testing.assert_array_equal(series.transpose(*ensemble.dims).values, ensemble.values)
    assert not np.isnan(ensemble).any()
    assert not np.isnan(xr.open_zarr(attempt.group_url("overview"))["mean"]).any()
