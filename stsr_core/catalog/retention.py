"""Retention: old versions leave the catalogue, by one compare-and-swap; `reconcile` then removes their data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from stsr_core.catalog.documents import ConflictError, Documents
from stsr_core.catalog.index import without_rows
from stsr_core.catalog.publish import listed
from stsr_core.errors import PublicationError

if TYPE_CHECKING:
    from stsr_core.catalog.documents import Document, Options

TRIES = 20  # publishers that may be faster


def expired(created: Mapping[str, datetime], *, keep: int, age: timedelta, now: datetime) -> list[str]:
    """Versions that retention lets go, oldest first; the latest one never goes.

    Args:
        created: when each listed version was made, oldest first.
        keep: newest versions that stay, whatever their age.
        age: versions younger than this stay.
        now: the time to count from.
    """
    names = list(created)[: -max(1, keep)]
    return [name for name in names if now - created[name] >= age]


def made(product: str, destination: str, options: Options | None = None) -> dict[str, datetime]:
    """When each listed version of a product was made, oldest first.

    Raises:
        PublicationError: an item that its collection lists is not there.
    """
    documents = Documents(destination.rstrip("/"), dict(options or {}))
    found = documents.read(f"{product}/collection.json")
    dates = {}
    for name, href in listed(found[0]).items() if found else ():
        stored = documents.read(f"{product}/{href}")
        if stored is None:
            raise PublicationError(f"{product} lists {name}, but {href} is missing. Restore it from a backup.")
        dates[name] = datetime.fromisoformat(stored[0]["properties"]["created"]).astimezone(UTC)
    return dates


def retire(
    product: str,
    names: Sequence[str],
    destination: str,
    options: Options | None = None,
    *,
    sole_publisher: bool = False,
) -> None:
    """Take versions out of their collection and its index.

    Their data stay until `reconcile` finds that nothing names them.

    Raises:
        PublicationError: the latest version is among them, or too many publishers were faster.
    """
    documents = Documents(destination.rstrip("/"), dict(options or {}), sole_publisher)
    path = f"{product}/collection.json"
    for _ in range(TRIES if names else 0):
        found = documents.read(path)
        if found is None:
            return
        collection, tag = found
        last = next(reversed(listed(collection)), None)
        if last in names:
            raise PublicationError(f"{last} is the latest version of {product}; it is never retired. Keep it.")
        try:
            documents.replace(path, _without(documents, product, collection, names), tag)
        except ConflictError:
            continue
        return
    if names:
        raise PublicationError(f"{TRIES} publishers of {product} were faster each time. Run again later.")


def _without(documents: Documents, product: str, collection: Document, names: Sequence[str]) -> dict[str, Any]:
    gone = {f"./{href}" for name, href in listed(collection).items() if name in names}
    links = [x for x in collection["links"] if x["rel"] != "item" or x["href"] not in gone]
    return {**collection, "links": links, "assets": without_rows(documents, product, collection, names)}
