"""Withdrawal: what every kind of reader is told, and that nobody's work is lost beside it."""

import json
import multiprocessing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pystac
import pytest
from typer.testing import CliRunner

import stsr_core.catalog
from stsr_core.catalog import Query
from stsr_core.catalog.documents import Documents
from stsr_core.catalog.reconcile import reconcile
from stsr_core.catalog.retention import expired, retire
from stsr_core.catalog.withdrawal import WITHDRAWN, restore, settle_item, withdraw
from stsr_core.cli import app
from stsr_core.errors import PublicationError, StoreError, WithdrawnWarning
from tests.catalog.made import publish_one

REASON = "The units of the source were wrong."


@pytest.fixture
def three(tmp_path):
    for value in (1, 2, 3):
        publish_one(tmp_path, value)
    return str(tmp_path)


def stored_item(catalog, version):
    return json.loads(Path(stsr_core.catalog.find("rain", version, catalog).url).read_text())


def greatest(catalog, version="latest"):
    return float(stsr_core.catalog.open("rain", version, catalog=catalog)["precipitation"].max())


def test_readers_of_latest_get_the_good_version_before_and_the_withdrawn_one_says_why(three):
    assert withdraw("rain", "v3", REASON, three) == "v2"
    assert greatest(three) == pytest.approx(0.02)
    assert stsr_core.catalog.latest("rain", three).version == "v2"
    assert stsr_core.catalog.newest("rain", three).version == "v3"
    with pytest.warns(WithdrawnWarning, match=f"rain v3 is withdrawn: {REASON}"):
        assert greatest(three, "v3") == pytest.approx(0.03)
    assert stsr_core.catalog.withdrawn("rain", three)["v3"].reason == REASON
    properties = stored_item(three, "v3")["properties"]
    assert (properties["deprecated"], properties[WITHDRAWN]) == (True, REASON)
    assert stsr_core.catalog.ls(three) == {"rain": ["v1", "v2", "v3"]}


def test_readers_without_our_code_see_it_too(three):
    withdraw("rain", "v3", REASON, three)
    collection = next(pystac.Catalog.from_file(f"{three}/catalog.json").get_children())
    assert collection.get_single_link("latest-version").href.endswith("v2.json")
    assert collection.extra_fields["version"] == "v2"
    with pytest.warns(pystac.errors.DeprecatedWarning):  # the library itself says so
        items = {i.properties["version"]: i for i in collection.get_items()}
    assert [v for v, i in items.items() if i.properties["deprecated"]] == ["v3"]
    items["v3"].stac_extensions = []
    items["v3"].validate()


def test_search_tells_good_versions_from_withdrawn_ones(three):
    withdraw("rain", "v2", REASON, three)

    def found(text):
        return [v.version for v in stsr_core.catalog.search(three, Query(filter=text))]

    assert found("deprecated = true") == ["v2"]
    assert found("deprecated = false") == ["v3", "v1"]
    assert found(f"\"{WITHDRAWN}\" LIKE '%units%'") == ["v2"]
    assert {v.version: v.withdrawn for v in stsr_core.catalog.search(three, Query())} == {
        "v3": None, "v2": REASON, "v1": None,
    }  # fmt: skip


def test_a_publication_after_a_withdrawal_is_latest_and_leaves_it_withdrawn(three):
    withdraw("rain", "v3", REASON, three)
    assert publish_one(three, 4) == "v4"
    assert stsr_core.catalog.latest("rain", three).version == "v4"
    assert list(stsr_core.catalog.withdrawn("rain", three)) == ["v3"]


def test_a_withdrawal_is_taken_back(three):
    before = stored_item(three, "v3")
    withdraw("rain", "v3", REASON, three)
    assert restore("rain", "v3", three) == "v3"
    after = stored_item(three, "v3")
    assert {**after["properties"], "updated": ""} == {**before["properties"], "updated": ""}
    assert greatest(three) == pytest.approx(0.03)
    assert stsr_core.catalog.search(three, Query(filter="deprecated = true")) == []


def test_without_a_good_version_latest_is_refused_with_the_reasons(three):
    for version in ("v1", "v2"):
        withdraw("rain", version, REASON, three)
    assert withdraw("rain", "v3", "Too wet.", three) is None
    collection, _ = Documents(three).read("rain/collection.json")
    assert "version" not in collection
    assert "latest-version" not in [x["rel"] for x in collection["links"]]
    assert stsr_core.catalog.latest("rain", three) is None
    with pytest.raises(StoreError, match=r"Every version of rain is withdrawn \(v1: The units.*v3: Too wet\.\)"):
        stsr_core.catalog.open("rain", catalog=three)
    assert publish_one(three, 4) == "v4"
    assert greatest(three) == pytest.approx(0.04)


def test_what_cannot_be_withdrawn_changes_nothing(three):
    path = Path(three, "rain", "collection.json")
    withdraw("rain", "v2", REASON, three)
    before = path.read_bytes()
    assert withdraw("rain", "v2", REASON, three) == "v3"  # again is no harm
    for version, reason, message in (
        ("v9", REASON, "has no version 'v9'; it has v1, v2, v3"),
        ("../v1", REASON, "has no version"),
        ("v2", "Another.", "withdrawn already, since .*: The units of the source were wrong"),
        ("v1", " ", "1 characters is given; one line of 1 to 500"),
        ("v1", "a\nb", "one line"),
        ("v1", "x" * 501, "501 characters"),
    ):
        with pytest.raises(PublicationError, match=message):
            withdraw("rain", version, reason, three)
    assert withdraw("rain", "v3", REASON, three, dry_run=True) == "v1"
    assert path.read_bytes() == before
    with pytest.raises(PublicationError, match="No product snow"):
        withdraw("snow", "v1", REASON, three)


def test_an_item_whose_withdrawal_a_crash_owed_is_made_good(three, monkeypatch):
    def died(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("stsr_core.catalog.withdrawal.settle_item", died)
        withdraw("rain", "v3", REASON, three)
    assert not stored_item(three, "v3")["properties"]["deprecated"]
    assert stsr_core.catalog.find("rain", "v3", three).withdrawn == REASON  # readers are told already
    reconcile(three, "rain")
    assert stored_item(three, "v3")["properties"][WITHDRAWN] == REASON


def test_a_damaged_item_is_told_later_of_what_took_effect_without_it(three, caplog):
    damaged, sound = Path(stsr_core.catalog.find("rain", "v3", three).url), stored_item(three, "v3")
    damaged.write_text("{")
    assert withdraw("rain", "v3", REASON, three) == "v2"
    assert publish_one(three, 4) == "v4"
    reconcile(three, "rain")
    assert caplog.text.count("v3.json is damaged") == 4  # the withdrawal, the publication, the reconcile twice
    damaged.write_text(json.dumps(sound))
    reconcile(three, "rain")
    after = stored_item(three, "v3")
    assert after["properties"][WITHDRAWN] == REASON
    assert [x["href"][-7:] for x in after["links"] if x["rel"] == "successor-version"] == ["v4.json"]


def test_who_settles_an_item_late_undoes_no_withdrawal_that_came_meanwhile(three):
    documents = Documents(three)
    before, _ = documents.read("rain/collection.json")
    withdraw("rain", "v3", REASON, three)
    item = stored_item(three, "v3")
    settle_item(documents, "rain", before, "v3")
    assert stored_item(three, "v3") == item


def test_neither_the_newest_nor_the_latest_good_version_is_retired(three):
    withdraw("rain", "v3", REASON, three)
    for version in ("v2", "v3"):
        with pytest.raises(PublicationError, match=f"{version} is the latest version of rain"):
            retire("rain", ["v1", version], three)
    now = datetime(2026, 1, 10, tzinfo=UTC)
    created = {f"v{n}": now - timedelta(days=10 - n) for n in range(1, 6)}
    gone = expired(created, keep=2, age=timedelta(0), now=now, withdrawn={"v3", "v5"})
    assert gone == ["v1", "v3"]  # v2 and v4 are the newest good ones, v5 the newest


def _publish(destination, count):
    for _ in range(count):
        publish_one(destination)


def test_withdrawals_beside_publishers_lose_nothing(tmp_path):
    publish_one(tmp_path)
    publish_one(tmp_path)
    context = multiprocessing.get_context("fork")
    publishers = [context.Process(target=_publish, args=(str(tmp_path), 3)) for _ in range(2)]
    for p in publishers:
        p.start()
    for round_ in range(4):
        withdraw("rain", "v2", f"Round {round_}.", str(tmp_path))
        restore("rain", "v2", str(tmp_path))
        withdraw("rain", "v1", REASON, str(tmp_path))
    for p in publishers:
        p.join()
        assert p.exitcode == 0
    found = stsr_core.catalog.search(str(tmp_path), Query(limit=20))
    assert {v.version: v.withdrawn for v in found} == {"v1": REASON} | {f"v{n}": None for n in range(2, 9)}
    reconcile(str(tmp_path), "rain", grace=timedelta(0))
    assert len(Documents(str(tmp_path)).names("rain/data")) == 8


def run(*arguments):
    done = CliRunner().invoke(app, ["catalog", *arguments])
    return done.output if done.exception is None else str(done.exception)


@pytest.mark.filterwarnings("default::stsr_core.errors.WithdrawnWarning")
def test_the_command_line_withdraws_says_so_restores_and_retires(three):
    place = ("--catalog", three)
    why = ("--reason", REASON)
    would = "rain v3 would be withdrawn; latest is v2.\n"
    assert run("withdraw", "rain", "v3", *why, "--dry-run", *place) == would
    assert run("withdraw", "rain", "v3", *why, *place) == "rain v3 is withdrawn; latest is v2.\n"
    assert run("ls", *place) == "rain: v1, v2, v3 (withdrawn)\n"
    assert f": {REASON}" in run("show", "rain", "--version", "v3", *place)
    assert f"WITHDRAWN: {REASON}" in run("search", *place)
    assert run("cite", "rain", "--version", "v3", *place).count(f"WITHDRAWN: {REASON}") == 2
    assert "WITHDRAWN" not in run("cite", "rain", *place)
    assert run("restore", "rain", "v3", *place) == "rain v3 is good again; latest is v3.\n"
    rule = ("retire", "rain", "--keep", "1", "--days", "0", *place)
    assert run(*rule, "--dry-run") == "v1, v2 would leave the catalogue of rain.\n"
    assert run(*rule) == "v1, v2 left the catalogue of rain.\n"
    assert run("ls", *place) == "rain: v3\n"


def test_the_command_line_refuses_products_that_are_not_there_and_options_that_do_nothing(three):
    place = ("--catalog", three)
    for command in (("retire", "rian", "--keep", "1", "--days", "0"), ("reconcile", "rian")):
        assert "has neither versions nor data of a product 'rian'. See `stsr catalog ls`" in run(*command, *place)
    folder = stsr_core.catalog.find("rain", "v2", three).folder
    assert "--version v1 is of a product, with --catalog" in run("verify", folder, "--version", "v1")
    assert "v2 is as published" in run("verify", folder)
