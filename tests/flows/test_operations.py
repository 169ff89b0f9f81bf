"""Parameters, pieces of a backfill, artifacts without a server, and the declaration; no server runs here."""

import importlib
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import yaml
from prefect.exceptions import ParameterTypeError
from prefect.utilities.callables import parameter_schema
from pydantic import ValidationError

from flows import tasks
from flows.artifacts import key_of
from flows.backfill import backfill, cut_pieces
from flows.declared import Declared, shipped_declaration
from flows.jobs import jobs
from flows.maintain import maintain
from flows.nightly import nightly
from flows.parameters import Order, Period, Pieces, Retention
from flows.redeploy import RedeployError, fetch, image_of
from flows.stages import may_pass
from stsr_core.catalog.search import Version
from stsr_core.configuration import PRODUCT_NAME
from stsr_core.ensemble.plan import Plan, Recipe
from stsr_core.errors import ConfigurationError, GateError, SourceError
from stsr_core.factors import Factor, Match
from stsr_core.grids import Axis, Grid, TimeAxis
from stsr_core.settings import Settings
from stsr_core.sources.cube import Cube

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Period(first=date(2020, 2, 2), last=date(2020, 2, 1)), "before the first"),
        (lambda: Pieces(days=0), "greater than or equal to 1"),
        (lambda: Retention(keep=0), "greater than or equal to 1"),
        (lambda: Pieces(dyas=3), "Extra inputs"),
    ],
)
def test_forms_refuse_what_cannot_be(make, message):
    with pytest.raises(ValidationError, match=message):
        make()


@pytest.fixture
def plan(library):
    """Ten days of hourly rain at factor (4,1): five time blocks, one tile, two member blocks."""
    times = TimeAxis(datetime(2020, 1, 1), timedelta(hours=1), 240)
    grid = Grid(Axis(36_000.0, -4000.0, 8), Axis(4000.0, 4000.0, 8))
    checkpoint = library.serving(Factor(space=4, time=1))
    served = checkpoint.card.serving(Factor(space=4, time=1))
    recipe = Recipe.of(checkpoint, served, seed=1, members=8, conserve=True)
    return Plan((Cube(np.ones((240, 8, 8), np.float32), times, grid, {}),), recipe)


def test_pieces_cover_the_plan_once_in_either_order(plan):
    oldest = list(cut_pieces(plan, 4, Order.oldest_first))
    assert [p.name for p in oldest] == [
        "2020-01-01..2020-01-05", "2020-01-05..2020-01-09", "2020-01-09..2020-01-11",
    ]  # fmt: skip
    assert [len(p.keys) for p in oldest] == [4, 4, 2]
    assert sorted(key for p in oldest for key in p.keys) == sorted(s.key for s in plan.shards)
    assert list(cut_pieces(plan, 4, Order.newest_first)) == oldest[::-1]


def test_a_backfill_takes_no_name_of_a_nightly_product_and_none_that_cannot_be_published():
    day = Period(first=date(2018, 5, 1), last=date(2018, 5, 1))
    product = "arpege-provence-1km"
    with pytest.raises(ConfigurationError, match="2018-05-01..2018-05-01 alone would be its latest.*publish_as"):
        backfill.fn(product, day, publish_as=product, catalog_file=ROOT / "catalog.yaml")
    for name, message in (("../escaped", "match pattern"), ("Provence", "match pattern"), ("all", "every product")):
        with pytest.raises(ParameterTypeError, match=message):
            backfill.validate_parameters({"product": product, "period": day, "publish_as": name})
    schema = parameter_schema(backfill).model_dump()
    assert PRODUCT_NAME in json.dumps(schema["properties"]["publish_as"])


@pytest.mark.parametrize("flow", [nightly, backfill])
def test_a_leading_tilde_in_a_parameter_is_the_home_folder(flow, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    day = {"first": "2018-05-01", "last": "2018-05-01"}
    given = {"product": "p", "catalog_file": "~/c.yaml", "destination": "~/cat"}
    found = flow.validate_parameters(given | ({"period": day} if flow is backfill else {}))
    assert (str(found["catalog_file"]), found["destination"]) == ("/home/me/c.yaml", "/home/me/cat")
    assert maintain.validate_parameters({"destination": "~/cat"})["destination"] == "/home/me/cat"


def test_only_what_may_pass_is_tried_again():
    class State:
        def __init__(self, data):
            self.data = data

    assert may_pass(None, None, State(SourceError("server away")))
    assert may_pass(None, None, State(OSError("disk away")))
    assert not may_pass(None, None, State(GateError("spread")))
    assert not may_pass(None, None, State(ConfigurationError("typo")))


def test_a_source_that_is_rewritten_while_it_is_read_is_not_taken_for_either(monkeypatch):
    monkeypatch.chdir(ROOT)
    job = jobs("arpege-provence-1km", Settings())[0]
    found = iter(["before", "after"])
    monkeypatch.setattr(tasks, "fingerprint", lambda *_, **__: next(found))
    with pytest.raises(SourceError, match="changed while it was read"):
        tasks.to_lattice.fn(job, Match(10.0, 1.0, Factor(space=10, time=1), 0.0))


def test_keys_of_artifacts_are_what_prefect_accepts():
    assert key_of("plan", "ARPEGE_Provence 1km!") == "plan-arpege-provence-1km"


WITHOUT_SERVER = """
from flows import artifacts
artifacts.facts("plan-x", {"shards": 3}, "Plan")
artifacts.picture("quicklook-x", b"png", "Picture")
with artifacts.live_progress("progress-x", 10, "Progress") as advance:
    advance(5, 1.0)
print("went on")
"""


def test_without_a_server_artifacts_are_warnings(tmp_path):
    environment = {
        **os.environ,
        "PREFECT_API_URL": "http://127.0.0.1:9/api",
        "PREFECT_HOME": str(tmp_path),
        "PREFECT_CLIENT_MAX_RETRIES": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_SERVER], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("went on")
    assert (done.stdout + done.stderr).count("was not written") == 3


def test_the_declaration_is_valid_and_complete():
    declared = Declared.load(shipped_declaration())
    flows = {p.stem for p in (ROOT / "flows").glob("*.py") if "\n@flow(" in p.read_text()}
    assert {d.module.split(".")[1] for d in declared.deployments} == flows
    assert {i.value for i in declared.infrastructures} == {"process", "docker", "kubernetes"}


def test_every_field_of_every_form_says_what_it_is():
    for deployment in Declared.load(shipped_declaration()).deployments:
        flow = getattr(importlib.import_module(deployment.module), deployment.function)
        schema = parameter_schema(flow).model_dump()
        nested = [model["properties"] for model in schema["definitions"].values() if "properties" in model]
        for properties in (schema["properties"], *nested):
            assert [name for name, field in properties.items() if not field.get("description")] == []


def test_schedules_are_in_utc_so_that_a_clock_change_neither_skips_nor_repeats_a_night():
    schedules = [s for d in Declared.load(shipped_declaration()).deployments for s in d.schedules]
    assert schedules
    assert {s.timezone for s in schedules} == {"UTC"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"deploymets": []}, "deploymets: Extra inputs"),
        ({"limits": {"other": 1}}, "limit other does not start with 'stsr'"),
        ({"work_queues": []}, "names queue 'nightly'"),
    ],
)
def test_a_declaration_that_is_not_understood_is_refused(tmp_path, change, message):
    text = yaml.safe_load(shipped_declaration().read_text())
    (tmp_path / "prefect.yaml").write_text(json.dumps({**text, **change}))
    with pytest.raises(ConfigurationError, match=message):
        Declared.load(tmp_path / "prefect.yaml")


@pytest.mark.parametrize(
    ("reference", "image"),
    [
        ("1.2", "host:5000/team/stsr:1.2"),
        ("host/other:3", "host/other:3"),
        ("other@sha256:0a", "other@sha256:0a"),
    ],
)
def test_a_tag_is_that_of_the_image_that_is_deployed(reference, image):
    assert image_of(reference, "host:5000/team/stsr:1.1@sha256:0b") == image
    assert image_of("2", "stsr") == "stsr:2"


def test_a_reference_that_is_not_there_is_refused(tmp_path):
    logging.getLogger("prefect").setLevel(logging.ERROR)
    subprocess.run(["git", "init", "--quiet", str(tmp_path / "repository")], check=True)
    with pytest.raises(RedeployError, match="rev-parse failed.*Check the reference"):
        fetch.fn("nosuch", str(tmp_path / "repository"), tmp_path / "releases")


@pytest.mark.parametrize("left", ["a repository without remote", "an empty folder"])
def test_what_a_killed_clone_left_is_cloned_again(tmp_path, left):
    repository, releases = tmp_path / "repository", tmp_path / "releases"
    (repository / "flows").mkdir(parents=True)
    (repository / "flows" / "nightly.py").touch()
    git = ["git", "-C", str(repository), "-c", "user.name=me", "-c", "user.email=me@here"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    mirror = releases / "repository.git"
    mirror.mkdir(parents=True)
    if left == "a repository without remote":
        subprocess.run(["git", "init", "--quiet", "--bare", str(mirror)], check=True)
    found = fetch.fn("HEAD", str(repository), releases)
    assert (found.folder / "flows" / "nightly.py").is_file()
    assert {p.name for p in releases.iterdir()} == {"repository.git", found.folder.name}
    assert fetch.fn("HEAD", str(repository), releases) == found


def test_a_product_is_made_again_where_its_source_configuration_or_checkpoint_changed(library, monkeypatch, tmp_path):
    """Nothing else is: neither text nor code; and the URL is told without what it may hold of credentials."""
    settings = Settings(destination=str(tmp_path))
    [job] = jobs("arpege-provence-1km", settings)
    last: dict[str, object] = {}
    monkeypatch.setattr(tasks, "newest", lambda *_, **__: Version("p", "v1", {"properties": last}, "p/v1.json"))
    monkeypatch.setattr(tasks, "event", lambda *_, **__: None)

    def new(job=job, **flags):
        return tasks.resolve.fn(job, library, settings, force=False, **flags)

    first = new()
    last |= {
        "stsr:source_fingerprint": first.fingerprint,
        "stsr:configuration": json.loads(job.entries(()).model_dump_json()),
        "stsr:requested_factor": (9.4, 1.0),
        "stsr:factor": [10, 1],
        "stsr:checkpoint_digest": library.serving(Factor(space=10, time=1)).digest,
        "stsr:statics": {},
    }
    assert new() is None
    assert new(replace(job, product=job.product.model_copy(update={"title": "Other"}))) is None
    assert new(replace(job, product=job.product.model_copy(update={"members": 3}))) == first
    assert new(replace(job, source=job.source.model_copy(update={"units": "mm/h"}))) == first
    last["stsr:checkpoint_digest"] = "c" * 64
    assert new() == first
    private = job.source.model_copy(update={"url": "https://user:word@host/a.nc?sig=abc"})
    assert replace(job, source=private).entries(()).source.url == "https://host/a.nc"
