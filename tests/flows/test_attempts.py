"""Where a run writes; no server runs here, and no plan is made: an attempt's name is all that counts."""

import contextlib
import json
import uuid
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import httpx
import pytest
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed, Running

from flows import attempts, tasks
from flows.attempts import _is_over, begin
from stsr_core.catalog.claims import claim
from stsr_core.catalog.publish import Attempt, RedundantError, publish
from stsr_core.catalog.reconcile import reconcile
from stsr_core.errors import PublicationError
from tests.catalog.made import publication, publish_one, write_stores

NAME = "0123456789ab"


@dataclass
class Job:
    """What `begin` reads of a job."""

    destination: str
    name: str = "rain"
    options: dict[str, object] = field(default_factory=dict)


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.setattr(attempts, "attempt_name", lambda *_: NAME)
    monkeypatch.setattr(attempts, "owner", lambda: "me")
    monkeypatch.setattr(attempts, "_is_over", lambda run: run == "dead")
    monkeypatch.setattr(attempts, "event", lambda *_, **__: None)
    return Job(str(tmp_path))


def begun(job) -> Attempt | None:
    return begin(job, None, "f" * 64, after="", sole_publisher=False)


def named(job) -> Attempt:
    return replace(Attempt.begin(job.destination, job.name), name=NAME)


def claims(tmp_path):
    return list((tmp_path / "rain" / "claims").glob("*.json"))


def test_a_run_goes_on_with_what_a_dead_one_left_and_leaves_a_live_one_alone(job):
    assert claim(named(job), "dead", lambda _: False)
    assert begun(job).name == NAME
    assert claim(named(job), "alive", lambda _: True)
    assert begun(job).name != NAME


@pytest.mark.parametrize("later", [0, 1])
def test_what_is_published_is_not_begun_again_whatever_was_published_since(job, tmp_path, later):
    attempt = named(job)
    write_stores(attempt, 7)
    publish(attempt, publication(attempt))
    for _ in range(later):
        publish_one(tmp_path)
    assert begun(job) is None
    assert claims(tmp_path) == []


def test_an_attempt_that_an_interrupted_reconcile_announced_is_not_gone_on_with(job, tmp_path):
    publish_one(tmp_path)
    write_stores(named(job), 7)
    assert claim(named(job), "dead", lambda _: False)
    collection = tmp_path / "rain" / "collection.json"
    collection.write_text(json.dumps({**json.loads(collection.read_text()), "stsr:removing": [NAME]}))
    fresh = begun(job)
    assert fresh.name != NAME
    write_stores(fresh, 7)
    assert reconcile(job.destination, "rain") == [f"rain/data/{NAME}"]
    assert publish(fresh, publication(fresh)).version == "v2"
    assert begun(job).name == NAME


@pytest.mark.parametrize(
    ("answer", "over"),
    [
        (Crashed(), True),
        (Running(), False),
        (None, False),
        (ObjectNotFound(ValueError()), False),  # it may be at work by another server
        (httpx.ConnectError("away"), False),
    ],
)
def test_a_run_is_over_only_where_its_server_says_so(monkeypatch, answer, over):
    class Client:
        def read_flow_run(self, _):
            if isinstance(answer, Exception):
                raise answer
            return SimpleNamespace(state=answer)

    monkeypatch.setattr(attempts, "get_client", lambda **_: contextlib.nullcontext(Client()))
    assert _is_over(str(uuid.uuid4())) is over
    assert not _is_over("by hand")


@pytest.fixture
def publish_version(monkeypatch):
    """The task without what it gathers; called with an attempt and what stands in for `publish`."""
    for name in ("_description", "layout_of", "_provenance", "_side_files", "publish_checkpoint", "_shard_digests"):
        monkeypatch.setattr(tasks, name, lambda *_: None)
    monkeypatch.setattr(tasks, "owner", lambda: "me")
    monkeypatch.setattr(tasks, "event", lambda *_, **__: None)
    some = SimpleNamespace(fingerprint="", after="", factor=None, serving=lambda _: None)

    def call(attempt, publish):
        monkeypatch.setattr(tasks, "publish", publish)
        return tasks.publish_version.fn(None, None, some, some, some, attempt, None)

    return call


def test_a_run_whose_attempt_was_taken_over_publishes_nothing(job, publish_version):
    assert claim(named(job), "another", lambda _: True)
    with pytest.raises(PublicationError, match="Run another has taken over"):
        publish_version(named(job), None)


def test_what_was_published_meanwhile_is_removed(job, tmp_path, publish_version):
    write_stores(begun(job), 7)

    def redundant(*_):
        raise RedundantError("the same")

    assert publish_version(named(job), redundant) is None
    assert not (tmp_path / "rain" / "data" / NAME).exists()
    assert claims(tmp_path) == []
