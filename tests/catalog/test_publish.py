import errno
import json
import math
import multiprocessing
import os
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import cftime
import pystac
import pytest

import stsr_core.catalog
from stsr_core.catalog.claims import claim
from stsr_core.catalog.documents import ConflictError, Documents
from stsr_core.catalog.index import with_row
from stsr_core.catalog.manifest import make_manifest
from stsr_core.catalog.publish import RedundantError, listed, publish
from stsr_core.catalog.reconcile import _dead, _forget, reconcile, unlisted
from stsr_core.configuration import Gates
from stsr_core.errors import GateError, PublicationError, StoreError
from stsr_core.grids import TimeAxis
from stsr_core.store.verify import Gate, GateReport
from tests.catalog.made import DESCRIPTION, ENTRIES, LAYOUT, PROVENANCE, prepared, publication, publish_one

NOW = timedelta(0)


def test_versions_are_numbered_linked_and_valid(tmp_path):
    assert [publish_one(tmp_path, v) for v in (1, 2)] == ["v1", "v2"]
    catalog = pystac.Catalog.from_file(str(tmp_path / "catalog.json"))
    collection = next(catalog.get_children())
    collection.stac_extensions = []
    collection.validate()
    items = {i.properties["version"]: i for i in collection.get_items()}
    assert set(items) == {"v1", "v2"}
    for item in items.values():
        item.stac_extensions = []
        item.validate()
    assert items["v2"].get_single_link("predecessor-version").href.endswith("v1.json")
    assert items["v1"].get_single_link("successor-version").href.endswith("v2.json")
    assert collection.get_single_link("latest-version").href.endswith("v2.json")
    west, south, east, north = items["v1"].bbox
    assert 4.8 < west < east < 5.1
    assert 45.0 < south < north < 45.2
    assert items["v2"].properties["stsr:checkpoint_digest"] == "c" * 64


def test_collection_and_root_say_of_a_product_what_its_newest_version_says(tmp_path):
    publish_one(tmp_path)
    attempt = prepared(tmp_path)
    newest = replace(
        DESCRIPTION, title="New", description="New text.", license="CC-BY-4.0", attribution="ECMWF", keywords=("new",)
    )
    publish(attempt, replace(publication(attempt), description=newest))
    found = json.loads((tmp_path / "rain" / "collection.json").read_text())
    assert [found[k] for k in ("title", "description", "license", "keywords")] == [
        "New", "New text.", "CC-BY-4.0", ["new"],
    ]  # fmt: skip
    assert found["providers"] == [{"name": "ECMWF", "roles": ["producer", "licensor"]}]
    assert list(stsr_core.catalog.ls(str(tmp_path))["rain"]) == ["v1", "v2"]
    links = json.loads((tmp_path / "catalog.json").read_text())["links"]
    assert [x["title"] for x in links if x["rel"] == "child"] == ["New"]
    reconcile(str(tmp_path), "rain")
    assert json.loads((tmp_path / "catalog.json").read_text())["links"] == links


def test_readers_open_any_version(tmp_path):
    publish_one(tmp_path, 1)
    publish_one(tmp_path, 2)
    catalog = str(tmp_path)
    assert stsr_core.catalog.ls(catalog) == {"rain": ["v1", "v2"]}
    assert stsr_core.catalog.latest("rain", catalog).version == "v2"
    newest = stsr_core.catalog.open("rain", catalog=tmp_path)
    assert float(newest["precipitation"].max()) == pytest.approx(0.02)
    first = stsr_core.catalog.open("rain", "v1", catalog=catalog, group="overview")
    assert float(first["mean"].max()) == pytest.approx(0.01)
    with pytest.raises(StoreError, match="has no version 'v9'; it has v1, v2"):
        stsr_core.catalog.open("rain", "v9", catalog=catalog)
    with pytest.raises(StoreError, match="No version of product 'snow'.*products are rain"):
        stsr_core.catalog.open("snow", catalog=catalog)
    with pytest.raises(StoreError, match="No catalogue is at"):
        stsr_core.catalog.ls(str(tmp_path / "none"))
    assert stsr_core.catalog.latest("snow", catalog) is None


def test_a_failed_gate_publishes_nothing_and_keeps_the_attempt(tmp_path):
    attempt = prepared(tmp_path)
    bad = GateReport(gates=(Gate(name="closure", passed=False, found="3 quanta", needed="0 quanta", where="m0-t0"),))
    with pytest.raises(GateError, match=r"closure: found 3 quanta, needed 0 quanta \(m0-t0\)"):
        publish(attempt, publication(attempt, bad))
    assert stsr_core.catalog.latest("rain", str(tmp_path)) is None
    assert Path(attempt.group_url("ensemble")).exists()


def test_a_store_that_is_not_whole_is_not_published(tmp_path):
    attempt = prepared(tmp_path)
    Path(attempt.group_url("overview"), "zarr.json").unlink()
    with pytest.raises(PublicationError, match="overview is not whole"):
        publish(attempt, publication(attempt))


def item_path(catalog, version="latest"):
    return Path(stsr_core.catalog.find("rain", version, str(catalog)).url)


def test_what_a_crash_left_is_invisible_and_reconcile_removes_it(tmp_path):
    publish_one(tmp_path)
    lost = prepared(tmp_path)
    Path(lost.url, "v2.json").write_text(item_path(tmp_path).read_text())  # a crash between item and collection
    (tmp_path / "rain" / "index" / "0123456789ab.parquet").write_bytes(b"lost")
    assert stsr_core.catalog.ls(str(tmp_path)) == {"rain": ["v1"]}
    assert reconcile(str(tmp_path), "rain") == []  # it may be alive
    leftovers = {"rain/index/0123456789ab.parquet", lost.prefix}
    assert set(reconcile(str(tmp_path), "rain", grace=NOW, dry_run=True)) == leftovers
    assert Path(lost.url).exists()
    assert set(reconcile(str(tmp_path), "rain", grace=NOW)) == leftovers
    assert not Path(lost.url).exists()
    assert float(stsr_core.catalog.open("rain", catalog=str(tmp_path))["precipitation"].max()) > 0
    assert reconcile(str(tmp_path), "rain", grace=NOW) == []
    assert publish_one(tmp_path) == "v2"


def test_of_two_that_made_the_same_at_once_one_is_published(tmp_path):
    first, second, later = (prepared(tmp_path) for _ in range(3))
    assert publish(first, replace(publication(first), after="")).version == "v1"
    with pytest.raises(
        RedundantError, match=r"rain-v1 was published meanwhile from the same source by the same recipe"
    ):
        publish(second, replace(publication(second), after=""))
    other = replace(publication(second), after="", provenance=PROVENANCE.model_copy(update={"seed": 2}))
    assert publish(second, other).version == "v2"
    assert publish(later, replace(publication(later), after="v2")).version == "v3"  # asked for again, as by --force


def test_a_publisher_whose_answer_is_lost_finds_its_version_and_publishes_it_once(tmp_path, monkeypatch):
    publish_one(tmp_path)
    replace_ = Documents.replace
    lost = []

    def replaced(documents, path, document, tag):
        replace_(documents, path, document, tag)
        if path.endswith("collection.json") and not lost:
            lost.append(path)
            raise ConflictError("as a server says that is asked again for what it has done")

    monkeypatch.setattr(Documents, "replace", replaced)
    attempt = prepared(tmp_path)
    assert publish(attempt, publication(attempt)).version == "v2"
    assert stsr_core.catalog.ls(str(tmp_path)) == {"rain": ["v1", "v2"]}
    assert [p.name for p in Path(attempt.url).glob("v*.json")] == ["v2.json"]
    assert float(stsr_core.catalog.open("rain", catalog=str(tmp_path))["precipitation"].max()) > 0


def test_a_publisher_that_loses_leaves_neither_item_nor_index_of_the_lost_number(tmp_path, monkeypatch):
    publish_one(tmp_path)
    attempt = prepared(tmp_path)
    ready = publication(attempt)

    def slow(*arguments):
        monkeypatch.undo()
        publish_one(tmp_path)
        return with_row(*arguments)

    monkeypatch.setattr("stsr_core.catalog.publish.with_row", slow)
    assert publish(attempt, ready).version == "v3"
    assert [p.name for p in Path(attempt.url).glob("v*.json")] == ["v3.json"]
    assert len(list((tmp_path / "rain" / "index").glob("*.parquet"))) == 3  # one a version, of which one counts


def test_versions_are_listed_by_number():
    links = [{"rel": "item", "href": f"./data/0123456789ab/v{n}.json"} for n in (10, 9, 2, 11)]
    assert list(listed({"links": links})) == ["v2", "v9", "v10", "v11"]


def test_an_item_that_is_not_what_it_must_be_is_not_published(tmp_path):
    attempt = prepared(tmp_path)
    bad = PROVENANCE.model_copy(update={"checkpoint_digest": "none"})
    with pytest.raises(PublicationError, match="checkpoint_digest"):
        publish(attempt, replace(publication(attempt), provenance=bad))
    endless = ENTRIES.product.model_copy(update={"gates": Gates().model_copy(update={"max_mm": math.inf})})
    entries = ENTRIES.model_copy(update={"product": endless})
    with pytest.raises(PublicationError, match="max_mm: Input should be a finite number"):
        publish(
            attempt,
            replace(publication(attempt), provenance=PROVENANCE.model_copy(update={"configuration": entries})),
        )
    assert not list(Path(attempt.url).glob("v*.json"))
    assert stsr_core.catalog.latest("rain", str(tmp_path)) is None


def test_a_collection_reaches_from_the_first_to_the_last_time_of_any_version(tmp_path):
    for year in (2018, 2010, 2012):
        attempt = prepared(tmp_path)
        times = TimeAxis(datetime(year, 5, 1), timedelta(hours=1), 2)
        publish(attempt, replace(publication(attempt), layout=replace(LAYOUT, times=times)))
    found = json.loads((tmp_path / "rain" / "collection.json").read_text())
    assert found["extent"]["temporal"]["interval"] == [["2010-05-01T00:00:00Z", "2018-05-01T02:00:00Z"]]


def test_a_claim_lives_as_long_as_its_attempt_writes(tmp_path):
    publish_one(tmp_path)
    begun = prepared(tmp_path)
    assert claim(begun, "run", lambda _: False)
    place = tmp_path / "rain" / "claims" / f"{begun.name}.json"
    os.utime(place, (0, 0))
    assert reconcile(str(tmp_path), "rain") == []
    for path in Path(begun.url).rglob("*"):
        os.utime(path, (0, 0))
    assert set(reconcile(str(tmp_path), "rain")) == {begun.prefix, f"rain/claims/{begun.name}.json"}
    assert not place.exists()


def test_what_a_product_without_a_version_left_is_removed_and_its_first_publisher_goes_on(tmp_path):
    lost = prepared(tmp_path)
    (tmp_path / "mine" / "data" / "2020").mkdir(parents=True)
    (tmp_path / "mine" / "data" / "2020" / "rain.nc").touch()
    assert reconcile(str(tmp_path), "rain") == []  # it may be alive
    assert not (tmp_path / "rain" / "collection.json").exists()
    assert unlisted(str(tmp_path)) == ["rain"]
    assert reconcile(str(tmp_path), "rain", grace=NOW, dry_run=True) == [lost.prefix]
    assert reconcile(str(tmp_path), "rain", grace=NOW) == [lost.prefix]
    assert not Path(lost.url).exists()
    assert reconcile(str(tmp_path), "mine", grace=NOW) == []
    assert (tmp_path / "mine" / "data" / "2020" / "rain.nc").exists()
    assert unlisted(str(tmp_path)) == []
    assert publish_one(tmp_path) == "v1"
    found = json.loads((tmp_path / "rain" / "collection.json").read_text())
    assert found["title"] == "Rain"
    item = json.loads(item_path(tmp_path).read_text())
    assert found["extent"]["spatial"]["bbox"] == [item["bbox"]]
    period = [item["properties"][f"{end}_datetime"] for end in ("start", "end")]
    assert found["extent"]["temporal"]["interval"] == [period]


def test_a_publisher_of_a_first_version_that_was_taken_for_dead_publishes_nothing(tmp_path):
    slow = prepared(tmp_path)
    ready = publication(slow)
    assert reconcile(str(tmp_path), "rain", grace=NOW) == [slow.prefix]
    with pytest.raises(PublicationError, match="is not whole"):
        publish(slow, ready)
    assert stsr_core.catalog.latest("rain", str(tmp_path)) is None


def test_what_is_published_between_look_and_announcement_is_neither_announced_nor_removed(tmp_path, monkeypatch):
    publish_one(tmp_path)
    slow, lost = prepared(tmp_path), prepared(tmp_path)
    ready = publication(slow)

    def looked(*arguments):
        dead = _dead(*arguments)
        assert publish(slow, ready).version == "v2"
        return dead

    monkeypatch.setattr("stsr_core.catalog.reconcile._dead", looked)
    assert reconcile(str(tmp_path), "rain", grace=NOW) == [lost.prefix]
    assert float(stsr_core.catalog.open("rain", "v2", catalog=str(tmp_path))["precipitation"].max()) > 0
    assert "stsr:removing" not in json.loads((tmp_path / "rain" / "collection.json").read_text())


def test_a_collection_never_becomes_what_it_was_however_often_it_is_reconciled(tmp_path):
    publish_one(tmp_path)
    states = []
    for _ in range(3):
        prepared(tmp_path)
        assert len(reconcile(str(tmp_path), "rain", grace=NOW)) == 1
        states.append((tmp_path / "rain" / "collection.json").read_bytes())
    assert len(set(states)) == 3


def test_what_another_reconcile_announced_stays_announced(tmp_path):
    documents = Documents(str(tmp_path))
    documents.create("rain/collection.json", {"stsr:removing": ["a", "b"]})
    _forget(documents, "rain/collection.json", {"a"})
    assert documents.read("rain/collection.json")[0] == {"stsr:removing": ["b"]}


@pytest.mark.parametrize("name", ["", "..", "a/b"])
def test_nothing_outside_a_product_is_reconciled(tmp_path, name):
    with pytest.raises(PublicationError, match="is no name of a product"):
        reconcile(str(tmp_path), name, grace=NOW)


def test_what_cannot_be_removed_is_an_error_and_stays_announced(tmp_path, monkeypatch):
    publish_one(tmp_path)
    lost = prepared(tmp_path)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", lost.url)

    monkeypatch.setattr(os, "rmdir", refuse)
    with pytest.raises(PublicationError, match=rf"{lost.name} cannot be removed \(Permission denied\)"):
        reconcile(str(tmp_path), "rain", grace=NOW)
    monkeypatch.undo()
    assert json.loads((tmp_path / "rain" / "collection.json").read_text())["stsr:removing"] == [lost.name]
    assert reconcile(str(tmp_path), "rain") == [lost.prefix]
    Documents(str(tmp_path)).remove(lost.prefix)  # nothing is there any more


def test_an_attempt_that_was_claimed_anew_is_not_dead_though_it_wrote_nothing_since(tmp_path):
    publish_one(tmp_path)
    left = prepared(tmp_path)
    for path in Path(left.url).rglob("*"):
        os.utime(path, (0, 0))
    assert claim(left, "run", lambda _: False)
    assert reconcile(str(tmp_path), "rain") == []
    os.utime(tmp_path / "rain" / "claims" / f"{left.name}.json", (0, 0))
    assert len(reconcile(str(tmp_path), "rain")) == 2


def test_a_publisher_that_was_taken_for_dead_publishes_nothing(tmp_path):
    publish_one(tmp_path)
    slow = prepared(tmp_path)
    ready = publication(slow)
    collection = tmp_path / "rain" / "collection.json"
    announced = {**json.loads(collection.read_text()), "stsr:removing": [slow.name]}
    collection.write_text(json.dumps(announced))  # a reconcile that died after its announcement
    with pytest.raises(PublicationError, match="removed as left by a crash"):
        publish(slow, ready)
    assert reconcile(str(tmp_path), "rain") == [slow.prefix]
    assert "stsr:removing" not in json.loads(collection.read_text())
    with pytest.raises(PublicationError, match="is not whole"):
        publish(slow, ready)
    assert stsr_core.catalog.ls(str(tmp_path)) == {"rain": ["v1"]}


def test_a_publisher_whose_attempt_is_removed_while_it_publishes_publishes_nothing(tmp_path, monkeypatch):
    publish_one(tmp_path)
    slow = prepared(tmp_path)
    ready = publication(slow)

    def outlasted(*arguments):
        manifest = make_manifest(*arguments)
        assert reconcile(str(tmp_path), "rain", grace=NOW) == [slow.prefix]  # and nothing is announced any more
        return manifest

    monkeypatch.setattr("stsr_core.catalog.publish.make_manifest", outlasted)
    with pytest.raises(PublicationError, match="is not whole"):
        publish(slow, ready)
    assert stsr_core.catalog.ls(str(tmp_path)) == {"rain": ["v1"]}


def test_links_that_a_dying_publisher_owed_are_made_good(tmp_path):
    publish_one(tmp_path)
    publish_one(tmp_path)
    first = item_path(tmp_path, "v1")
    document = json.loads(first.read_text())
    owed = [x for x in document["links"] if x["rel"] == "successor-version"]
    first.write_text(json.dumps({**document, "links": [x for x in document["links"] if x not in owed]}))
    (tmp_path / "catalog.json").unlink()
    reconcile(str(tmp_path), "rain")
    assert [x for x in json.loads(first.read_text())["links"] if x["rel"] == "successor-version"] == owed
    assert stsr_core.catalog.ls(str(tmp_path)) == {"rain": ["v1", "v2"]}


def test_a_foreign_or_damaged_catalogue_is_refused_and_left_as_it_is(tmp_path):
    publish_one(tmp_path)
    collection = tmp_path / "rain" / "collection.json"
    sound = json.loads(collection.read_text())
    attempt = prepared(tmp_path)
    ready = publication(attempt)
    foreign = {"rel": "item", "href": "../../etc/passwd"}
    for damaged in ({**sound, "links": [*sound["links"], foreign]}, []):
        collection.write_text(json.dumps(damaged))
        with pytest.raises(PublicationError, match="is damaged"):
            publish(attempt, ready)
        with pytest.raises(PublicationError, match="is damaged"):
            reconcile(str(tmp_path), "rain", grace=NOW)
        assert json.loads(collection.read_text()) == damaged
    collection.write_text(json.dumps(sound))
    assert publish(attempt, ready).version == "v2"


def _publish_many(destination: str, count: int) -> None:
    for _ in range(count):
        publish_one(destination)


def test_publishers_that_race_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    publishers = [context.Process(target=_publish_many, args=(str(tmp_path), 3)) for _ in range(3)]
    for p in publishers:
        p.start()
    for p in publishers:
        p.join()
        assert p.exitcode == 0
    listed = stsr_core.catalog.ls(str(tmp_path))["rain"]
    assert len(listed) == 9
    assert len(set(listed)) == 9
    assert len({item_path(tmp_path, v).parent for v in listed}) == 9
    found = stsr_core.catalog.search(str(tmp_path), stsr_core.catalog.Query(limit=20))
    assert sorted(v.version for v in found) == sorted(listed)


def test_documents_are_created_once_and_replaced_only_from_the_state_read(tmp_path):
    documents = Documents(str(tmp_path))
    documents.create("a.json", {"n": 1})
    with pytest.raises(ConflictError, match="never overwritten"):
        documents.create("a.json", {"n": 2})
    _, tag = documents.read("a.json")
    documents.replace("a.json", {"n": 3}, tag)
    with pytest.raises(ConflictError, match="changed by another publisher"):
        documents.replace("a.json", {"n": 4}, tag)
    assert documents.read("a.json")[0] == {"n": 3}
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(PublicationError, match="is damaged"):
        documents.read("a.json")


def test_a_destination_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PublicationError, match="cannot be written"):
        Documents(str(tmp_path / "file" / "x")).create("a.json", {})


@pytest.mark.parametrize(
    ("start", "hours", "period"),
    [
        (datetime(2001, 2, 3, 4, 5), 1, ["2001-02-03T04:05:00Z", "2001-02-03T05:05:00Z"]),
        (cftime.Datetime360Day(2001, 2, 28), 24, ["2001-02-28T00:00:00Z", "2001-03-01T00:00:00Z"]),
        (cftime.Datetime360Day(2001, 2, 29), 24, ["2001-02-28T00:00:00Z", "2001-03-01T00:00:00Z"]),
        (cftime.Datetime360Day(2001, 2, 29, 12), 18, ["2001-02-28T12:00:00Z", "2001-03-01T00:00:00Z"]),
        (cftime.Datetime360Day(2001, 2, 30), 24, ["2001-02-28T00:00:00Z", "2001-03-01T00:00:00Z"]),
        (cftime.Datetime360Day(2001, 2, 30, 6), 6, ["2001-02-28T06:00:00Z", "2001-03-01T00:00:00Z"]),
        (cftime.Datetime360Day(2004, 2, 30), 30, ["2004-02-29T00:00:00Z", "2004-03-01T06:00:00Z"]),
        (cftime.DatetimeAllLeap(2001, 2, 28), 36, ["2001-02-28T00:00:00Z", "2001-03-01T00:00:00Z"]),
    ],
)
def test_periods_of_other_calendars_are_published_with_dates_of_the_standard_one(tmp_path, start, hours, period):
    attempt = prepared(tmp_path)
    layout = replace(LAYOUT, times=TimeAxis(start, timedelta(hours=hours / 2), 2))
    publish(attempt, replace(publication(attempt), layout=layout))
    properties = json.loads(item_path(tmp_path).read_text())["properties"]
    assert [properties["start_datetime"], properties["end_datetime"]] == period
    assert properties["cube:dimensions"]["time"]["extent"] == period
