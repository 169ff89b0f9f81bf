"""Withdrawal: a version that must no longer be used stays listed and says why; `latest` is the good one before it.

One compare-and-swap of the collection withdraws: the link to the item says so, and so does the row in the index that
is swapped with it. The item itself says so a moment later, or after the next `reconcile` if the process dies between;
readers of `stsr_core.catalog` are told at once, because they read the collection first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from stsr_core.catalog.addresses import collection_path
from stsr_core.catalog.documents import Documents
from stsr_core.catalog.index import with_values
from stsr_core.catalog.items import stamp
from stsr_core.catalog.publish import amend_item, listed
from stsr_core.errors import PublicationError

if TYPE_CHECKING:
    from stsr_core.catalog.documents import Document, Options

WITHDRAWN = "stsr:withdrawn"  # the reason, on the link to an item, in the item and in the index
LONGEST = 500  # characters of a reason


@dataclass(frozen=True)
class Withdrawal:
    """Why a version was withdrawn, and when."""

    reason: str
    at: str


def withdrawals(collection: Mapping[str, Any]) -> dict[str, Withdrawal]:
    """Withdrawn versions of a collection."""
    links = {str(x["href"]).removeprefix("./"): x for x in collection.get("links", []) if WITHDRAWN in x}
    return {
        version: Withdrawal(str(links[href][WITHDRAWN]), str(links[href]["updated"]))
        for version, href in listed(collection).items()
        if href in links
    }


def latest_good(collection: Mapping[str, Any]) -> str | None:
    """Newest version that is not withdrawn, None where there is none."""
    gone = withdrawals(collection)
    return next((version for version in reversed(listed(collection)) if version not in gone), None)


def as_withdrawn(item: Document, withdrawal: Withdrawal | None) -> Document:
    """Item that says whether it is withdrawn; the same one where it says so already."""
    if item["properties"].get(WITHDRAWN) == (withdrawal and withdrawal.reason):
        return item
    properties = {k: v for k, v in item["properties"].items() if k != WITHDRAWN}
    if withdrawal is None:
        return {**item, "properties": {**properties, "deprecated": False}}
    said = {"updated": withdrawal.at, "deprecated": True, WITHDRAWN: withdrawal.reason}
    return {**item, "properties": {**properties, **said}}


def withdraw(
    product: str,
    version: str,
    reason: str,
    destination: str,
    options: Options | None = None,
    *,
    dry_run: bool = False,
    sole_publisher: bool = False,
) -> str | None:
    """Withdraw a version for a reason; its data stay.

    Args:
        product: name of the product.
        version: v1, v2, ...
        reason: what is wrong with it, for those who used it.
        destination: folder or bucket of the catalogue.
        options: options of the filesystem.
        dry_run: only say what would be latest.
        sole_publisher: the store lacks conditional writes, and nobody else publishes there.

    Returns:
        The version that is latest now, None where every version is withdrawn.

    Raises:
        PublicationError: there is no such version, it is withdrawn for another reason, or no good reason is given.
    """
    if not reason.strip() or len(reason) > LONGEST or not reason.isprintable():
        raise PublicationError(
            f"A reason of {len(reason)} characters is given; one line of 1 to {LONGEST} is needed. Say in a sentence "
            "what is wrong with the version."
        )
    documents = Documents.at(destination, options, sole_publisher=sole_publisher)
    return _settle(documents, product, version, Withdrawal(reason, stamp(datetime.now(UTC))), dry_run=dry_run)


def restore(
    product: str,
    version: str,
    destination: str,
    options: Options | None = None,
    *,
    dry_run: bool = False,
    sole_publisher: bool = False,
) -> str | None:
    """Take back the withdrawal of a version; arguments, result and errors are those of `withdraw`."""
    documents = Documents.at(destination, options, sole_publisher=sole_publisher)
    return _settle(documents, product, version, None, dry_run=dry_run)


def _settle(
    documents: Documents, product: str, version: str, withdrawal: Withdrawal | None, *, dry_run: bool
) -> str | None:
    def change(collection: Document) -> Document:
        _require(documents, product, collection, version, withdrawal)
        state = withdrawals(collection).get(version)
        if (state and state.reason) == (withdrawal and withdrawal.reason):
            return collection
        marked = _marked(collection, version, withdrawal)
        return marked if dry_run else {**marked, "assets": _indexed(documents, product, marked, version, withdrawal)}

    path = collection_path(product)
    if dry_run:
        found = documents.read(path)
        return latest_good(change(found[0] if found else {}))
    collection = documents.amend(path, change)
    if collection is None:
        raise PublicationError(f"No product {product} is published in {documents.destination}. See `stsr catalog ls`.")
    settle_item(documents, product, collection, version)
    return latest_good(collection)


def _require(
    documents: Documents, product: str, collection: Document, version: str, withdrawal: Withdrawal | None
) -> None:
    """Refuse a version that is not there, and a second reason."""
    there = listed(collection)
    if version not in there:
        have = ", ".join(there) or "no version"
        raise PublicationError(f"{product} in {documents.destination} has no version {version!r}; it has {have}.")
    state = withdrawals(collection).get(version)
    if withdrawal and state and state.reason != withdrawal.reason:
        raise PublicationError(
            f"{product} {version} is withdrawn already, since {state.at}: {state.reason}. Restore it first to give "
            "another reason."
        )


def _marked(collection: Document, version: str, withdrawal: Withdrawal | None) -> Document:
    """Collection in which a version is, or is no longer, withdrawn."""
    there = listed(collection)
    said = {"deprecated": True, WITHDRAWN: withdrawal.reason, "updated": withdrawal.at} if withdrawal else {}
    links = []
    for link in collection["links"]:
        bare = {k: v for k, v in link.items() if k not in ("deprecated", WITHDRAWN, "updated")}
        mine = link["rel"] == "item" and link["href"].removeprefix("./") == there[version]
        links.append({**bare, **said} if mine else link)
    marked = {**collection, "links": [x for x in links if x["rel"] != "latest-version"]}
    latest = latest_good(marked)
    marked.pop("version", None)
    if latest is None:
        return marked
    link = {"rel": "latest-version", "href": f"./{there[latest]}", "type": "application/geo+json", "title": latest}
    return {**marked, "version": latest, "links": [*marked["links"], link]}


def _indexed(
    documents: Documents, product: str, collection: Document, version: str, withdrawal: Withdrawal | None
) -> dict[str, Any]:
    values = {"deprecated": withdrawal is not None, WITHDRAWN: withdrawal.reason if withdrawal else None}
    return with_values(documents, product, collection, version, values)


def settle_item(documents: Documents, product: str, collection: Mapping[str, Any], version: str) -> None:
    """Let an item say of its withdrawal what its collection says.

    The collection is read again after the item, so that a withdrawal meanwhile is never undone: whoever made it
    either changed the item, and this loses, or changes it after this.
    """

    def change(item: Document) -> Document:
        if as_withdrawn(item, withdrawals(collection).get(version)) is item:
            return item
        found = documents.read(collection_path(product))
        return as_withdrawn(item, withdrawals(found[0] if found else {}).get(version))

    amend_item(documents, f"{product}/{listed(collection)[version]}", change)
