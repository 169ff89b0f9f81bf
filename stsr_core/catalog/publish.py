"""Publication: an attempt is written aside, and becomes a version in one replacement of the collection.

<destination>/catalog.json
<destination>/<product>/collection.json            names the versions: what it does not list is not published
<destination>/<product>/v1.json                    item of version 1, written once
<destination>/<product>/data/<attempt>/            stores, pictures, quality report of one attempt
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from stsr_core.catalog.documents import ConflictError, Documents
from stsr_core.catalog.items import (
    Description,
    Provenance,
    SideFile,
    collection,
    footprint,
    instant,
    item,
    root_catalog,
)
from stsr_core.errors import PublicationError
from stsr_core.store.layout import filesystem, is_whole

if TYPE_CHECKING:
    from stsr_core.catalog.documents import Options
    from stsr_core.store.layout import StoreLayout
    from stsr_core.store.verify import GateReport

TRIES = 20  # publishers of one product that may race each other


@dataclass(frozen=True)
class Attempt:
    """A place of its own for one try at a version."""

    documents: Documents
    product: str
    name: str

    @classmethod
    def begin(cls, destination: str, product: str, options: Options | None = None) -> Attempt:
        """Choose a fresh place; nothing is written yet."""
        return cls(Documents(destination, dict(options or {})), product, uuid.uuid4().hex[:12])

    @property
    def prefix(self) -> str:
        """Place of the attempt relative to the destination."""
        return f"{self.product}/data/{self.name}"

    @property
    def url(self) -> str:
        """Address of the attempt."""
        return f"{self.documents.destination}/{self.prefix}"

    @property
    def ensemble_url(self) -> str:
        """Address of the ensemble's group."""
        return f"{self.url}/data.zarr/ensemble"

    @property
    def overview_url(self) -> str:
        """Address of the overview's group."""
        return f"{self.url}/data.zarr/overview"

    def write_side_file(self, name: str, data: bytes, media_type: str, title: str, *roles: str) -> SideFile:
        """Write a small file beside the stores and describe it."""
        fs, path = filesystem(self.url, self.documents.options)
        fs.makedirs(path, exist_ok=True)
        fs.pipe_file(f"{path}/{name}", data)
        href = f"./data/{self.name}/{name}"
        return SideFile(href, media_type, hashlib.sha256(data).hexdigest(), len(data), title, roles)


@dataclass(frozen=True)
class Publication:
    """All that a version consists of besides its stores."""

    description: Description
    layout: StoreLayout
    provenance: Provenance
    report: GateReport
    side_files: Mapping[str, SideFile]


@dataclass(frozen=True)
class Published:
    """A version that readers can see."""

    product: str
    version: str
    item_url: str


def versions(document: Mapping[str, Any]) -> list[str]:
    """Versions that a collection lists, oldest first."""
    items = [link["href"] for link in document.get("links", []) if link.get("rel") == "item"]
    names = [href.removeprefix("./").removesuffix(".json") for href in items]
    return sorted(names, key=lambda v: int(v.removeprefix("v")))


def publish(attempt: Attempt, publication: Publication) -> Published:
    """Make an attempt the next version of its product.

    The item is created first; it becomes visible in one compare-and-swap of the collection.

    Raises:
        GateError: a gate is not passed.
        PublicationError: the stores are not whole, or too many publishers race.
    """
    publication.report.raise_if_failed()
    for url in (attempt.ensemble_url, attempt.overview_url):
        if not is_whole(url, attempt.documents.options):
            raise PublicationError(f"{url} is not whole, so it is not published. Finish it first.")
    for _ in range(TRIES):
        try:
            return _try_publish(attempt, publication)
        except ConflictError:
            continue
    raise PublicationError(f"{TRIES} other publishers of {attempt.product} were faster each time. Run again later.")


def _try_publish(attempt: Attempt, publication: Publication) -> Published:
    documents, product = attempt.documents, attempt.product
    path = f"{product}/collection.json"
    bbox, _ = footprint(publication.layout.grid)
    bounds = publication.layout.times.bounds
    interval = [instant(bounds[0, 0]), instant(bounds[-1, 1])]
    found = documents.read(path)
    if found is None:
        documents.create(path, collection(publication.description, bbox, interval))
        found = documents.read(path)
    if found is None:
        raise PublicationError(f"{documents.destination}/{path} vanished while it was published. Run again.")
    current, tag = found
    listed = versions(current)
    taken = {n.removesuffix(".json") for n in documents.names(product) if n.startswith("v") and n.endswith(".json")}
    number = 1 + max((int(v[1:]) for v in {*listed, *taken} if v[1:].isdigit()), default=0)
    version, predecessor = f"v{number}", listed[-1] if listed else None
    document = item(
        publication.description,
        version,
        publication.layout,
        publication.provenance,
        f"./data/{attempt.name}",
        dict(publication.side_files),
        [gate.model_dump() for gate in publication.report.gates],
        predecessor,
        datetime.now(UTC),
    )
    validate(document)
    documents.create(f"{product}/{version}.json", document)
    try:
        documents.replace(path, _with_version(current, version, bbox, interval), tag)
    except ConflictError:
        documents.remove(f"{product}/{version}.json")
        raise
    _link_successor(documents, product, predecessor, version)
    _link_product(documents, publication.description)
    return Published(product, version, f"{documents.destination}/{product}/{version}.json")


def validate(document: dict[str, Any]) -> None:
    """Validate an item against the STAC core schemas, offline.

    Raises:
        PublicationError: the item is not valid.
    """
    import pystac
    from pystac.validation import validate_dict

    core = {**document, "stac_extensions": []}
    try:
        validate_dict(core, stac_object_type=pystac.STACObjectType.ITEM)
    except pystac.errors.STACValidationError as e:
        raise PublicationError(f"Item {document['id']} is no valid STAC item: {e}. Nothing was published.") from e


def _with_version(current: dict[str, Any], version: str, bbox: list[float], interval: list[str]) -> dict[str, Any]:
    """Collection with one more version, as its latest."""
    links = [link for link in current["links"] if link["rel"] != "latest-version"]
    links += [
        {"rel": rel, "href": f"./{version}.json", "type": "application/geo+json", "title": version}
        for rel in ("item", "latest-version")
    ]
    box = current["extent"]["spatial"]["bbox"][0]
    start, end = current["extent"]["temporal"]["interval"][0]
    union = [min(box[0], bbox[0]), min(box[1], bbox[1]), max(box[2], bbox[2]), max(box[3], bbox[3])]
    extent = {
        "spatial": {"bbox": [union]},
        "temporal": {"interval": [[min(start, interval[0]), max(end, interval[1])]]},
    }
    return {**current, "version": version, "links": links, "extent": extent}


def _link_successor(documents: Documents, product: str, predecessor: str | None, version: str) -> None:
    """Tell the version before that it has a successor; only its links change."""
    found = documents.read(f"{product}/{predecessor}.json") if predecessor else None
    if found is None:
        return
    document, tag = found
    link = {"rel": "successor-version", "href": f"./{version}.json", "type": "application/geo+json"}
    document["links"] = [x for x in document["links"] if x["rel"] != "successor-version"] + [link]
    documents.replace(f"{product}/{predecessor}.json", document, tag)


def _link_product(documents: Documents, description: Description) -> None:
    """List the product in the catalogue's root."""
    link = {
        "rel": "child", "href": f"./{description.product}/collection.json", "type": "application/json",
        "title": description.title,
    }  # fmt: skip
    for _ in range(TRIES):
        try:
            found = documents.read("catalog.json")
            if found is None:
                documents.create("catalog.json", root_catalog())
                continue
            document, tag = found
            if any(x.get("href") == link["href"] for x in document["links"]):
                return
            documents.replace("catalog.json", {**document, "links": [*document["links"], link]}, tag)
        except ConflictError:
            continue
        return


def reconcile(destination: str, product: str, options: Options | None = None) -> list[str]:
    """Remove what a crash left of a product: items that its collection does not list, attempts no item names.

    Must not run while another publisher of the same product is at work.

    Returns:
        What was removed, relative to the destination.
    """
    documents = Documents(destination, dict(options or {}))
    found = documents.read(f"{product}/collection.json")
    listed = versions(found[0]) if found else []
    removed, kept = [], set()
    for version in listed:
        stored = documents.read(f"{product}/{version}.json")
        if stored is not None:
            kept.add(stored[0]["assets"]["ensemble"]["href"].split("/")[2])
    items = [n for n in documents.names(product) if n.startswith("v") and n.endswith(".json")]
    removed += [f"{product}/{n}" for n in items if n.removesuffix(".json") not in listed]
    removed += [f"{product}/data/{n}" for n in documents.names(f"{product}/data") if n not in kept]
    for path in removed:
        documents.remove(path)
    return removed


def quality_json(report: GateReport) -> bytes:
    """Encode a gate report as the quality report beside the data."""
    return (json.dumps(report.model_dump(), indent=1) + "\n").encode()
