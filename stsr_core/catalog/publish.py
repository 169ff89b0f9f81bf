"""Publication: an attempt is written aside, and becomes a version in one replacement of the collection.

<destination>/catalog.json
<destination>/<product>/collection.json            names items and index: what it does not name is not published
<destination>/<product>/index/*.parquet            stac-geoparquet
<destination>/<product>/data/<attempt>/            stores, pictures, manifest, quality report and item of one attempt
<destination>/checkpoints/<digest>/                card, weights and item of a checkpoint

Publishers share no name but the collection's: whatever one of them does or leaves, it cannot harm another's version.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from stsr_core.catalog.addresses import CATALOG, checksum, collection_path
from stsr_core.catalog.documents import PATIENCE_SECONDS, ConflictError, DamagedError, Documents, tries
from stsr_core.catalog.footprint import footprint, union
from stsr_core.catalog.index import with_row
from stsr_core.catalog.items import (
    Description,
    Lineage,
    Provenance,
    SideFile,
    collection,
    item,
    period_of,
    root_catalog,
    told,
)
from stsr_core.catalog.manifest import NAME as MANIFEST
from stsr_core.catalog.manifest import make_manifest
from stsr_core.catalog.schema import validate
from stsr_core.errors import PublicationError
from stsr_core.store.group import is_whole

if TYPE_CHECKING:
    from stsr_core.catalog.documents import Document, Options
    from stsr_core.store.layout import StoreLayout
    from stsr_core.store.verify import GateReport

GROUPS = ("ensemble", "series", "overview", "coarse")
ITEM = re.compile(r"^\./data/([0-9a-f]+)/(v[1-9][0-9]*)\.json$")
REMOVING = "stsr:removing"  # attempts and index files that a reconcile is about to remove
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """A place of its own for one try at a version."""

    documents: Documents
    product: str
    name: str

    @classmethod
    def begin(
        cls, destination: str, product: str, options: Options | None = None, *, sole_publisher: bool = False
    ) -> Attempt:
        """Choose a fresh place; nothing is written yet but a probe of the store's conditional writes.

        Raises:
            PublicationError: the store has none, and others may publish there too.
        """
        documents = Documents.at(destination, options, sole_publisher=sole_publisher)
        documents.require_conditional_writes()
        return cls(documents, product, uuid.uuid4().hex[:12])

    @property
    def prefix(self) -> str:
        """Place of the attempt relative to the destination."""
        return f"{self.product}/data/{self.name}"

    @property
    def url(self) -> str:
        """Address of the attempt."""
        return f"{self.documents.destination}/{self.prefix}"

    def group_url(self, group: str) -> str:
        """Address of a group of the store: ensemble, series, overview or coarse."""
        return f"{self.url}/data.zarr/{group}"

    def write_side_file(self, name: str, data: bytes, media_type: str, title: str, *roles: str) -> SideFile:
        """Write a small file beside the stores and describe it."""
        self.documents.write(f"{self.prefix}/{name}", data)
        return SideFile(f"./{name}", media_type, checksum(data), len(data), title, roles)


class RedundantError(PublicationError):
    """Another run has just published a version made from the same by the same."""


@dataclass(frozen=True)
class Publication:
    """All that a version consists of besides its stores.

    Attributes:
        description: the product.
        layout: axes of the ensemble.
        provenance: what it was made from.
        report: gate results.
        side_files: assets besides the stores and the manifest, by key.
        checkpoint: path of the checkpoint's item below the destination.
        known_digests: sha256 of objects that were hashed when they were written, by path below the attempt.
        after: version that was the newest when the work began, "" where there was none; None if that does not matter.
    """

    description: Description
    layout: StoreLayout
    provenance: Provenance
    report: GateReport
    side_files: Mapping[str, SideFile]
    checkpoint: str
    known_digests: Mapping[str, str]
    after: str | None = None


@dataclass(frozen=True)
class Published:
    """A version that readers can see."""

    product: str
    version: str
    item_url: str


def listed(document: Mapping[str, Any]) -> dict[str, str]:
    """Versions that a collection lists, oldest first, with the addresses of their items relative to it.

    Raises:
        DamagedError: a link that no publisher of this catalogue writes.
    """
    found = {}
    for link in document.get("links", []):
        if link.get("rel") == "item":
            match = ITEM.match(str(link.get("href")))
            if match is None:
                raise DamagedError(
                    f"Collection {document.get('id')} lists {link.get('href')!r}, which is no item of it. It is "
                    "damaged or foreign; restore it from a backup."
                )
            found[match[2]] = match[0].removeprefix("./")
    return {version: found[version] for version in sorted(found, key=lambda version: int(version[1:]))}


def listed_attempts(document: Mapping[str, Any]) -> set[str]:
    """Names of the attempts that a collection lists as versions; nothing in them is written again."""
    return {href.split("/")[1] for href in listed(document).values()}


def publish(attempt: Attempt, publication: Publication) -> Published:
    """Make an attempt the next version of its product.

    The item is created first; it becomes visible in one compare-and-swap of the collection.

    Raises:
        GateError: a gate is not passed.
        RedundantError: a version of the same provenance has appeared since `publication.after`.
        PublicationError: the stores are not whole, the item is not valid, or other publishers win for too long.
    """
    publication.report.raise_if_failed()
    _require_whole(attempt)
    manifest = make_manifest(attempt.documents, attempt.prefix, publication.known_digests).encode()
    side = attempt.write_side_file(
        MANIFEST, manifest, "application/json", "Size and sha256 of every object", "metadata"
    )
    side_files = {**publication.side_files, "manifest": side}
    for _ in tries():
        try:
            published = _try_publish(attempt, publication, side_files)
        except ConflictError:
            continue
        link_product(attempt.documents, attempt.product, publication.description.title)
        return published
    raise PublicationError(
        f"Other publishers of {attempt.product} were faster for {PATIENCE_SECONDS:.0f} s. Run again later."
    )


def _require_whole(attempt: Attempt) -> None:
    for group in GROUPS:
        if not is_whole(attempt.group_url(group), attempt.documents.options):
            raise PublicationError(f"{attempt.group_url(group)} is not whole, so it is not published. Finish it first.")


def _try_publish(attempt: Attempt, publication: Publication, side_files: Mapping[str, SideFile]) -> Published:
    """Create the item under the next number, then swap the collection.

    Raises:
        ConflictError: another publisher was faster; nothing is visible.
    """
    documents, product = attempt.documents, attempt.product
    bbox, interval = footprint(publication.layout.grid)[0], period_of(publication.layout)
    path = collection_path(product)
    current, tag = _collection(documents, path, collection(publication.description, bbox, interval))
    there = listed(current)
    mine = [v for v, href in there.items() if href.split("/")[1] == attempt.name]
    if mine:  # the swap succeeded, though its answer was lost on the way
        return Published(product, mine[0], f"{attempt.url}/{mine[0]}.json")
    _require_not_removed(attempt, current)
    version = f"v{1 + max((int(v[1:]) for v in there), default=0)}"
    predecessor = next(reversed(there), None)
    if predecessor is not None and publication.after not in (None, predecessor):
        _require_different(documents, f"{product}/{there[predecessor]}", publication.provenance)
    document = _item(publication, version, there[predecessor] if predecessor else None, side_files)
    href = f"./data/{attempt.name}/{version}.json"
    raw = json.dumps(document, indent=1, allow_nan=False) + "\n"
    documents.write(f"{attempt.prefix}/{version}.json", raw.encode())
    assets = with_row(documents, product, current, document, href)
    changed = _with_version(current, version, href, bbox, interval)
    try:
        documents.replace(path, {**changed, **told(publication.description), "assets": assets}, tag)
    except ConflictError:
        _discard(attempt, version, current, assets)
        raise
    if predecessor is not None:
        link_neighbours(documents, product, listed(changed), predecessor)
    return Published(product, version, f"{attempt.url}/{version}.json")


def _item(
    publication: Publication, version: str, predecessor: str | None, side_files: Mapping[str, SideFile]
) -> Document:
    """Item of a version; its predecessor by its address relative to the collection.

    Raises:
        PublicationError: it is not valid.
    """
    lineage = Lineage(version, f"../../{predecessor}" if predecessor else None, f"../../../{publication.checkpoint}")
    document = item(
        publication.description,
        lineage,
        publication.layout,
        publication.provenance,
        side_files,
        [gate.model_dump() for gate in publication.report.gates],
        datetime.now(UTC),
    )
    validate(document)
    return document


def _require_different(documents: Documents, path: str, provenance: Provenance) -> None:
    found = documents.read(path)
    if found is None:
        return
    there = found[0]["properties"]
    if all(there.get(f"stsr:{name}") == value for name, value in provenance.model_dump(mode="json").items()):
        raise RedundantError(f"{found[0]['id']} was published meanwhile from the same source by the same recipe.")


def _collection(documents: Documents, path: str, first: Document) -> tuple[Document, str]:
    """Return the collection and its tag; where there is none it is created without versions."""
    found = documents.read(path)
    if found is None:
        documents.create(path, first)
        found = documents.read(path)
    if found is None:
        raise PublicationError(f"{documents.destination}/{path} vanished while it was published. Run again.")
    return found


def _require_not_removed(attempt: Attempt, current: Mapping[str, Any]) -> None:
    """Refuse an attempt that a reconcile took for dead.

    It announces in the collection what it removes, so that of it and this publisher only one can swap.
    """
    if attempt.name in current.get(REMOVING, []):
        raise PublicationError(
            f"{attempt.url} stood still so long that it was removed as left by a crash. Run the flow again."
        )
    _require_whole(attempt)


def _discard(attempt: Attempt, version: str, before: Mapping[str, Any], assets: Mapping[str, Any]) -> None:
    """Remove the item and index files of a lost race, unless the swap succeeded and only its answer was lost."""
    documents, product = attempt.documents, attempt.product
    now = documents.read(collection_path(product))
    if now is None or attempt.name in listed(now[0]).get(version, "").split("/"):
        return
    documents.remove(f"{attempt.prefix}/{version}.json")
    for key, asset in assets.items():
        if asset != before.get("assets", {}).get(key):
            documents.remove(f"{product}/{asset['href'].removeprefix('./')}")


def _with_version(
    current: Mapping[str, Any], version: str, href: str, bbox: list[float], interval: list[str]
) -> Document:
    """Collection with one more version, as its latest."""
    links = [link for link in current["links"] if link["rel"] != "latest-version"]
    links += [
        {"rel": rel, "href": href, "type": "application/geo+json", "title": version}
        for rel in ("item", "latest-version")
    ]
    box, (start, end) = bbox, interval  # what a collection without versions says of its extent is made up
    if listed(current):
        box = current["extent"]["spatial"]["bbox"][0]
        start, end = current["extent"]["temporal"]["interval"][0]
    extent = {
        "spatial": {"bbox": [union(box, bbox)]},
        "temporal": {"interval": [[min(start, interval[0]), max(end, interval[1])]]},
    }
    return {**current, "version": version, "links": links, "extent": extent}


def link_neighbours(documents: Documents, product: str, there: Mapping[str, str], version: str) -> None:
    """Link a version to those before and after it; only its links change, and reconcile makes good what is lost here.

    Where none comes after it, its link to a successor stays: one may have been published since.

    Args:
        documents: the catalogue.
        product: name of the product.
        there: versions that are listed, oldest first, with the addresses of their items relative to the collection.
        version: one of them, whose item is told.
    """
    names = list(there)
    place = names.index(version)
    around = {"predecessor-version": names[:place][-1:], "successor-version": names[place + 1 :][:1]}
    links = [
        {"rel": rel, "href": f"../../{there[name]}", "type": "application/geo+json"}
        for rel, found in around.items() for name in found
    ]  # fmt: skip
    replaced = {"predecessor-version", *(link["rel"] for link in links)}

    def change(item: Document) -> Document:
        return {**item, "links": [*(x for x in item["links"] if x["rel"] not in replaced), *links]}

    amend_item(documents, f"{product}/{there[version]}", change)


def amend_item(documents: Documents, path: str, change: Callable[[Document], Document]) -> None:
    """Amend an item after a swap that it follows from; a damaged one is no reason to call the swap failed."""
    try:
        documents.amend(path, change)
    except DamagedError as e:
        _log.warning("An item is left as it is until it is restored and its product reconciled. %s", e)


def link_product(documents: Documents, product: str, title: str) -> None:
    """List a product in the catalogue's root."""
    add_to_root(
        documents,
        {"rel": "child", "href": f"./{collection_path(product)}", "type": "application/json", "title": title},
    )


def add_to_root(documents: Documents, link: dict[str, str]) -> None:
    """Add a link to the catalogue's root, in place of one to the same address that says otherwise."""

    def change(root: Document) -> Document:
        links = [link if x.get("href") == link["href"] else x for x in root["links"]]
        return {**root, "links": links if link in links else [*links, link]}

    while documents.amend(CATALOG, change) is None:
        with suppress(ConflictError):  # another publisher made the same
            documents.create(CATALOG, root_catalog())


def quality_json(report: GateReport) -> bytes:
    """Encode a gate report as the quality report beside the data."""
    return (json.dumps(report.model_dump(), indent=1) + "\n").encode()
