import itertools
import shutil
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from stsr_core.catalog.integrity import _closure as closure_of_version
from stsr_core.errors import StoreError
from stsr_core.store.coarse import write_coarse
from stsr_core.store.group import finish
from stsr_core.store.layout import QUANTUM_MM, create_ensemble, write_shard
from stsr_core.store.overview import coarser_grid
from stsr_core.store.series import write_series
from tests.store.made import LAYOUT


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
