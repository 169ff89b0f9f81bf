"""A small ensemble in eight shards, at the edge of its grid too."""

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch

from stsr_core.ensemble.sums import sums
from stsr_core.factors import Factor
from stsr_core.grids import Axis, Grid, TimeAxis
from stsr_core.store.layout import MISSING, StoreLayout

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


def shard_file(store, region):
    return f"{store}/precipitation/c/0/{region[1].start // 2}/{region[2].start // 4}/{region[3].start // 4}"


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}
