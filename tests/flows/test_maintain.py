"""The maintain flow's own decisions; its tasks run as plain functions, no server runs here."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from flows import maintain as module
from stsr_core.catalog import latest
from stsr_core.catalog.publish import Attempt, publish
from stsr_core.errors import ConfigurationError, PublicationError, StoreError
from tests.catalog.made import DESCRIPTION, publication, write_stores


def publish_as(destination, product) -> Path:
    attempt = Attempt.begin(str(destination), product)
    write_stores(attempt, 7)
    publish(attempt, replace(publication(attempt), description=replace(DESCRIPTION, product=product)))
    return Path(attempt.url)


def left(destination, product) -> Path:
    """An attempt that nothing was written to for years."""
    folder = destination / product / "data" / "aaaaaaaaaaaa"
    folder.mkdir(parents=True)
    (folder / "zarr.json").write_text("{}")
    os.utime(folder / "zarr.json", (1, 1))
    return folder


@pytest.fixture
def shown(monkeypatch):
    """What a run says that it did, by product."""
    rows = {}
    monkeypatch.setattr(module, "patient", lambda task, name, hours: task.fn)
    monkeypatch.setattr(module, "event", lambda *_, **__: None)
    monkeypatch.setattr(module.artifacts, "table", lambda _, found, __: rows.update({r["product"]: r for r in found}))
    return rows


def test_a_damaged_product_keeps_no_other_from_being_kept_up(tmp_path, shown):
    damaged, _ = publish_as(tmp_path, "one"), publish_as(tmp_path, "two")
    publish_as(tmp_path, "zero")
    (damaged / "manifest.json").unlink()
    (tmp_path / "two" / "collection.json").write_text("[]")
    leftover = left(tmp_path, "zero")
    with pytest.raises(StoreError, match=r"found: 4. one v1: .* has no manifest.json.*list two"):
        module.maintain.fn(destination=str(tmp_path), retention=module.Retention(keep=1, days=0))
    assert not leftover.exists()
    assert shown["zero"]["checked"] == "v1"
    assert shown["zero"]["flaws"] == "none"


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("{")])
@pytest.mark.parametrize("name", ["manifest.json", "v1.json"])
def test_a_version_too_damaged_to_be_checked_is_a_flaw_at_the_first_try(tmp_path, shown, name, damage):
    damage(publish_as(tmp_path, "rain") / name)
    [flaw] = module.verify.fn("rain", "v1", str(tmp_path))
    assert name in flaw


def test_a_withdrawal_is_of_one_product_and_comes_before_all_else(tmp_path, shown):
    publish_as(tmp_path, "rain")
    said = module.Withdrawal(version="v1", reason="Too wet.")
    with pytest.raises(ConfigurationError, match="v1 of all products.*Name the product"):
        module.maintain.fn(destination=str(tmp_path), withdrawal=said)
    leftover = left(tmp_path, "rain")
    with pytest.raises(PublicationError, match="has no version 'v2'"):
        module.maintain.fn("rain", destination=str(tmp_path), withdrawal=said.model_copy(update={"version": "v2"}))
    assert leftover.exists()
    module.maintain.fn("rain", destination=str(tmp_path), withdrawal=said)
    assert latest("rain", str(tmp_path)) is None
    assert not leftover.exists()


def test_all_means_what_never_got_a_version_too_and_nothing_where_nothing_is_there(tmp_path, shown):
    assert module.maintain.fn(destination=str(tmp_path)) == []
    claimed = tmp_path / "hail" / "claims" / "aaaaaaaaaaaa.json"  # by a run that was killed before it wrote anything
    claimed.parent.mkdir(parents=True)
    claimed.write_text("{}")
    os.utime(claimed, (1, 1))
    [upkeep] = module.maintain.fn(destination=str(tmp_path))
    assert (upkeep.product, upkeep.removed, claimed.exists()) == ("hail", ["hail/claims/aaaaaaaaaaaa.json"], False)
    for published in ([], ["rain"]):
        leftover = left(tmp_path, "snow")
        [publish_as(tmp_path, name) for name in published]
        done = module.maintain.fn(destination=str(tmp_path))
        assert [upkeep.product for upkeep in done] == [*published, "snow"]
        assert done[-1].removed == ["snow/data/aaaaaaaaaaaa"]
        assert not leftover.exists()


def test_the_item_that_is_listed_is_checked_whatever_a_crash_left_beside_it(tmp_path, shown):
    folder = publish_as(tmp_path, "rain")
    (folder / "v9.json").write_text("[]")
    [upkeep] = module.maintain.fn(destination=str(tmp_path))
    assert latest("rain", str(tmp_path)).version == "v1"
    assert upkeep.checked == ["v1"]


def test_the_version_that_readers_get_is_checked_where_the_newest_is_withdrawn(tmp_path, shown):
    folder, _ = publish_as(tmp_path, "rain"), publish_as(tmp_path, "rain")
    (folder / "manifest.json").unlink()
    withdrawal = module.Withdrawal(version="v2", reason="Too wet.")
    with pytest.raises(StoreError, match=r"found: 1. rain v1: .* has no manifest.json"):
        module.maintain.fn("rain", destination=str(tmp_path), withdrawal=withdrawal)
    assert shown["rain"]["checked"] == "v1"


def test_a_product_that_is_not_there_is_refused(tmp_path, shown):
    publish_as(tmp_path, "rain")
    with pytest.raises(StoreError, match=r"neither versions nor data of a product 'rian'"):
        module.maintain.fn("rian", destination=str(tmp_path))
