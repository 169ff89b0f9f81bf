"""Where a run writes; no server runs here, and no plan is made: an attempt's name is all that counts."""

from dataclasses import dataclass, field, replace

import pytest

from flows import attempts
from flows.attempts import begin
from stsr_core.catalog.claims import claim
from stsr_core.catalog.publish import Attempt, publish
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
