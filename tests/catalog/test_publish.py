import json
import multiprocessing
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pystac
import pytest
from pyproj import CRS

import stsr_core.catalog
from stsr_core.catalog.documents import ConflictError, Documents
from stsr_core.catalog.items import Description, Provenance, instant
from stsr_core.catalog.publish import Attempt, Publication, publish, reconcile
from stsr_core.errors import GateError, PublicationError, StoreError
from stsr_core.grids import Axis, Grid, TimeAxis
from stsr_core.store.layout import StoreLayout, create_ensemble, finish, write_shard
from stsr_core.store.overview import write_overview
from stsr_core.store.verify import Gate, GateReport

LAYOUT = StoreLayout(
    members=2,
    times=TimeAxis(datetime(2018, 5, 1), timedelta(hours=1), 2),
    grid=Grid(Axis(6_445_500.0, -1000.0, 4), Axis(850_500.0, 1000.0, 4), CRS.from_epsg(2154).to_wkt()),
    member_block=4,
    time_block=2,
    tile=(4, 4),
    attributes={},
)
DESCRIPTION = Description("rain", "Rain", "Rain at 1 km.", "etalab-2.0", "METEO FRANCE", ("rain",))
PROVENANCE = Provenance(
    source_url="s3://bucket/in.nc", source_fingerprint="f" * 64, source_attribution="METEO FRANCE",
    source_license="etalab-2.0", requested_factor=(9.4, 1.0), factor=(10, 1), match_distance=0.06, beta=0.02,
    context_length=12, conservation={"threshold_mm": 0.05, "limit": None}, conserved=True, checkpoint="small",
    checkpoint_digest="c" * 64, network_evaluations=8, code_version="0.1.0", seed=1, members=2,
)  # fmt: skip
GOOD = GateReport(gates=(Gate(name="closure", passed=True, found="0 quanta", needed="0 quanta"),))


def prepared(destination: Path, value: int = 7) -> Attempt:
    attempt = Attempt.begin(str(destination), "rain")
    create_ensemble(attempt.ensemble_url, LAYOUT, array="precipitation")
    region = (slice(0, 2), slice(0, 2), slice(0, 4), slice(0, 4))
    write_shard(attempt.ensemble_url, "precipitation", region, np.full(LAYOUT.shape, value, np.uint16))
    finish(attempt.ensemble_url, {})
    write_overview(attempt.ensemble_url, "precipitation", attempt.overview_url, LAYOUT)
    return attempt


def publication(attempt: Attempt, report: GateReport = GOOD) -> Publication:
    side = {"quicklook": attempt.write_side_file("quicklook.png", b"png", "image/png", "Quick look", "overview")}
    return Publication(DESCRIPTION, LAYOUT, PROVENANCE, report, side)


def publish_one(destination: Path, value: int = 7) -> str:
    attempt = prepared(destination, value)
    return publish(attempt, publication(attempt)).version


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
    assert Path(attempt.ensemble_url).exists()


def test_a_store_that_is_not_whole_is_not_published(tmp_path):
    attempt = prepared(tmp_path)
    Path(attempt.overview_url, "zarr.json").unlink()
    with pytest.raises(PublicationError, match="overview is not whole"):
        publish(attempt, publication(attempt))


def test_what_a_crash_left_is_invisible_and_reconcile_removes_it(tmp_path):
    publish_one(tmp_path)
    lost = prepared(tmp_path)
    # A crash between item and collection.
    (tmp_path / "rain" / "v2.json").write_text((tmp_path / "rain" / "v1.json").read_text())
    assert stsr_core.catalog.ls(str(tmp_path)) == {"rain": ["v1"]}
    removed = reconcile(str(tmp_path), "rain")
    assert set(removed) == {"rain/v2.json", lost.prefix}
    assert not Path(lost.url).exists()
    assert float(stsr_core.catalog.open("rain", catalog=str(tmp_path))["precipitation"].max()) > 0
    assert reconcile(str(tmp_path), "rain") == []


def test_a_number_taken_by_a_crash_is_not_used_again(tmp_path):
    publish_one(tmp_path)
    (tmp_path / "rain" / "v2.json").write_text("{}")
    assert publish_one(tmp_path) == "v3"


def _publish_many(destination: str, count: int) -> None:
    for _ in range(count):
        publish_one(Path(destination))


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
    folders = {json.loads((tmp_path / "rain" / f"{v}.json").read_text())["assets"]["ensemble"]["href"] for v in listed}
    assert len(folders) == 9


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


def test_dates_of_other_calendars_stay_valid_dates():
    import cftime

    assert instant(cftime.Datetime360Day(2001, 2, 30)) == "2001-02-28T00:00:00Z"
    assert instant(np.datetime64("2001-02-03T04:05")) == "2001-02-03T04:05:00Z"


SCHEMAS = Path(__file__).parents[2] / ".." / "shared" / "stac_schemas"


@pytest.mark.skipif(not SCHEMAS.is_dir(), reason="published extension schemas are not here")
def test_items_are_valid_by_the_published_extension_schemas(tmp_path):
    import jsonschema
    from referencing import Registry, Resource

    publish_one(tmp_path)
    item = json.loads((tmp_path / "rain" / "v1.json").read_text())
    for path in SCHEMAS.glob("*.json"):
        schema = json.loads(path.read_text())
        identifier = schema["$id"].removesuffix("#")
        if identifier in item["stac_extensions"]:
            registry = Registry(retrieve=lambda uri: Resource.opaque({"type": "object"}))
            errors = list(jsonschema.validators.validator_for(schema)(schema, registry=registry).iter_errors(item))
            assert not errors, (path.name, errors[0].message)
