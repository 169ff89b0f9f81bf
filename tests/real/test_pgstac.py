"""The way to a STAC API on a database: PgSTAC loads what `stsr catalog export` writes, and answers the same."""

import json
import subprocess
import sysconfig
from pathlib import Path

import psycopg
import pytest
from typer.testing import CliRunner

from stsr_core.catalog import Query
from stsr_core.catalog.documents import Documents
from stsr_core.catalog.index import look_up
from stsr_core.cli import app
from tests.catalog.test_search import grown
from tests.real import postgres

VERSIONS = 12
QUERIES = [
    (Query(limit=100), {"collections": ["rain"]}),
    (Query(bbox=(-169.9, -90.0, -168.8, 90.0), limit=100), {"bbox": [-169.9, -90, -168.8, 90]}),
    (Query(datetime="2000-01-01T12:00:00Z/2000-01-02T00:00:00Z", limit=100),
     {"datetime": "2000-01-01T12:00:00Z/2000-01-02T00:00:00Z"}),
    (Query(filter='"stsr:seed" = 3', limit=100),
     {"filter": {"op": "=", "args": [{"property": "stsr:seed"}, 3]}, "filter-lang": "cql2-json"}),
]  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not postgres.has_postgis(), reason="PostgreSQL with PostGIS is not installed"),
]


def load(database, *arguments):
    loader = Path(sysconfig.get_path("scripts")) / "pypgstac"
    subprocess.run([loader, *arguments, "--dsn", database.url], check=True, capture_output=True, text=True)


def test_pgstac_takes_the_export_and_finds_the_same_items(tmp_path):
    catalog, written = tmp_path / "catalog", tmp_path / "export"
    grown(catalog, VERSIONS)
    documents = Documents(str(catalog))
    collection, _ = documents.read("rain/collection.json")
    done = CliRunner().invoke(app, ["catalog", "export", "--catalog", str(catalog), "--to", str(written)])
    assert done.exit_code == 0, done.output
    with postgres.start() as database:
        load(database, "migrate")
        for _ in range(2):  # the same export again changes nothing
            load(database, "load", "collections", str(written / "collections.ndjson"), "--method", "upsert")
            load(database, "load", "items", str(written / "items.ndjson"), "--method", "upsert")
        with psycopg.connect(database.url) as connection:
            connection.execute("SET search_path TO pgstac, public")
            for query, body in QUERIES:
                asked = json.dumps({**body, "limit": 100})
                [found] = connection.execute("SELECT search(%s::jsonb)", [asked]).fetchone()
                ours = look_up(documents, {"rain": collection}, query)["rain"]
                assert ours
                assert {item["id"] for item in found["features"]} == {f"rain-{version}" for version in ours}
