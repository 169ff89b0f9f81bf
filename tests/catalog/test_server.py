"""The STAC API as its clients use it: pystac-client and plain http against a server that really runs."""

import json
import socket
import subprocess
import sys
import sysconfig
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import httpx
import pystac
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pystac_client import Client
from typer.testing import CliRunner

import stsr_core.catalog
from stsr_core.catalog import Query
from stsr_core.catalog.documents import Documents, encode
from stsr_core.catalog.publish import Attempt, publish
from stsr_core.catalog.server import MAX_BODY, pick
from stsr_core.catalog.snapshot import Loaded
from stsr_core.catalog.withdrawal import withdraw
from stsr_core.cli import app
from stsr_core.errors import StoreError
from tests.catalog.made import DESCRIPTION, publication, publish_one, write_stores
from tests.catalog.test_integrity import SCHEMAS, errors_by_published_schemas
from tests.catalog.test_search import START, grown

VERSIONS = 30  # of rain: six-hourly, boxes from -169.97 + 0.03 n degrees east, seed n % 7
STORED_AT = "https://example.org/stsr"


def publish_snow(destination):
    attempt = Attempt.begin(str(destination), "snow")
    write_stores(attempt, 1)
    publish(attempt, replace(publication(attempt), description=replace(DESCRIPTION, product="snow", title="Snow")))


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    grown(folder, VERSIONS)
    publish_snow(folder)
    return folder


@pytest.fixture(scope="module")
def server(catalog):
    with serving(catalog, VERSIONS + 1) as url:
        yield url


@contextmanager
def serving(catalog, items):
    """Run `stsr catalog serve` over a catalogue; yields its address."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "stsr_core.cli", "catalog", "serve", "--catalog", str(catalog),
               "--port", str(port), "--every", "0", "--public", STORED_AT]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert "in memory; the STAC API is at" in process.stdout.readline()
            wait(f"http://127.0.0.1:{port}", items)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def wait(url, items):
    until = time.monotonic() + 60
    while True:
        try:
            assert httpx.get(f"{url}/_mgmt/health", timeout=10).json()["items"] == items
            return
        except httpx.TransportError:
            assert time.monotonic() < until
            time.sleep(0.1)


@pytest.fixture(scope="module")
def client(server):
    return Client.open(server)


def numbers(search):
    return [int(item.id.rsplit("-v")[-1]) for item in search.items()]


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"bbox": (-171.0, 0, -169.95, 90)}, [1]),
        ({"datetime": "2000-01-02"}, [3, 4, 5, 6, 7]),
        ({"datetime": "../2000-01-01T13:00:00Z"}, [1, 2]),
        ({"ids": ["rain-v4", "rain-v9", "snow-v1"]}, [4, 9]),
        ({"intersects": {"type": "Point", "coordinates": [-169.95, 40.5]}}, [1]),
        ({"filter": {"op": "=", "args": [{"property": "stsr:seed"}, 3]}}, [3, 10, 17, 24]),
        ({"filter": {"op": "and", "args": [{"op": ">", "args": [{"property": "stsr:seed"}, 4]},
                                           {"op": "<=", "args": [{"property": "start_datetime"},
                                                                 {"timestamp": "2000-01-03T12:00:00Z"}]}]}}, [5, 6]),
    ],
)  # fmt: skip
def test_pystac_client_finds_items(client, method, asked, expected):
    found = client.search(method=method, collections=["rain"], **asked)
    assert sorted(numbers(found)) == expected
    assert found.matched() == len(expected)


def test_pystac_client_filters_by_text(client):
    found = client.search(filter="\"stsr:seed\" = 3 AND version LIKE 'v1_'", filter_lang="cql2-text", method="GET")
    assert sorted(numbers(found)) == [10, 17]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_pystac_client_sorts_and_pages(client, method):
    found = client.search(method=method, collections=["rain"], sortby="-properties.stsr:seed,+start_datetime", limit=4)
    pages = [[int(i.id[6:]) for i in page.items] for page in found.pages()]
    in_order = sorted(range(1, VERSIONS + 1), key=lambda n: (-(n % 7), n))
    assert pages == [in_order[n : n + 4] for n in range(0, VERSIONS, 4)]
    assert len(list(client.search(limit=7).items())) == VERSIONS + 1
    assert [len(page) for page in client.search(limit=7, max_items=12).pages()] == [7, 5]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_pystac_client_chooses_fields(client, method):
    include = client.search(method=method, ids=["rain-v4"], fields=["properties.version", "bbox"])
    [item] = include.items_as_dicts()
    assert {*item, *item["properties"]} == {"bbox", "properties", "version"}
    without = client.search(method=method, ids=["rain-v4"], fields=["-assets", "-properties.title"])
    [item] = without.items_as_dicts()
    assert "assets" not in item
    assert "title" not in item["properties"]
    assert item["stac_version"] == "1.1.0"


def test_collections_and_items_are_valid_and_lead_to_the_files(client, catalog, server):
    assert {c.id for c in client.get_collections()} == {"rain", "snow"}
    snow = client.get_collection("snow")
    [item] = snow.get_items()
    published = stsr_core.catalog.latest("snow", str(catalog))
    folder = published.folder.removeprefix(str(catalog))
    assert item.assets["ensemble"].href == f"{STORED_AT}{folder}/data.zarr/ensemble"
    recipe = {"stsr:configuration": published.item["properties"]["stsr:configuration"]}  # is kept as it is
    assert item.properties == without_nothing(published.item["properties"]) | recipe
    assert item.geometry == published.item["geometry"]
    assert item.bbox == published.item["bbox"]
    rain = client.get_collection("rain").get_item("rain-v7").to_dict()
    hrefs = {link["rel"]: link["href"] for link in rain["links"]}
    assert hrefs["predecessor-version"] == f"{server}/collections/rain/items/rain-v6"
    assert hrefs["successor-version"] == f"{server}/collections/rain/items/rain-v8"
    for thing in (snow, item, pystac.Item.from_dict(rain)):
        thing.stac_extensions = []
        thing.validate()


def without_nothing(value):
    """Published properties as the index keeps them: without empty values, but for `datetime`."""
    if isinstance(value, dict):
        return {k: without_nothing(v) for k, v in value.items() if v not in (None, {}) or k == "datetime"}
    return [without_nothing(v) for v in value] if isinstance(value, list) else value


@pytest.mark.skipif(not SCHEMAS.is_dir(), reason="published extension schemas are not here")
def test_served_items_are_valid_by_the_published_extension_schemas(server):
    found = httpx.get(f"{server}/collections/rain/items/rain-v7").json()
    assert len(errors_by_published_schemas(found)) == 7


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("collections/snowy", 404, "no collection 'snowy'"),
        ("collections/..%2f..%2fetc%2fpasswd", 404, ""),
        ("collections/%2e%2e/items/passwd", 404, ""),
        ("collections/rain/items/..%2f..%2fcollection.json", 404, ""),
        ("collections/rain/items/v1", 404, "no item v1"),
        ("collections/rain/items/%00", 404, "no item"),
        ("collections/snowy/queryables", 404, ""),
        ("search?limit=0", 400, "greater than 0"),
        ("search?limit=-5", 400, ""),
        ("search?limit=ten", 400, ""),
        ("search?bbox=1,2", 400, "4 or 6 values"),
        ("search?bbox=0,50,10,40", 400, ""),
        ("search?bbox=nan,0,1,1", 400, ""),
        ("search?datetime=yesterday", 400, ""),
        ("search?filter=a%20%3E", 400, "no CQL2"),
        ("search?filter=nonsense%20%3D%201", 400, "no property 'nonsense'"),
        ("search?filter=" + "(" * 500 + "1=1" + ")" * 500, 400, "nested brackets"),
        ("search?filter=" + "x" * 5000, 400, "5000 characters"),
        ("search?filter=%22stsr:seed%22", 400, "neither true nor false"),
        ("search?filter=version%20%3D%20POINT%20EMPTY", 400, "no CQL2"),
        ("search?filter=%22stsr:seed%22%20%3D%201e400", 400, "cannot be applied"),
        ("search?filter=A_OVERLAPS(1,2)", 400, "cannot be applied"),
        ("search?filter-lang=cql2-json&filter=[1]", 400, "no object"),
        ("search?filter-lang=cql2-json&filter=" + "[" * 5000, 400, ""),
        ("search?filter-lang=sql&filter=1", 400, ""),
        ("search?sortby=nonsense", 400, "no property 'nonsense' to sort by"),
        ("search?sortby=assets", 400, "has no order"),
        ("search?limit=1&sortby=" + ",".join(["version"] * 3000), 200, "snow-v1"),
        ("search?fields=" + ",".join("x" * 201), 400, "201 fields"),
        ("search?token=nonsense", 400, "none of this server"),
        ("search?token=" + "9" * 40 + ".-1", 400, "none of this server"),
        ("search?intersects={%22type%22:%22Blob%22}", 400, "no GeoJSON"),
        ("search?intersects=1", 400, "no object"),
        ("search?bbox=0,0,1,1&intersects={}", 400, ""),
        ("search?ids=" + ",".join("x" * 1001), 400, "1001 ids"),
        ("search?fields=,,", 200, ""),
        ("search?limit=100000&ids=rain-v1", 200, "rain-v1"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_nothing_breaks(server, path, status, said):
    answer = httpx.get(f"{server}/{path}", timeout=30)
    assert answer.status_code == status, answer.text[:300]
    assert said in answer.text
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (json.dumps({"filter": {"op": "drop"}}).encode(), 400),
        (json.dumps({"filter": {"op": "and", "args": []}}).encode(), 400),
        (json.dumps({"filter": {"op": "t_before", "args": [{"timestamp": 1}, {"date": None}]}}).encode(), 400),
        (b'{"collections": [1e309]}', 400),
        (json.dumps({"bbox": [1, 2, 3]}).encode(), 400),
        (json.dumps({"intersects": {"type": "Point", "coordinates": [0, 0]}, "bbox": [0, 0, 1, 1]}).encode(), 400),
        (json.dumps({"limit": 0}).encode(), 400),
        (json.dumps({"sortby": "version"}).encode(), 400),
        (b" " * (MAX_BODY + 1), 413),
    ],
)
def test_bodies_that_cannot_be_meant_are_refused(server, body, status):
    answer = httpx.post(f"{server}/search", content=body, headers={"Content-Type": "application/json"}, timeout=30)
    assert answer.status_code == status, answer.text[:300]


def test_a_body_without_an_end_is_refused(server):
    def pieces():
        yield b" "

    assert httpx.post(f"{server}/search", content=pieces()).status_code == 413


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH"])
def test_the_server_is_read_only(server, method):
    for path in ("collections/rain", "collections/rain/items/rain-v1", "search"):
        assert httpx.request(method, f"{server}/{path}", content=b"{}").status_code == 405
    assert httpx.post(f"{server}/collections", content=b"{}").status_code == 405


def test_any_page_may_ask(server):
    answer = httpx.get(f"{server}/search?limit=1", headers={"Origin": "https://map.example"})
    assert answer.headers["access-control-allow-origin"] == "*"
    asked = {"Origin": "https://map.example", "Access-Control-Request-Method": "POST"}
    assert httpx.options(f"{server}/search", headers=asked).status_code == 200


def test_queryables_name_what_can_be_asked_for(server):
    found = httpx.get(f"{server}/collections/rain/queryables").json()["properties"]
    assert found["stsr:members"] == {"type": "integer"}
    assert found["created"] == {"type": "string", "format": "date-time"}
    assert found["deprecated"] == {"type": "boolean"}
    assert "assets" not in found


@pytest.fixture
def loaded(tmp_path):
    """A catalogue of three versions in memory, that looks for changes at every request."""
    for value in (1, 2, 3):
        publish_one(tmp_path, value)
    return Loaded(Documents(str(tmp_path)), every_s=0)


def ids(snapshot, **query):
    return [item["id"] for item in snapshot.search(Query(**query))[0]]


def test_publications_and_withdrawals_are_followed_and_pages_stay_what_they_were(loaded):
    first = loaded.current()
    assert ids(first, limit=2) == ["rain-v3", "rain-v2"]
    publish_one(loaded.documents.destination, 4)
    assert ids(loaded.current(), limit=2) == ["rain-v4", "rain-v3"]
    assert ids(loaded.of(first.name), limit=2, offset=2) == ["rain-v1"]  # no version twice, none left out
    withdraw("rain", "v4", "Too wet.", loaded.documents.destination)
    [item], total = loaded.current().search(Query(filter="deprecated = true"))
    assert (item["id"], item["properties"]["stsr:withdrawn"], total) == ("rain-v4", "Too wet.", 1)
    assert loaded.current().name == loaded.current().name
    assert loaded.failure is None


def test_a_damaged_or_forged_change_is_logged_and_what_was_good_is_served_on(loaded, caplog):
    before = loaded.current()
    folder = Path(loaded.documents.destination, "rain")
    sound = (folder / "collection.json").read_bytes()
    collection = json.loads(sound)
    index = collection["assets"]["index-recent"]
    [*others, last] = [x for x in collection["links"] if x["rel"] == "item"]
    forged = [
        b"{",
        encode({**collection, "id": "snow"}),
        encode({**collection, "links": others}),
        encode({**collection, "links": [{**last, "href": "../../etc/passwd"}]}),
        encode({**collection, "assets": {"index-recent": {**index, "href": "../../secret.parquet"}}}),
        encode({**collection, "assets": {"index-recent": {**index, "file:checksum": "1220" + "0" * 64}}}),
    ]
    for document in forged:
        (folder / "collection.json").write_bytes(document)
        assert loaded.current() is before
        assert loaded.failure is not None
        assert loaded.failure in caplog.text
    (folder / "collection.json").write_bytes(sound)
    assert loaded.current() is before
    assert loaded.failure is None


def test_a_damaged_product_keeps_no_other_from_being_followed_and_is_said(loaded, tmp_path):
    destination = loaded.documents.destination
    snow = Attempt.begin(destination, "snow")
    write_stores(snow, 1)
    publish(snow, replace(publication(snow), description=replace(DESCRIPTION, product="snow")))
    assert set(loaded.current().products) == {"rain", "snow"}
    Path(destination, "snow", "collection.json").write_text("{")
    publish_one(destination, 4)
    assert ids(loaded.current(), limit=2, sortby=("id",)) == ["rain-v1", "rain-v2"]
    assert "rain-v4" in ids(loaded.current())
    assert "snow-v1" in ids(loaded.current())
    assert "snow/collection.json is damaged" in loaded.failure
    anew = Loaded(Documents(destination))
    assert set(anew.current().products) == {"rain"}
    assert "snow/collection.json is damaged" in anew.failure
    done = CliRunner().invoke(app, ["catalog", "export", "--catalog", destination, "--to", str(tmp_path / "to")])
    assert "Nothing is exported. " in str(done.exception)
    assert not (tmp_path / "to").exists()


def test_a_forged_address_in_the_index_is_refused(loaded, monkeypatch):
    item = json.loads(Path(stsr_core.catalog.find("rain", "v3", loaded.documents.destination).url).read_text())
    from stsr_core.catalog import snapshot
    from stsr_core.catalog.index import _row, _table

    for href in ("https://example.org/evil", "./../../secret", "/etc/passwd"):
        item["assets"]["map"]["href"] = href
        rows = _table([_row(item, "./data/0123456789ab/v3.json")])
        collection = {"id": "rain", "links": [{"rel": "item", "href": "./data/0123456789ab/v3.json"}]}
        with pytest.raises(StoreError, match="outside its version"):
            snapshot._require_own("rain", collection, rows)


def test_what_is_exported_is_valid_and_leads_to_the_files(loaded, tmp_path):
    withdraw("rain", "v2", "Too wet.", loaded.documents.destination)
    assert loaded.current().export(tmp_path / "to", STORED_AT) == 3
    collections, items = ((tmp_path / "to" / f"{n}.ndjson").read_text().splitlines() for n in ("collections", "items"))
    assert [json.loads(line)["id"] for line in collections] == ["rain"]
    for line, version in zip(items, ("v1", "v2", "v3"), strict=True):
        found = json.loads(line)
        place = stsr_core.catalog.find("rain", version, loaded.documents.destination)
        assert found["links"][0]["href"] == place.url.replace(loaded.documents.destination, STORED_AT)
        assert found["assets"]["map"]["href"] == f"{found['links'][0]['href'].rpartition('/')[0]}/map.tif"
        assert found["properties"].get("stsr:withdrawn") == ("Too wet." if version == "v2" else None)


def test_nothing_to_serve_is_an_error_and_an_empty_catalogue_none(tmp_path):
    with pytest.raises(StoreError, match="No catalogue is at"):
        Loaded(Documents(str(tmp_path))).current()
    (tmp_path / "catalog.json").write_text('{"links": []}')
    assert Loaded(Documents(str(tmp_path))).current().search(Query()) == ([], 0)
    (tmp_path / "catalog.json").write_text('{"links": [{"rel": "child", "href": "../secret/collection.json"}]}')
    with pytest.raises(StoreError, match="outside it"):
        Loaded(Documents(str(tmp_path))).current()


def test_fields_are_picked_by_name_and_depth():
    item = {"id": "a", "collection": "c", "properties": {"x": {"y": 1, "z": 2}, "w": 3}}
    assert pick(item, [], []) == item
    assert pick(item, ["id", "properties.x.y"], []) == {"id": "a", "properties": {"x": {"y": 1}}}
    assert pick(item, ["properties"], ["properties.x"]) == {"properties": {"w": 3}}
    assert pick(item, ["properties.w"], ["properties", "properties.w"]) == {"properties": {"w": 3}}
    assert pick(item, [], ["properties.x.z", "collection"]) == {"id": "a", "properties": {"x": {"y": 1}, "w": 3}}


VALIDATOR = Path(sysconfig.get_path("scripts")) / "stac-api-validator"
CONFORMANCE = ("core", "collections", "features", "item-search", "filter", "item-search#sort", "item-search#fields")
NOT_OURS = (
    "schemas.stacspec.org",  # needs the network
    '"collections": "rain"',  # sent as a string, where the standard has an array
    "fewer than 5 fields ['properties']",  # though `properties.version` alone was asked for
)
ABOVE_ALL = {"type": "Polygon", "coordinates": [[[-175, 35], [-160, 35], [-160, 45], [-175, 45], [-175, 35]]]}


@pytest.mark.slow
def test_the_validator_of_stac_apis_finds_nothing_wrong(tmp_path):
    """It asks for properties of satellites, sorts by `datetime`, and fetches schemas, which needs the network.

    What it says of schemas it could not fetch is left out; pystac's own copies are asked in a test above.
    """

    def more(n):
        moment = (START + timedelta(hours=n)).isoformat().replace("+00:00", "Z")
        return {"datetime": moment, "eo:cloud_cover": float(n), "mission": f"sentinel-{n % 3}"}

    grown(tmp_path, VERSIONS, more)
    with serving(tmp_path, VERSIONS) as url:
        command = [str(VALIDATOR), "--root-url", url, "--collection", "rain", "--geometry", json.dumps(ABOVE_ALL),
                   "--fields-nested-property", "properties.version"]  # fmt: skip
        command += [part for name in CONFORMANCE for part in ("--conformance", name)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Warnings:" in done.stdout, done.stdout + done.stderr
    errors = [line for line in done.stdout.partition("Errors:")[2].splitlines() if line.startswith("- ")]
    assert "\n".join(line for line in errors if not any(known in line for known in NOT_OURS)) == ""


def test_metrics_say_how_fresh_products_are_and_how_requests_are_answered(server):
    for path in ("/collections/rain", "/collections/rain/items", "/collections/nosuch"):
        httpx.get(f"{server}{path}")
    answer = httpx.get(f"{server}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = {f"{s.name} {' '.join(s.labels.values())}".strip(): s.value for family in
             text_string_to_metric_families(answer.text) for s in family.samples}  # fmt: skip
    assert found["stsr_catalogue_up"] == 1
    assert found["stsr_versions rain"] == VERSIONS
    assert found["stsr_versions snow"] == 1
    assert found["stsr_versions_withdrawn rain"] == 0
    assert 0 <= time.time() - found["stsr_newest_version_timestamp_seconds snow"] < 3600
    assert found["stsr_http_requests_total GET /collections/{collection_id} 200"] >= 1
    assert found["stsr_http_requests_total GET /collections/{collection_id} 404"] >= 1
    assert found["stsr_http_request_seconds_count /collections/{collection_id}/items"] >= 1
