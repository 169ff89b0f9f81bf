import numpy as np
import pytest

from stsr_core.store.layout import MISSING, create_ensemble, write_shard
from stsr_core.store.receipts import Receipt, write_receipt
from tests.store.made import LAYOUT, REGIONS, key_of, sums_of


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
