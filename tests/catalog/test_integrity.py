"""What a user does with a version: copy it, check it, cite it, draw it; and what must hold of its item."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
from typer.testing import CliRunner

import stsr_core.catalog
from stsr_core.catalog.checkpoints import publish_checkpoint
from stsr_core.catalog.documents import Documents
from stsr_core.catalog.integrity import citation, manifest_digest, verify_version
from stsr_core.catalog.schema import validate
from stsr_core.cli import app
from stsr_core.errors import PublicationError, StoreError
from stsr_core.grids import Axis, Grid
from stsr_core.store.layout import write_shard
from stsr_core.store.pictures import BANDS, cog
from tests.catalog.made import LAYOUT, WKT, publish_one

SCHEMAS = Path(__file__).parents[2] / ".." / "shared" / "stac_schemas"


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    folder = tmp_path_factory.mktemp("catalog")
    publish_one(folder)
    return folder


@pytest.fixture
def copy(catalog, tmp_path):
    """A downloaded copy of the version: its folder and nothing else."""
    return Path(shutil.copytree(stsr_core.catalog.latest("rain", str(catalog)).folder, tmp_path / "copy"))


def flaws_of(folder):
    return verify_version(str(folder)).flaws


def test_a_version_and_its_copy_prove_themselves(catalog, copy):
    found = stsr_core.catalog.latest("rain", str(catalog))
    for place in (found.folder, str(copy)):
        verdict = verify_version(place)
        assert verdict.sound
        assert verdict.closure_quanta == 0
        assert verdict.item == "rain-v1"
        assert verdict.digest == manifest_digest(found.item)
        assert verdict.objects == sum(p.is_file() and p.name[0] != "." for p in copy.rglob("*")) - 2


def test_a_version_on_a_web_server_is_checked_by_its_catalogue():
    with pytest.raises(StoreError, match="plain http lists no files.*verify PRODUCT --catalog URL"):
        verify_version("http://127.0.0.1:9/rain/data/0123456789ab")


@pytest.mark.parametrize("damage", ["changed", "missing", "truncated"])
@pytest.mark.parametrize(
    "name", ["data.zarr/ensemble/precipitation/c/0/0/0/0", "data.zarr/coarse/zarr.json", "map.tif"]
)
def test_a_damaged_copy_is_found_and_named(copy, name, damage):
    raw = (copy / name).read_bytes()
    if damage == "missing":
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(raw[:-1] if damage == "truncated" else bytes([raw[0] ^ 1]) + raw[1:])
    assert flaws_of(copy) == (f"{name} is {'missing' if damage == 'missing' else 'not as published'}",)


def test_a_copy_whose_manifest_agrees_but_whose_totals_do_not_is_found(copy):
    """A forger who mends the manifest and the item must still conserve the coarse totals."""
    region = tuple(slice(0, n) for n in LAYOUT.shape)
    url = str(copy / "data.zarr" / "ensemble")
    digest = write_shard(url, "precipitation", region, np.full(LAYOUT.shape, 8, np.uint16))
    assert flaws_of(copy) == ("data.zarr/ensemble/precipitation/c/0/0/0/0 is not as published",)
    manifest = json.loads((copy / "manifest.json").read_text())
    shard = copy / "data.zarr/ensemble/precipitation/c/0/0/0/0"
    manifest["objects"]["data.zarr/ensemble/precipitation/c/0/0/0/0"] = {
        "size": shard.stat().st_size, "sha256": digest,
    }  # fmt: skip
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert flaws_of(copy) == ("manifest.json is not the one that the item names", "a coarse total differs by 4 quanta")


@pytest.mark.parametrize("path", ["../../outside", "/etc/passwd"])
def test_a_manifest_that_reaches_outside_is_refused(copy, path):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["objects"][path] = {"size": 1, "sha256": "0" * 64}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="outside the version"):
        verify_version(str(copy))


def test_of_two_items_in_a_folder_the_higher_number_counts_unless_one_is_named(copy):
    item = json.loads((copy / "v1.json").read_text())
    for name in ("v9", "v10"):  # a publisher was killed before it swapped v9, went on and became v10
        (copy / f"{name}.json").write_text(json.dumps({**item, "id": f"rain-{name}"}))
    assert verify_version(str(copy)).item == "rain-v10"
    assert verify_version(str(copy), item_name="v1.json").item == "rain-v1"


def test_what_is_no_version_is_said_so(tmp_path, copy):
    with pytest.raises(StoreError, match="holds no item"):
        verify_version(str(tmp_path / "nothing"))
    (copy / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"has no manifest.json"):
        verify_version(str(copy))


def test_an_item_that_names_what_is_outside_its_version_opens_nothing(catalog, tmp_path):
    shutil.copytree(catalog, tmp_path / "c")
    path = Path(stsr_core.catalog.latest("rain", str(tmp_path / "c")).url)
    item = json.loads(path.read_text())
    for href in ("../../../../secret", "https://example.org/data.zarr", "/etc"):
        item["assets"]["ensemble"]["href"] = href
        path.write_text(json.dumps(item))
        with pytest.raises(StoreError, match="outside the version"):
            stsr_core.catalog.open("rain", catalog=str(tmp_path / "c"))


def test_a_citation_names_version_and_digest(catalog):
    found = stsr_core.catalog.latest("rain", str(catalog))
    digest = manifest_digest(found.item)
    text, bibtex = citation(found.item, found.url)
    for part in ("Rain, version v1", digest, "METEO FRANCE", "checkpoint small (cccccccccccc)", found.url):
        assert part in text
    assert bibtex.startswith("@dataset{rain-v1,\n  title = {{Rain}},\n  author = {{METEO FRANCE}},\n  year = {20")
    assert digest in bibtex
    assert bibtex.count("{") == bibtex.count("}")


def run(*arguments):
    done = CliRunner().invoke(app, ["catalog", *arguments])
    return done.output if done.exception is None else done.exception


def test_the_command_line_finds_shows_opens_checks_and_cites(catalog, copy):
    place = ("--catalog", str(catalog))
    assert run("ls", *place) == "rain: v1\n"
    assert "gate closure: 0 quanta" in run("show", "rain", *place)
    assert "precipitation" in run("open", "rain", "--group", "series", *place)
    assert str(run("open", "rain", "--group", "all", *place)) == "2"  # refused before it is run
    hit = run("search", *place, "--bbox", "4,44,6,46", "--datetime", "2018-05-01", "--filter", '"stsr:members" = 2')
    assert hit.startswith("rain v1: 2018-05-01T00:00:00Z to 2018-05-01T02:00:00Z")
    assert json.loads(run("search", *place, "--json"))["features"][0]["id"] == "rain-v1"
    assert run("search", *place, "--bbox", "90,44,96,46") == "No version meets this.\n"
    assert "WEST,SOUTH,EAST,NORTH" in str(run("search", *place, "--bbox", "1,2"))
    assert "rain-v1 is as published" in run("verify", "rain", *place)
    assert "0 quanta" in run("verify", str(copy))
    (copy / "map.tif").unlink()
    assert "map.tif is missing" in str(run("verify", str(copy)))
    assert "@dataset{rain-v1" in run("cite", "rain", *place)
    assert run("reconcile", "rain", *place, "--dry-run") == "0 leftovers of rain.\n"


def test_the_map_is_a_cloud_optimised_geotiff_with_north_at_the_top(catalog, tmp_path):
    found = stsr_core.catalog.latest("rain", str(catalog))
    with rasterio.open(found.asset_url("map")) as data:
        assert data.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert data.crs.to_epsg() == 2154
        assert tuple(data.bounds) == (850_000, 6_442_000, 854_000, 6_446_000)
        assert data.descriptions == BANDS
        assert data.read(1) == pytest.approx(0.14)
        assert data.read(2) == pytest.approx(0.07)
    south_up = Grid(Axis(6_442_500.0, 1000.0, 600), Axis(850_500.0, 1000.0, 600), WKT)
    values = np.stack([np.arange(600.0)[:, None] + np.zeros(600)] * 2).astype(np.float32)
    values[:, 0, 0] = np.nan
    (tmp_path / "map.tif").write_bytes(cog(values, south_up))
    with rasterio.open(tmp_path / "map.tif") as data:
        assert data.overviews(1) == [2]
        assert data.read(1)[0, 0] == 599
        assert np.isnan(data.read(1)[599, 0])
        assert data.index(850_500, 6_442_500) == (599, 0)


def changed(document, path, value):
    made = json.loads(json.dumps(document))
    *parents, last = path
    node = made
    for key in parents:
        node = node[key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return made


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("assets", "overview"), None, "assets.overview: Field required"),
        (("assets", "ensemble", "href"), "s3://elsewhere/data", "outside the version"),
        (("assets", "manifest", "file:checksum"), "12", "file:checksum"),
        (("assets", "more"), {"href": "./x"}, "assets.more: Extra inputs"),
        (("properties", "stsr:seed"), "1", "valid integer"),
        (("properties", "stsr:gates", 0, "passed"), False, "passed"),
        (("properties", "cube:dimensions", "time"), None, "at least 4 items"),
        (("properties", "stsr:members"), 3, "2 members in the cube, 3 in the provenance"),
        (("properties", "end_datetime"), "2018-05-01T00:00:00Z", "before it starts"),
        (("properties", "proj:wkt3"), "x", "Extra inputs"),
        (("id",), "rain-v2", "is not that of rain v1"),
        (("bbox",), [5.0, 44.0, 4.0, 45.0], "is empty"),
        (("geometry", "coordinates", 0, 0), [0.0, 0.0], "no closed ring"),
        (("stac_extensions",), [], "not those of this catalogue"),
        (("links",), [], "root, parent, collection"),
        (("links", 0, "href"), "https://example.org", "points out of the catalogue"),
    ],
)
def test_an_item_that_is_not_what_it_must_be_is_refused(catalog, path, value, message):
    item = dict(stsr_core.catalog.latest("rain", str(catalog)).item)
    validate(item)
    with pytest.raises(PublicationError, match=message):
        validate(changed(item, path, value))


def errors_by_published_schemas(document):
    import jsonschema
    from referencing import Registry, Resource

    schemas = [json.loads(path.read_text()) for path in SCHEMAS.glob("*.json")]
    checked = []
    band = {"items": {"properties": {"data_type": {"type": "string"}}}}  # all that is asked of a schema not at hand
    absent = {"type": "object", "definitions": {"bands": band}}
    registry = Registry(retrieve=lambda _: Resource.opaque(absent))
    for schema in schemas:
        if schema["$id"].removesuffix("#") in document["stac_extensions"]:
            validator = jsonschema.validators.validator_for(schema)(schema, registry=registry)
            assert not [(schema["$id"], e.message) for e in validator.iter_errors(document)]
            checked.append(schema["$id"])
    return checked


@pytest.mark.skipif(not SCHEMAS.is_dir(), reason="published extension schemas are not here")
def test_items_are_valid_by_the_published_extension_schemas(catalog):
    assert len(errors_by_published_schemas(stsr_core.catalog.latest("rain", str(catalog)).item)) == 7


def test_the_checkpoint_is_published_once_as_a_model(tmp_path, library):
    import pystac

    documents = Documents(str(tmp_path))
    [checkpoint] = library.checkpoints
    path = publish_checkpoint(documents, checkpoint)
    before = (tmp_path / path).read_bytes()
    assert publish_checkpoint(documents, checkpoint) == path
    assert (tmp_path / path).read_bytes() == before
    item = json.loads(before)
    link = pystac.Catalog.from_file(str(tmp_path / "catalog.json")).get_single_link("related")
    linked = pystac.Item.from_file(link.get_absolute_href())
    assert linked.properties["stsr:digest"] == checkpoint.digest
    weights = Path(linked.assets["weights"].get_absolute_href()).read_bytes()
    assert weights == checkpoint.weights_path.read_bytes()
    pystac.validation.validate_dict({**item, "stac_extensions": []})
    if SCHEMAS.is_dir():
        assert len(errors_by_published_schemas(item)) == 2
