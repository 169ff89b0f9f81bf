from datetime import UTC, datetime, timedelta

import pystac
import pytest
from pystac.extensions.version import VersionExtension

from stsr_core.catalog import ls
from stsr_core.catalog.index import Query
from stsr_core.catalog.reconcile import reconcile
from stsr_core.catalog.retention import expired, expiring, retire
from stsr_core.catalog.search import search
from stsr_core.errors import PublicationError
from tests.catalog.made import publish_one

NOW = datetime(2026, 1, 10, tzinfo=UTC)


@pytest.mark.parametrize(
    ("keep", "days", "gone"),
    [
        (1, 0, ["v1", "v2", "v3"]),  # all but the latest
        (2, 0, ["v1", "v2"]),
        (1, 8, ["v1", "v2"]),  # v3 is 7 days old
        (10, 0, []),
    ],
)
def test_what_expires(keep, days, gone):
    created = {f"v{n}": NOW - timedelta(days=10 - n) for n in range(1, 5)}
    assert expired(created, keep=keep, age=timedelta(days=days), now=NOW) == gone


def test_retired_versions_leave_collection_index_and_disk_and_the_next_number_goes_on(tmp_path):
    for value in (1, 2, 3):
        publish_one(tmp_path, value)
    rule = {"keep": 1, "age": timedelta(0)}
    assert expiring("rain", str(tmp_path), **rule) == ["v1", "v2"]
    retire("rain", ["v1", "v2"], str(tmp_path))
    assert ls(str(tmp_path)) == {"rain": ["v3"]}
    assert [v.version for v in search(str(tmp_path), Query(), product="rain")] == ["v3"]
    removed = reconcile(str(tmp_path), "rain", grace=timedelta(0))
    assert len([r for r in removed if "/data/" in r]) == 2
    assert len(list((tmp_path / "rain" / "data").iterdir())) == 1
    assert publish_one(tmp_path, 4) == "v4"


def test_versions_that_stay_link_to_none_that_are_gone(tmp_path):
    for value in (1, 2, 3, 4):
        publish_one(tmp_path, value)
    for gone, chain in (("v2", ["v1", "v3", "v4"]), ("v1", ["v3", "v4"])):
        retire("rain", [gone], str(tmp_path))
        reconcile(str(tmp_path), "rain", grace=timedelta(0))
        items = pystac.Catalog.from_file(str(tmp_path / "catalog.json")).get_items(recursive=True)
        linked = [(x.predecessor, x.item, x.successor) for x in map(VersionExtension.ext, items)]
        named = [[item and item.properties["version"] for item in three] for three in linked]
        assert named == [list(three) for three in zip([None, *chain], chain, [*chain[1:], None], strict=False)]


def test_the_latest_version_is_never_retired(tmp_path):
    publish_one(tmp_path)
    with pytest.raises(PublicationError, match="v1 is the latest version of rain"):
        retire("rain", ["v1"], str(tmp_path))
    assert ls(str(tmp_path)) == {"rain": ["v1"]}
