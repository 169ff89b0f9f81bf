"""Parameters, pieces of a backfill, artifacts without a server, and the declaration; no server runs here."""

import contextlib
import importlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from dataclasses import replace
from datetime import date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import numpy as np
import pytest
import yaml
from prefect.exceptions import ParameterTypeError
from prefect.states import Pending
from prefect.utilities.callables import parameter_schema
from pydantic import ValidationError

from flows import artifacts, redeploy, stages, tasks
from flows import backfill as backfills
from flows import nightly as night
from flows.artifacts import key_of
from flows.backfill import Piece, _show_pieces, backfill, cut_pieces
from flows.declared import Declared, InfrastructureName, shipped_declaration
from flows.deploy import Release
from flows.jobs import jobs
from flows.maintain import maintain
from flows.nightly import nightly
from flows.parameters import Order, Period, Pieces, Retention
from flows.redeploy import RedeployError, fetch, image_of
from flows.stages import may_pass
from flows.train import train
from flows.versions import require_affordable
from stsr_core.catalog.documents import DamagedError
from stsr_core.catalog.publish import Published
from stsr_core.catalog.search import Version
from stsr_core.configuration import PRODUCT_NAME
from stsr_core.ensemble.plan import Plan, Recipe
from stsr_core.errors import ConfigurationError, GateError, OperatorError, PublicationError, SourceError, StoreError
from stsr_core.factors import Factor, Match
from stsr_core.grids import Axis, Grid, TimeAxis
from stsr_core.settings import Settings
from stsr_core.sources.cube import Cube
from tests.catalog.made import publish_one

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


@pytest.mark.parametrize(("done", "first", "last"), [(1, 0, 99), (100, 0, 99), (250, 150, 249), (1000, 900, 999)])
def test_of_many_pieces_a_table_that_is_written_after_each_shows_the_last_hundred(monkeypatch, done, first, last):
    shown = []
    monkeypatch.setattr(backfills.artifacts, "table", lambda *arguments: shown.append(arguments))
    _show_pieces("p", [Piece(str(i), frozenset()) for i in range(1000)], done)
    [(_, rows, description)] = shown
    assert (rows[0]["piece"], rows[-1]["piece"], len(rows)) == (str(first), str(last), 100)
    assert {row["done"] for row in rows[: done - first]} == {"yes"}
    assert {row["done"] for row in rows[done - first :]} <= {""}
    assert description == f"{done} of 1000 pieces of p"


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
    given = {"factors": [{"space": 4, "time": 1}], "folder": "~/t", "start": "~/c.json", "train_on": ["~/a.nc"]}
    found = train.validate_parameters(given)
    assert [str(p) for p in (found["folder"], found["start"], *found["train_on"])] == [
        "/home/me/t", "/home/me/c.json", "/home/me/a.nc"
    ]  # fmt: skip
    with pytest.raises(ParameterTypeError, match="seed"):
        train.validate_parameters({**given, "seed": 2**63})


def test_the_form_asks_for_factors_within_the_bounds_of_the_family():
    given = {"factors": [{"space": 4, "time": 1}], "folder": "t"}
    assert train.validate_parameters(given)["factors"] == [Factor(space=4, time=1)]
    asked = train.parameters.definitions["Factor"]["properties"]
    assert {name: (field["minimum"], field["maximum"]) for name, field in asked.items()} == {
        "space": (1, 25), "time": (1, 6)
    }  # fmt: skip
    assert all(field["description"] for field in asked.values())
    with pytest.raises(ParameterTypeError, match=r"factors.0.space"):
        train.validate_parameters({**given, "factors": [{"space": 26, "time": 1}]})


def test_only_what_may_pass_is_tried_again():
    class State:
        def __init__(self, data):
            self.data = data

    assert may_pass(None, None, State(SourceError("server away")))
    assert may_pass(None, None, State(OSError("disk away")))
    assert may_pass(None, None, State(PublicationError("server away")))
    assert not may_pass(None, None, State(DamagedError("no JSON")))
    assert not may_pass(None, None, State(GateError("spread")))
    assert not may_pass(None, None, State(ConfigurationError("typo")))


def test_a_source_that_is_rewritten_while_it_is_read_is_not_taken_for_either(monkeypatch):
    monkeypatch.chdir(ROOT)
    job = jobs("arpege-provence-1km", Settings())[0]
    private = job.source.model_copy(update={"url": "https://me:word@host/a.nc?sig=abc"})
    found = iter(["before", "after"])
    monkeypatch.setattr(tasks, "fingerprint", lambda *_, **__: next(found))
    monkeypatch.setattr(tasks, "_found", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(tasks.product, "to_lattice", lambda *_: ())
    with pytest.raises(SourceError, match=r"^https://host/a.nc changed while it was read"):
        tasks.to_lattice.fn(replace(job, source=private), Match(10.0, 1.0, Factor(space=10, time=1), 0.0))


def test_a_version_whose_picture_cannot_be_read_is_published_all_the_same(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(stages, "emit_event", lambda **what: told.append(what["event"]))
    monkeypatch.setattr(stages, "event", lambda name, **_: told.append(name))
    monkeypatch.setattr(stages.artifacts, "link", lambda *_: told.append("link"))
    published = Published("rain", "v1", f"{tmp_path}/v1.json")
    stages.show_published(SimpleNamespace(options={}), published, f"{tmp_path}/quicklook.png")
    assert told == ["link", "stsr.version.published", "not_shown"]


@pytest.mark.parametrize(
    ("public", "endpoint", "url", "link"),
    [
        (None, "http://s3:8333/", "s3://b/cat/p/v1.json", "http://s3:8333/b/cat/p/v1.json"),
        (None, None, "s3://b/cat/p/v1.json", "s3://b/cat/p/v1.json"),
        ("https://x/cat/", "http://s3:8333", "s3://b/cat/p/v1.json", "https://x/cat/p/v1.json"),
        ("https://x/cat", "http://s3:8333", "s3://b/catalogue/p/v1.json", "http://s3:8333/b/catalogue/p/v1.json"),
        (None, None, "/data/p/v1.json", "file:///data/p/v1.json"),
    ],
)
def test_the_link_of_a_version_is_one_that_a_browser_opens(monkeypatch, public, endpoint, url, link):
    monkeypatch.setenv("STSR_DESTINATION", "s3://b/cat/")
    monkeypatch.setenv("STSR_PUBLIC_URL", public or "")
    options = {"endpoint_url": endpoint} if endpoint else {}
    assert stages.browsable(url, SimpleNamespace(options=options)) == link


def test_a_plan_above_the_limit_of_device_hours_is_shown_and_refused(plan, monkeypatch):
    shown, found = [], Match(4.0, 1.0, Factor(space=4, time=1), 0.0)
    monkeypatch.setattr("flows.artifacts.facts", lambda key, values, text: shown.append(values["device hours"]))
    require_affordable("rain", plan, found, Settings())
    with pytest.raises(ConfigurationError, match="more than the limit of 1e-12"):
        require_affordable("rain", plan, found, Settings(max_device_hours=1e-12))
    assert len(shown) == 2


def test_a_product_that_fails_costs_no_other_its_night(monkeypatch):
    def publish_next(job, *_, **__):
        if job.name == "one":
            raise SourceError("no data")
        return job.name

    shown = []
    named = [SimpleNamespace(name=name) for name in ("one", "two")]
    monkeypatch.setattr(night, "jobs", lambda *_, **__: named)
    monkeypatch.setattr(night, "_publish_next", publish_next)
    monkeypatch.setattr(night, "event", lambda *_, **__: None)
    monkeypatch.setattr(night, "summarise", lambda _, names, published, failed: shown.extend([published, [*failed]]))
    with pytest.raises(OperatorError, match="1 of 2 products failed. one: no data"):
        nightly.fn()
    assert shown == [["two"], ["one"]]


def test_keys_of_artifacts_are_what_prefect_accepts():
    assert key_of("plan", "ARPEGE_Provence 1km!") == "plan-arpege-provence-1km"


def test_a_live_table_has_one_row_of_every_name(monkeypatch):
    made, updates = uuid4(), []
    monkeypatch.setattr(artifacts, "create_table_artifact", lambda **given: updates.append(given["table"]) or made)
    monkeypatch.setattr(artifacts, "_update", lambda artifact, data: updates.append((artifact, json.loads(data))))
    show = artifacts.live_table("losses-x", "Losses")
    for stage, step in (("mean", 2), ("mean", 4), ("denoiser", 2)):
        show(stage, {"stage": stage, "step": step})
    mean, denoiser = {"stage": "mean", "step": 4}, {"stage": "denoiser", "step": 2}
    assert updates == [[{"stage": "mean", "step": 2}], (made, [mean]), (made, [mean, denoiser])]


WITHOUT_SERVER = """
from flows import artifacts
artifacts.facts("plan-x", {"shards": 3}, "Plan")
artifacts.picture("quicklook-x", b"png", "Picture")
with artifacts.live_progress("progress-x", 10, "Progress") as advance:
    advance(5, 1.0)
artifacts.live_table("losses-x", "Losses")("mean", {"step": 1})
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
    assert (done.stdout + done.stderr).count("was not written") == 4


def test_the_declaration_is_valid_and_complete():
    declared = Declared.load(shipped_declaration())
    flows = {p.stem for p in (ROOT / "flows").glob("*.py") if "\n@flow(" in p.read_text()}
    assert {d.module.split(".")[1] for d in declared.deployments} == flows
    assert {i.value for i in declared.infrastructures} == {"process", "docker", "kubernetes"}


def test_pods_without_gpu_and_disk_get_no_trainings():
    declared = Declared.load(shipped_declaration())
    names = {i: {d.name for d in declared.deployments_on(i)} for i in InfrastructureName}
    assert names["process"] == names["docker"] == {d.name for d in declared.deployments}
    assert names["kubernetes"] == names["process"] - {"train", "evaluate"}


def test_the_smoke_run_is_the_same_whatever_the_settings_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("STSR_MATCH_LIMIT=1.01\nPREFECT_API_URL=http://127.0.0.1:9/api\n")
    for name in ("CHECKPOINTS", "DEVICE", "MAX_DEVICE_HOURS"):
        monkeypatch.setenv(f"STSR_{name}", "my-own")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    called = []

    def run(command, **how):
        called.append((command, how["cwd"], [k for k in how["env"] if k.startswith(("STSR_", "PREFECT_API"))]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(redeploy.subprocess, "run", run)
    monkeypatch.setattr(redeploy, "event", lambda *_, **__: None)
    redeploy.smoke_run.fn(tmp_path, 2)
    assert [command[4] for command, _, _ in called] == ["demo", "catalog"]
    for _, folder, settings in called:
        assert folder != tmp_path
        assert not settings


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


@pytest.fixture
def repository(tmp_path):
    """A repository with one commit, and a branch `other` with another."""
    folder = tmp_path / "repository"
    (folder / "flows").mkdir(parents=True)
    (folder / "flows" / "nightly.py").touch()
    git = ["git", "-C", str(folder), "-c", "user.name=me", "-c", "user.email=me@here"]
    commit = ["commit", "--quiet", "--allow-empty", "-m", "one"]
    for command in (["init", "--quiet"], ["add", "."], commit, ["checkout", "--quiet", "-b", "other"], commit):
        subprocess.run([*git, *command], check=True)
    return folder


@pytest.mark.parametrize("left", ["a repository without remote", "an empty folder"])
def test_what_a_killed_clone_left_is_cloned_again(tmp_path, repository, left):
    releases = tmp_path / "releases"
    mirror = releases / "repository.git"
    mirror.mkdir(parents=True)
    if left == "a repository without remote":
        subprocess.run(["git", "init", "--quiet", "--bare", str(mirror)], check=True)
    found = fetch.fn("HEAD", str(repository), releases)
    assert (found.folder / "flows" / "nightly.py").is_file()
    assert {p.name for p in releases.iterdir()} == {".lock", "repository.git", found.folder.name}
    assert mirror.stat().st_mode & 0o777 == 0o700
    mirror.chmod(0o755)
    assert fetch.fn("HEAD", str(repository), releases) == found
    assert mirror.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("command", ["clone", "fetch", "checkout"])
def test_a_fetch_that_is_killed_at_any_command_is_made_good_by_the_next(tmp_path, repository, command):
    releases = tmp_path / "releases"
    at_work = fetch.fn("HEAD~1", str(repository), releases) if command == "checkout" else None
    stand_in = tmp_path / "bin" / "git"
    stand_in.parent.mkdir()
    stand_in.write_text(
        f'#!/bin/sh\ncase " $* " in *" {command} "*) mkdir -p {releases}/clone-x/$$; kill -9 $PPID; sleep 60;; esac\n'
        f'exec {shutil.which("git")} "$@"\n'
    )
    stand_in.chmod(0o755)
    asked = f"'HEAD', {str(repository)!r}, Path({str(releases)!r})"
    code = f"from pathlib import Path; from flows.redeploy import fetch; fetch.fn({asked})"
    killed = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PATH": f"{stand_in.parent}:{os.environ['PATH']}"}
    )
    assert killed.wait(60) == -signal.SIGKILL
    assert list(releases.glob("clone-*"))
    found = fetch.fn("HEAD", str(repository), releases)
    assert (found.folder / "flows" / "nightly.py").is_file()
    assert not list(releases.glob("clone-*"))
    if at_work is not None:
        shutil.rmtree(releases / "repository.git")  # as if its own clone had been killed
        assert fetch.fn("HEAD~1", str(repository), releases) == at_work


def test_git_that_hangs_is_an_error_that_does_not_tell_the_address(tmp_path, monkeypatch):
    monkeypatch.setattr(redeploy, "GIT_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://me:word@127.0.0.1:{silent.getsockname()[1]}/x.git"
        with pytest.raises(RedeployError, match="git clone took longer than 1 s.*STSR_REPOSITORY answers") as caught:
            fetch.fn("HEAD", url, tmp_path / "releases")
    assert "word" not in "".join(traceback.format_exception(caught.value))


class Tasks:
    """Stand-ins for the tasks of `redeploy`: what they are called with, and one that fails."""

    def __init__(self, monkeypatch, failing=None):
        self.called = []
        for name in ("check_imports", "examine", "smoke_run", "register", "register_again", "run_in_image"):
            monkeypatch.setattr(redeploy, name, self._task(name, failing))
        found = redeploy.Fetched("new", "c" * 40, Path("/new"))
        monkeypatch.setattr(redeploy, "fetch", self._task("fetch", failing, found))
        monkeypatch.setattr(redeploy, "difference", lambda *_: "")
        monkeypatch.setattr(redeploy.artifacts, "page", lambda *_: None)
        monkeypatch.setattr(redeploy, "event", lambda *_, **__: None)

    def _task(self, name, failing, result=None):
        def call(*arguments):
            self.called.append((name, arguments))
            if failing is not None and name == failing[0] and not failing[2:]:
                failing.append("once")
                raise failing[1]
            return result

        return SimpleNamespace(with_options=lambda **_: call)

    @property
    def names(self):
        return [name for name, _ in self.called]


OLD = Release(reference="old", code="/old", home="/home")


@pytest.mark.parametrize("error", [RedeployError("refused"), TimeoutError("took too long")])
def test_what_was_deployed_before_is_registered_again_whatever_kept_the_new_from_it(monkeypatch, error):
    async def deployed():
        return OLD

    monkeypatch.setattr(redeploy, "deployed", deployed)
    tasks = Tasks(monkeypatch, ["register", error])
    with pytest.raises(type(error), match=str(error)):
        redeploy.redeploy.fn("new")
    first, second = [arguments[0] for name, arguments in tasks.called if name == "register"]
    assert (first.code, first.home, second) == ("/new", "/home", OLD)


@pytest.mark.parametrize("stage", ["fetch", "check_imports", "examine", "smoke_run"])
def test_nothing_is_registered_that_failed_before_or_in_a_dry_run(monkeypatch, stage):
    async def deployed():
        return OLD

    monkeypatch.setattr(redeploy, "deployed", deployed)
    tasks = Tasks(monkeypatch, [stage, RedeployError("refused")])
    with pytest.raises(RedeployError, match="refused"):
        redeploy.redeploy.fn("new")
    assert "register" not in tasks.names
    tasks = Tasks(monkeypatch)
    assert redeploy.redeploy.fn("new", dry_run=True) is None
    assert tasks.names == ["fetch", "check_imports", "examine", "smoke_run"]


def test_an_image_that_cannot_be_registered_is_rolled_back(monkeypatch):
    old = Release(reference="i:1", image="i:1", infrastructure=InfrastructureName.docker)

    async def deployed():
        return old

    monkeypatch.setattr(redeploy, "deployed", deployed)
    tasks = Tasks(monkeypatch)
    assert redeploy.redeploy.fn("2", dry_run=True) is None
    assert tasks.names == ["run_in_image"]

    def ask(image, parameters):
        if "release" in parameters:
            raise TimeoutError("took too long")

    monkeypatch.setattr(redeploy, "run_in_image", SimpleNamespace(with_options=lambda **_: ask))
    with pytest.raises(TimeoutError):
        redeploy.redeploy.fn("2")
    assert tasks.called[-1] == ("register_again", (old,))


def test_a_run_in_an_image_that_does_not_start_is_cancelled_so_that_it_registers_nothing_later(monkeypatch):
    run = SimpleNamespace(id="r", name="check all", state=Pending(message="no node"))
    states = []
    client = SimpleNamespace(set_flow_run_state=lambda run, state: states.append((run, state.type.value)))
    monkeypatch.setattr(redeploy, "run_deployment", lambda *_, **__: run)
    monkeypatch.setattr(redeploy, "get_client", lambda **_: contextlib.nullcontext(client))
    with pytest.raises(RedeployError, match="not over after 3600 s .Pending: no node., so it is cancelled"):
        redeploy.run_in_image.fn("i:2", {})
    assert states == [("r", "CANCELLING")]


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
    for name, value in (("stsr:source_fingerprint", "0" * 64), ("stsr:checkpoint_digest", "c" * 64)):
        before = last[name]
        last[name] = value
        assert new() == first
        last[name] = before
    private = job.source.model_copy(update={"url": "https://user:word@host/a.nc?sig=abc"})
    assert replace(job, source=private).entries(()).source.url == "https://host/a.nc"


@pytest.mark.parametrize("damage", [lambda item: item.unlink(), lambda item: item.write_text("{")])
def test_force_gets_past_a_newest_version_whose_item_is_damaged(library, monkeypatch, tmp_path, damage):
    settings = Settings(destination=str(tmp_path))
    [job] = jobs("arpege-provence-1km", settings)
    monkeypatch.setattr(tasks, "event", lambda *_, **__: None)
    publish_one(tmp_path)
    damage(next((tmp_path / "rain" / "data").glob("*/v1.json")))
    with pytest.raises((DamagedError, StoreError), match=r"v1.json is (damaged|listed but missing)"):
        tasks.resolve.fn(replace(job, name="rain"), library, settings, force=False)
    assert tasks.resolve.fn(replace(job, name="rain"), library, settings, force=True).after == "v1"
