"""Retention: old versions leave the catalogue, by one compare-and-swap; `reconcile` then removes their data."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from stsr_core.catalog.addresses import collection_path
from stsr_core.catalog.documents import Documents
from stsr_core.catalog.index import created, without_rows
from stsr_core.catalog.publish import listed
from stsr_core.catalog.reconcile import require_data
from stsr_core.catalog.withdrawal import latest_good, withdrawals
from stsr_core.errors import PublicationError

if TYPE_CHECKING:
    from stsr_core.catalog.documents import Document, Options


def expired(
    created: Mapping[str, datetime],
    *,
    keep: int,
    age: timedelta,
    now: datetime,
    withdrawn: Collection[str] = (),
) -> list[str]:
    """Versions that retention lets go, oldest first; neither the newest nor the latest good one ever goes.

    Args:
        created: when each listed version was made, oldest first.
        keep: newest good versions that stay, whatever their age.
        age: versions younger than this stay.
        now: the time to count from.
        withdrawn: versions that are withdrawn; they take no place among the good ones.
    """
    kept = {*[name for name in created if name not in withdrawn][-max(1, keep) :], *list(created)[-1:]}
    return [name for name, when in created.items() if name not in kept and now - when >= age]


def expiring(product: str, destination: str, options: Options | None = None, *, keep: int, age: timedelta) -> list[str]:
    """Versions of a product that retention lets go now, oldest first; see `expired`.

    Raises:
        ConfigurationError: there is no such product.
        StoreError: the index is damaged.
    """
    documents = Documents.at(destination, options)
    found = documents.read(collection_path(product))
    if found is None:
        require_data(documents, product)
    collection = found[0] if found else {}
    made = created(documents, product, collection)
    return expired(made, keep=keep, age=age, now=datetime.now(UTC), withdrawn=withdrawals(collection))


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
        PublicationError: the newest or the latest good version is among them, or others were faster for too long.
    """
    documents = Documents.at(destination, options, sole_publisher=sole_publisher)

    def change(collection: Document) -> Document:
        kept = {latest_good(collection), next(reversed(listed(collection)), None)}
        if there := sorted(kept & set(names), key=str):
            raise PublicationError(f"{there[0]} is the latest version of {product}; it is never retired. Keep it.")
        return _without(documents, product, collection, names)

    if names:
        documents.amend(collection_path(product), change)


def _without(documents: Documents, product: str, collection: Document, names: Sequence[str]) -> dict[str, Any]:
    gone = {f"./{href}" for name, href in listed(collection).items() if name in names}
    links = [x for x in collection["links"] if x["rel"] != "item" or x["href"] not in gone]
    return {**collection, "links": links, "assets": without_rows(documents, product, collection, names)}
