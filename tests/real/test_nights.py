"""Nights that do not go as planned, on PostgreSQL: servers killed in the middle of a run, two runs at once, a source
that shrinks or vanishes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import xarray as xr
import yaml

from stsr_core.catalog import find, ls
from stsr_core.catalog.integrity import verify_version
from tests.real import postgres
from tests.real.servers import Site, start, wait_for
from tests.real.site import PRODUCT, ROOT, engine_of, small_catalog

pytestmark = pytest.mark.slow
AWAY_S = 10.0  # seconds that a server is away


def own_source(folder: Path) -> None:
    """A catalog.yaml whose source is a file of the folder, which tests rewrite."""
    small_catalog(folder / "catalog.yaml")
    catalog = yaml.safe_load((folder / "catalog.yaml").read_text())
    (source,) = {p["source"] for p in catalog["products"].values()}
    shutil.copy(ROOT / "stsr_core" / "samples" / "arpege_fc1h_20180501_SE.nc", folder / "source.nc")
    catalog["sources"][source]["url"] = "source.nc"
    (folder / "catalog.yaml").write_text(yaml.safe_dump(catalog))


def rewrite(site: Site, change: Callable[[xr.Dataset], xr.Dataset]) -> None:
    """Replace the source at once, as producers do."""
    with xr.open_dataset(site.folder / "source.nc", decode_cf=False) as data:
        change(data.load()).to_netcdf(site.folder / "next.nc")
    (site.folder / "next.nc").replace(site.folder / "source.nc")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, checkpoints: Path) -> Iterator[Site]:
    if postgres.programs() is None:
        pytest.skip("PostgreSQL is not installed")
    folder = tmp_path_factory.mktemp("operations")
    own_source(folder)
    with start(folder, checkpoints) as running:
        running.api.switch("nightly/nightly", active=False)  # no run but those of the tests, at any time of the day
        yield running


def kill_worker(site: Site) -> None:
    site.kill("worker")
    site.run_worker()


def kill_server(site: Site) -> None:
    site.kill("server")
    time.sleep(AWAY_S)
    site.run_server()


def crash_database(site: Site) -> None:
    site.database.crash()
    time.sleep(AWAY_S)
    site.database.restart()


@pytest.mark.parametrize("fault", [kill_worker, kill_server, crash_database])
def test_a_fault_in_the_middle_of_a_run_is_told_and_a_rerun_finishes(site: Site, fault: Callable[[Site], None]) -> None:
    before, made = versions(site), site.receipts()
    run = site.api.start("nightly/nightly", members=48, force=True)
    wait_for(lambda: site.receipts() > made, "the first receipt")
    fault(site)
    found = site.api.finished(run)
    completed = found["state_type"] == "COMPLETED"
    published = len(versions(site)) - len(before)  # 1 also if the run could not tell that it had published
    assert published == 1 if completed else published in {0, 1}, found["state"]["message"]
    again = site.api.finished(site.api.start("nightly/nightly", members=48, force=True))
    assert again["state_type"] == "COMPLETED", again["state"]["message"]
    assert len(versions(site)) == len(before) + published + 1
    sound(site)


def versions(site: Site) -> list[str]:
    if not (site.catalogue / "catalog.json").is_file():
        return []
    return ls(str(site.catalogue)).get(PRODUCT, [])


DRIVER = f"""
import os, signal
from flows import nightly as nights, versions

whole = nights.stage

def stage(task, product):
    if task.name == os.environ.get("DIES_BEFORE"):
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(task, product)

nights.stage = versions.stage = stage
nights.nightly(product={PRODUCT!r}, force=True)
"""


def drive(site: Site, **environment: str) -> int:
    """Run the nightly flow in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", DRIVER], cwd=site.folder, env={**site.environment, **environment}, check=False
    ).returncode


def shards(site: Site) -> dict[str, bytes]:
    """Stored bytes of the newest version's ensemble."""
    root = Path(find(PRODUCT, "latest", str(site.catalogue)).asset_url("ensemble")) / "precipitation" / "c"
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> dict[str, bytes]:
    assert drive(site) == 0
    return shards(site)


@pytest.mark.parametrize("stage", ["read", "match", "regrid", "plan", "generate", "verify", "publish"])
def test_a_driver_killed_between_two_stages_publishes_nothing_and_a_rerun_makes_the_same_bytes(
    site: Site, undisturbed: dict[str, bytes], stage: str
) -> None:
    before = versions(site)
    assert drive(site, DIES_BEFORE=stage) == -signal.SIGKILL
    assert versions(site) == before
    assert drive(site) == 0
    assert len(versions(site)) == len(before) + 1
    sound(site)
    assert shards(site) == undisturbed


def test_two_runs_at_once_publish_one_version(site: Site) -> None:
    before = versions(site)
    rewrite(site, lambda data: data.assign(precipitation=data["precipitation"] * 2))
    code = f"from flows.nightly import nightly; nightly(product={PRODUCT!r})"  # past the deployment's queue
    runs = [subprocess.Popen([sys.executable, "-c", code], cwd=site.folder, env=site.environment) for _ in range(2)]
    assert [run.wait(300) for run in runs] == [0, 0]
    assert len(versions(site)) == len(before) + 1
    sound(site)


def test_a_nightly_run_and_a_backfill_at_once_both_publish(site: Site) -> None:
    before = versions(site)
    day = {"first": "2018-05-01", "last": "2018-05-01"}
    runs = [
        site.api.start("backfill/backfill", product=PRODUCT, period=day),
        site.api.start("nightly/nightly", product=PRODUCT, force=True),
    ]
    found = [site.api.finished(run) for run in runs]
    assert [run["state_type"] for run in found] == ["COMPLETED", "COMPLETED"], found
    assert len(versions(site)) == len(before) + 1
    assert ls(str(site.catalogue))[f"{PRODUCT}-20180501-20180501"] == ["v1"]


def test_a_source_that_shrinks_becomes_a_shorter_version_and_one_that_vanishes_none(site: Site) -> None:
    before = versions(site)
    rewrite(site, lambda data: data.isel(time=slice(0, 12)))
    shorter = site.api.finished(site.api.start("nightly/nightly"))
    assert shorter["state_type"] == "COMPLETED", shorter["state"]["message"]
    assert len(versions(site)) == len(before) + 1
    sound(site)
    newest = find(PRODUCT, "latest", str(site.catalogue))
    assert xr.open_zarr(newest.asset_url("ensemble")).sizes["time"] == 12
    (site.folder / "source.nc").rename(site.folder / "gone.nc")
    vanished = site.api.finished(site.api.start("nightly/nightly"))
    (site.folder / "gone.nc").rename(site.folder / "source.nc")
    assert vanished["state_type"] == "FAILED"
    assert "source.nc" in vanished["state"]["message"]
    assert len(versions(site)) == len(before) + 1


def test_a_product_that_cannot_be_written_does_not_keep_the_others_from_being_published(site: Site) -> None:
    before = versions(site)
    catalog = yaml.safe_load((site.folder / "catalog.yaml").read_text())
    catalog["products"] = {"blocked": catalog["products"][PRODUCT], **catalog["products"]}
    (site.folder / "two.yaml").write_text(yaml.safe_dump(catalog, sort_keys=False))
    (site.catalogue / "blocked").write_text("a file where a folder has to be")
    run = site.api.start("nightly/nightly", force=True, catalog_file=str(site.folder / "two.yaml"))
    found = site.api.finished(run)
    (site.catalogue / "blocked").unlink()
    assert found["state_type"] == "FAILED"
    assert "1 of 2 products failed. blocked: " in found["state"]["message"]
    rows = json.loads(site.api.artifacts(run)["nightly"]["data"])
    assert [(row["product"], row["outcome"]) for row in rows] == [("blocked", "failed"), (PRODUCT, "published")]
    assert len(versions(site)) == len(before) + 1


def set_gate(site: Site, name: str, value: float) -> None:
    catalog = yaml.safe_load((site.folder / "catalog.yaml").read_text())
    catalog["products"][PRODUCT]["gates"][name] = value
    (site.folder / "catalog.yaml").write_text(yaml.safe_dump(catalog))


def test_a_gate_that_fails_keeps_the_attempt_and_a_retry_in_the_ui_publishes_it_when_the_bound_is_mended(
    site: Site,
) -> None:
    before, attempts = versions(site), site.attempts()
    set_gate(site, "max_mm", 0.01)
    run = site.api.start("nightly/nightly", force=True)
    found = site.api.finished(run)
    assert found["state_type"] == "FAILED"
    assert "0.01" in found["state"]["message"]
    gates = json.loads(site.api.artifacts(run)[f"gates-{PRODUCT}"]["data"])
    assert [gate["name"] for gate in gates if gate["passed"] == "NO"]
    (kept,) = site.attempts() - attempts
    assert versions(site) == before
    set_gate(site, "max_mm", 300.0)
    made = site.receipts()
    found = site.api.retried(run)
    assert found["state_type"] == "COMPLETED", found["state"]["message"]
    assert len(versions(site)) == len(before) + 1
    assert f"/data/{kept}/" in find(PRODUCT, "latest", str(site.catalogue)).url
    assert site.receipts() == made
    sound(site)


@contextmanager
def webhook() -> Iterator[tuple[str, list[str]]]:
    """A server that keeps the texts that are posted to it; yields its address and them."""
    texts: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            texts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", texts
    finally:
        server.shutdown()
        server.server_close()


def impatient(folder: Path) -> Path:
    """A prefect.yaml whose windows are seconds."""
    text = (ROOT / "deployments" / "prefect.yaml").read_text()
    assert "within_s: 150\n" in text
    assert "within_s: 93600\n" in text
    path = folder / "impatient.yaml"
    path.write_text(text.replace("within_s: 150\n", "within_s: 45\n").replace("within_s: 93600\n", "within_s: 20\n"))
    return path


def test_who_is_told_what_and_a_run_that_died_with_its_worker_is_marked(site: Site) -> None:
    with webhook() as (url, texts):
        site.deploy("--file", str(impatient(site.folder)), STSR_ALERT_URL=url)
        run = site.api.start("nightly/nightly", members=480, force=True)
        made = site.receipts()
        wait_for(lambda: site.receipts() > made, "the first receipt")
        wait_for(lambda: site.api.events("prefect.flow-run.heartbeat", f"prefect.flow-run.{run}") > 0, "a heartbeat")
        site.kill("worker")
        engine_of(run).kill()
        late = site.api.start("nightly/nightly", catalog_file="/nowhere.yaml")
        assert site.api.finished(run)["state_type"] == "CRASHED"
        wait_for(lambda: f"{site.api.get(f'/flow_runs/{late}')['name']} is late" in "".join(texts), "the late run")
        site.run_worker()
        assert site.api.finished(late)["state_type"] == "FAILED"
        silent = f"stsr: {PRODUCT} got no new version for 26 hours"
        wait_for(lambda: sum(silent in text for text in texts) >= 2, "two alerts about no new version")
        wait_for(lambda: "ended as Failed: " in "".join(texts), "the failed run")
        assert "ended as Crashed: No heartbeat" in "".join(texts)
        site.deploy()


def sound(site: Site) -> None:
    newest = find(PRODUCT, "latest", str(site.catalogue))
    assert verify_version(newest.url.rpartition("/")[0]).flaws == ()
