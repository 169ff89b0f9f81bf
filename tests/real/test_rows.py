"""The Prefect database stays small: its rows follow products and stages, never shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psycopg
import pytest
import xarray as xr
import yaml
from psycopg.sql import SQL, Identifier

from stsr_core.ensemble.cluster import Cluster
from stsr_core.ensemble.plan import MEMBER_BLOCK
from tests.real import postgres
from tests.real.servers import Site, start, wait_for
from tests.real.site import ROOT

pytestmark = pytest.mark.slow
STAGES = 8
SCHEDULED = 6  # runs that the server makes ahead for the two schedules
HEARTBEAT_S, PROGRESS_S = 30, 5
HEARTBEAT, PROGRESS = "event prefect.flow-run.heartbeat", "event prefect.artifact.updated"
LATE = "event prefect.flow-run.Late"  # a state that a run also has where the machine is busy when it is due
BY_THE_CLOCK = {"events", "event_resources", "automation_bucket"}  # tables that hold some of these


@dataclass(frozen=True)
class Night:
    """What one nightly run did to the database.

    Attributes:
        rows: new rows by table, and new events by name.
        bytes: what the database grew by.
        seconds: how long the run took.
    """

    rows: Counter[str]
    bytes: int
    seconds: float


def dry_catalog(folder: Path, name: str, *, products: int, shards: int) -> Path:
    """A catalog.yaml of products NAME-0, NAME-1, ... of a dry day; shards of it need no network, all else they do."""
    cells = np.arange(6)
    hours = np.datetime64("2000-01-01T00", "ns") + np.arange(24) * np.timedelta64(1, "h")
    axes = {axis: (axis, first + 4000.0 * cells, {"units": "m", "standard_name": f"projection_{axis}_coordinate"})
            for axis, first in (("y", 6_302_000.0), ("x", 902_000.0))}  # fmt: skip
    amount = np.zeros((24, 6, 6), np.float32)
    xr.Dataset({"rain": (("time", "y", "x"), amount, {"units": "mm"})}, {"time": hours, **axes}).to_netcdf(
        folder / f"{name}.nc"
    )
    shipped = yaml.safe_load((ROOT / "catalog.yaml").read_text())
    (source,), (product,) = shipped["sources"].values(), shipped["products"].values()
    declared = {"url": f"{name}.nc", "variable": "rain", "crs": "EPSG:2154", "time_label": "start", "step_h": 1.0}
    grid = {"crs": "EPSG:2154", "spacing_m": 1000.0, "x_min": 908_000.0, "x_max": 916_000.0, "y_min": 6_308_000.0,
            "y_max": 6_316_000.0}  # fmt: skip
    made = {**product, "source": "dry", "grid": "box", "members": MEMBER_BLOCK * shards}
    catalog = {
        "sources": {"dry": {**source, **declared}},
        "grids": {"box": grid},
        "products": {f"{name}-{i}": made for i in range(products)},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(catalog))
    return path


def rows(site: Site) -> Counter[str]:
    """Rows of every table of the Prefect database, and events by name."""
    with psycopg.connect(site.database.url) as database:
        found: Counter[str] = Counter()
        for (table,) in database.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall():
            [found[table]] = database.execute(SQL("SELECT count(*) FROM {}").format(Identifier(table))).fetchone()
        for event, count in database.execute("SELECT event, count(*) FROM events GROUP BY event"):
            found[f"event {event}"] = count
    return found


def size(site: Site) -> int:
    """Bytes of the Prefect database."""
    with psycopg.connect(site.database.url) as database:
        [found] = database.execute("SELECT pg_database_size(current_database())").fetchone()
    return int(found)


def night(site: Site, name: str, *, products: int, shards: int) -> Night:
    """Run the nightly flow over equal products, and see what became of the database."""
    catalog = dry_catalog(site.folder, name, products=products, shards=shards)
    before, bytes_before = rows(site), size(site)
    found = site.api.finished(site.api.start("nightly/nightly", catalog_file=str(catalog)))
    assert found["state_type"] == "COMPLETED", found["state"]["message"]
    last = "event prefect.worker.executed-flow-run"
    wait_for(lambda: rows(site)[last] > before[last], "the last event of the run")
    made = len(list(site.catalogue.glob(f"{name}-*/data/*/data.zarr/ensemble/**/receipts/*.json")))
    assert made == products * shards
    return Night(rows(site) - before, size(site) - bytes_before, found["total_run_time"])


@pytest.fixture
def site(tmp_path: Path, checkpoints: Path, cluster: Cluster) -> Iterator[Site]:
    if postgres.programs() is None:
        pytest.skip("PostgreSQL is not installed")
    dry_catalog(tmp_path, "catalog", products=1, shards=1)
    assert cluster.scheduler_address is not None
    with start(tmp_path, checkpoints, STSR_SCHEDULER_ADDRESS=cluster.scheduler_address) as running:
        wait_for(lambda: rows(running)["flow_run"] == SCHEDULED, "the runs of the schedules")
        night(running, "first", products=1, shards=1)  # after it, all that is written once is there
        yield running


def test_rows_of_a_night_follow_products_and_stages_and_never_shards(site: Site) -> None:
    products = 2
    few = night(site, "few", products=products, shards=2)
    many = night(site, "many", products=products, shards=50)
    assert few.rows["task_run"] == STAGES * products
    assert few.rows["task_run_state"] == 3 * STAGES * products
    assert few.rows["artifact"] == 5 * products + 1
    for counted in (few, many):
        assert counted.rows[HEARTBEAT] <= counted.seconds / HEARTBEAT_S + 1
        assert counted.rows[PROGRESS] <= products * (1 + counted.seconds / PROGRESS_S)
    assert _of_work(many.rows) == _of_work(few.rows)


def _of_work(found: Counter[str]) -> dict[str, int]:
    """Rows without those that follow the clock instead of what is done."""
    counted = {**found, "flow_run_state": found["flow_run_state"] - found[LATE]}
    return {name: n for name, n in counted.items() if name not in {*BY_THE_CLOCK, HEARTBEAT, PROGRESS, LATE}}
