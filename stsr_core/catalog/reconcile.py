"""Finish or clean what a crash left of a product, safely beside publishers that are alive."""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from stsr_core.catalog.addresses import CATALOG, collection_path, is_name
from stsr_core.catalog.claims import FOLDER
from stsr_core.catalog.documents import ConflictError, Documents
from stsr_core.catalog.footprint import WORLD
from stsr_core.catalog.index import named
from stsr_core.catalog.items import Description, collection, stamp
from stsr_core.catalog.publish import REMOVING, link_neighbours, link_product, listed, listed_attempts
from stsr_core.catalog.withdrawal import settle_item, withdrawals
from stsr_core.errors import ConfigurationError, PublicationError

if TYPE_CHECKING:
    from stsr_core.catalog.documents import Document, Options

GRACE = timedelta(hours=24)  # an attempt that wrote nothing for so long is dead
ROUND = "stsr:reconciled"  # counts up: tags follow content, so a collection must never become what it was
OURS = re.compile(r"^[0-9a-f]{12}(\.json|\.parquet)?$")  # attempts, claims and index files; no name that people give
CHECKED = 100  # newest versions whose links are checked, beside the oldest


def reconcile(
    destination: str,
    product: str,
    options: Options | None = None,
    *,
    grace: timedelta = GRACE,
    dry_run: bool = False,
    sole_publisher: bool = False,
) -> list[str]:
    """Remove attempts and index files that the collection does not name; mend links between versions.

    Only what wrote nothing for longer than `grace` counts as dead. It is first announced in the collection, by the
    same compare-and-swap that publishes: a publisher that was thought dead then loses its swap and finds itself
    announced, so nothing that is listed can be removed, whatever the clocks say. A product that never got a version
    has no collection; one without versions is made to announce in, which the first publisher goes on with.

    Args:
        destination: folder or bucket of the catalogue.
        product: name of the product.
        options: options of the filesystem.
        grace: silence after which an attempt is dead.
        dry_run: only say what would be removed.
        sole_publisher: the store lacks conditional writes, and nobody else publishes there.

    Returns:
        What was removed, relative to the destination.

    Raises:
        ConfigurationError: there is no such product.
        PublicationError: the collection is damaged, the store cannot be used, or something cannot be removed.
    """
    if not is_name(product):
        raise PublicationError(f"{product!r} is no name of a product. Give the one of its folder in {destination}.")
    documents = Documents.at(destination, options, sole_publisher=sole_publisher)
    path = collection_path(product)
    found = documents.read(path)
    if found is None:
        require_data(documents, product)
    current = found[0] if found is not None else {}
    dead = _dead(documents, product, current, datetime.now(UTC) - grace)
    if found is None:  # the folder may be anyone's
        dead = [place for place in dead if OURS.match(_name(place))]
    if dry_run or (found is None and not dead):
        return [f"{product}/{d}" for d in dead]
    if found is None:
        with suppress(ConflictError):  # its first publisher made one meanwhile
            documents.create(path, _nothing_yet(product))
    dead = _announce(documents, path, dead)
    for name in dead:
        documents.remove(f"{product}/{name}")
    _forget(documents, path, {*map(_name, dead), *current.get(REMOVING, [])})
    _mend(documents, product, current)
    return [f"{product}/{d}" for d in dead]


def require_data(documents: Documents, product: str) -> None:
    """Refuse the name of a product that has no collection, unless it left data or claims.

    Raises:
        ConfigurationError: it did not.
    """
    if not any(documents.names(f"{product}/{folder}") for folder in ("data", FOLDER)):
        raise ConfigurationError(
            f"{documents.destination} has neither versions nor data of a product {product!r}. See `stsr catalog ls`."
        )


def unlisted(destination: str, options: Options | None = None) -> list[str]:
    """Products with data or claims that the catalogue's root does not list: they never got a version.

    Raises:
        PublicationError: the store cannot be used.
    """
    documents = Documents.at(destination, options)
    found = documents.read(CATALOG)
    there = {link.get("href") for link in found[0].get("links", [])} if found is not None else set()
    names = [name for name in documents.names("") if f"./{collection_path(name)}" not in there]
    left = {name: [*documents.names(f"{name}/data"), *documents.names(f"{name}/{FOLDER}")] for name in names}
    return [name for name in names if any(map(OURS.match, left[name]))]


def _nothing_yet(product: str) -> Document:
    """Collection of a product without versions; its first publisher says everything else."""
    now = stamp(datetime.now(UTC))
    description = Description(product, product, f"Nothing of {product} is published yet.", "other", "unknown", ())
    return collection(description, list(WORLD), [now, now])


def _name(place: str) -> str:
    return place.rsplit("/", 1)[-1]


def _named(current: dict[str, Any]) -> set[str]:
    """Attempts and index files that a collection names."""
    return listed_attempts(current) | named(current)


def _announce(documents: Documents, path: str, dead: list[str]) -> list[str]:
    """Say in the collection what is about to be removed; returns what of it nobody published meanwhile."""
    left: list[str] = []

    def change(current: Document) -> Document:
        left[:] = [d for d in dead if _name(d) not in _named(current)]
        announced = sorted({*current.get(REMOVING, []), *map(_name, left)})
        return {**current, REMOVING: announced, ROUND: current.get(ROUND, 0) + 1} if left else current

    if dead:
        documents.amend(path, change)
    return left


def _dead(documents: Documents, product: str, current: dict[str, Any], before: datetime) -> list[str]:
    """Attempts, index files and claims that nothing names and that wrote nothing since `before`.

    Places are relative to the product. A claim lives as long as its attempt writes, and an attempt as long as it was
    claimed anew: who goes on with it may compute long before it writes. Those that an interrupted reconcile announced
    are among them.
    """
    kept = _named(current)
    announced = set(current.get(REMOVING, []))
    candidates = [
        f"{folder}/{name}" for folder in ("data", "index", FOLDER) for name in documents.names(f"{product}/{folder}")
        if name not in kept
    ]  # fmt: skip
    dead = []
    for place in candidates:
        attempt = _name(place).removesuffix(".json")
        places = [place] if place.startswith("index/") else [f"data/{attempt}", f"{FOLDER}/{attempt}.json"]
        times = [written for p in places for _, written in documents.files(f"{product}/{p}").values()]
        if _name(place) in announced or (times and max(times) <= before):
            dead.append(place)
    return dead


def _forget(documents: Documents, path: str, gone: set[str]) -> None:
    """Forget what is removed; a publisher of it finds its store not whole."""

    def change(collection: Document) -> Document:
        left = [name for name in collection.get(REMOVING, []) if name not in gone]
        rest = {k: v for k, v in collection.items() if k != REMOVING}
        return {**rest, **({REMOVING: left} if left else {})}

    if gone:
        documents.amend(path, change)


def _mend(documents: Documents, product: str, current: dict[str, Any]) -> None:
    """Write what items owe to what is listed after a swap: links to their neighbours, and their withdrawal."""
    there = listed(current)
    checked = {*list(there)[:1], *list(there)[-CHECKED:]}  # the oldest may have lost its predecessor
    for version in checked:
        link_neighbours(documents, product, there, version)
    for version in {*checked, *withdrawals(current)}:
        settle_item(documents, product, current, version)
    if there:
        link_product(documents, product, str(current.get("title", product)))
