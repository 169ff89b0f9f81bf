"""For readers: find versions and open them."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from stsr_core.catalog.addresses import collection_path, inside, is_name, product_names
from stsr_core.errors import StoreError, WithdrawnWarning

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import xarray as xr

    from stsr_core.catalog.documents import Document, Documents
    from stsr_core.catalog.index import Query
    from stsr_core.catalog.withdrawal import Withdrawal

READERS = 8  # items that are read at once


@dataclass(frozen=True)
class Version:
    """A published version: its name, its item and where the item is."""

    product: str
    version: str
    item: Mapping[str, Any]
    url: str

    @property
    def folder(self) -> str:
        """Address of everything that belongs to the version."""
        return self.url.rsplit("/", 1)[0]

    @property
    def withdrawn(self) -> str | None:
        """Why the version must no longer be used; None while it is good."""
        return self.item["properties"].get("stsr:withdrawn")

    def asset_url(self, key: str) -> str:
        """Address of an asset.

        Raises:
            StoreError: there is no such asset, or it is outside the version.
        """
        assets = self.item.get("assets", {})
        if key not in assets:
            raise StoreError(f"{self.product} {self.version} has no asset {key!r}; it has {', '.join(assets)}.")
        href = str(assets[key]["href"])
        if not inside(href):
            raise StoreError(f"{self.url} names {href!r} outside the version as {key!r}. It is forged; do not use it.")
        return f"{self.folder}/{href.removeprefix('./')}"


def _documents(catalog: str, options: Mapping[str, object] | None) -> Documents:
    from stsr_core.catalog.documents import Documents

    return Documents.at(catalog, options)


def _collection(documents: Documents, product: str) -> Document:
    """Collection of a product; without versions where there is none."""
    if not is_name(product):
        raise StoreError(f"{product!r} is no name of a product.")
    found = documents.read(collection_path(product))
    return found[0] if found else {}


def ls(catalog: str, *, storage_options: Mapping[str, object] | None = None) -> dict[str, list[str]]:
    """List products and their versions, oldest first.

    Raises:
        StoreError: there is no catalogue.
    """
    from stsr_core.catalog.publish import listed

    documents = _documents(catalog, storage_options)
    return {product: list(listed(_collection(documents, product))) for product in product_names(documents)}


def published(product: str, catalog: str, *, storage_options: Mapping[str, object] | None = None) -> list[str]:
    """List the versions of one product, oldest first; none where there is no such product."""
    from stsr_core.catalog.publish import listed

    return list(listed(_collection(_documents(catalog, storage_options), product)))


def products(catalog: str, *, storage_options: Mapping[str, object] | None = None) -> list[str]:
    """List the products of a catalogue, whether their collections can be read or not.

    Raises:
        StoreError: there is no catalogue.
    """
    return product_names(_documents(catalog, storage_options))


def find(product: str, version: str, catalog: str, *, storage_options: Mapping[str, object] | None = None) -> Version:
    """Find a version by name, or "latest": the newest that is not withdrawn.

    Raises:
        StoreError: no such product or version; the message says what there is.
    """
    from stsr_core.catalog.publish import listed
    from stsr_core.catalog.withdrawal import latest_good, withdrawals

    documents = _documents(catalog, storage_options)
    collection = _collection(documents, product)
    there = listed(collection)
    if not there:
        have = ", ".join(ls(catalog, storage_options=storage_options)) or "none"
        raise StoreError(f"No version of product {product!r} is published in {catalog}; its products are {have}.")
    name = latest_good(collection) if version == "latest" else version
    if name is None:
        why = "; ".join(f"{v}: {w.reason}" for v, w in withdrawals(collection).items())
        raise StoreError(f"Every version of {product} is withdrawn ({why}). Name one if you must have it.")
    if name not in there:
        raise StoreError(f"{product} has no version {version!r}; it has {', '.join(there)}.")
    return _version(documents, product, collection, name)


def _version(documents: Documents, product: str, collection: Document, version: str) -> Version:
    """Read the item of a version; it says of its withdrawal what the collection says."""
    from stsr_core.catalog.publish import listed
    from stsr_core.catalog.withdrawal import as_withdrawn, withdrawals

    path = f"{product}/{listed(collection)[version]}"
    found = documents.read(path)
    if found is None:
        raise StoreError(f"{documents.destination}/{path} is listed but missing. Restore it from a backup.")
    item = as_withdrawn(found[0], withdrawals(collection).get(version))
    return Version(product, version, item, f"{documents.destination}/{path}")


def latest(product: str, catalog: str, *, storage_options: Mapping[str, object] | None = None) -> Version | None:
    """Return the latest good version of a product, None where there is none."""
    from stsr_core.catalog.withdrawal import latest_good

    documents = _documents(catalog, storage_options)
    collection = _collection(documents, product)
    name = latest_good(collection)
    return None if name is None else _version(documents, product, collection, name)


def newest(product: str, catalog: str, *, storage_options: Mapping[str, object] | None = None) -> Version | None:
    """Return the newest version of a product, withdrawn or not; None where nothing is published yet."""
    from stsr_core.catalog.publish import listed

    documents = _documents(catalog, storage_options)
    collection = _collection(documents, product)
    name = next(reversed(listed(collection)), None)
    return None if name is None else _version(documents, product, collection, name)


def withdrawn(
    product: str, catalog: str, *, storage_options: Mapping[str, object] | None = None
) -> dict[str, Withdrawal]:
    """Withdrawn versions of a product, oldest first, each with its reason."""
    from stsr_core.catalog.withdrawal import withdrawals

    return withdrawals(_collection(_documents(catalog, storage_options), product))


def search(
    catalog: str,
    query: Query,
    *,
    product: str | None = None,
    storage_options: Mapping[str, object] | None = None,
) -> list[Version]:
    """Find versions by place, time and properties, through the index; the items of the hits are read.

    Args:
        catalog: folder or URL of the catalogue.
        query: what to look for; its limit counts per product.
        product: name of a product; without it all are searched.
        storage_options: options of the filesystem, for s3.

    Raises:
        ConfigurationError: the query is not understood.
        StoreError: no catalogue, or a damaged one.
    """
    documents = _documents(catalog, storage_options)
    found = _found(documents, [product] if product else product_names(documents), query)
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda p: _version(documents, *p), found))


def _found(documents: Documents, products: Sequence[str], query: Query) -> list[tuple[str, Document, str]]:
    """Versions that are found, each with its product and the collection of which it is.

    Again where a publisher replaced an index meanwhile and a reconcile removed the old one.
    """
    from stsr_core.catalog.index import look_up

    before = None
    while True:
        collections = {product: _collection(documents, product) for product in products}
        try:
            found = look_up(documents, collections, query)
        except StoreError:
            if before == collections:
                raise
            before = collections
            continue
        return [(name, collections[name], version) for name, versions in found.items() for version in versions]


def open_version(
    product: str,
    version: str = "latest",
    *,
    catalog: str,
    group: Literal["ensemble", "series", "overview", "coarse"] = "ensemble",
    storage_options: Mapping[str, object] | None = None,
) -> xr.Dataset:
    """Open a published version lazily.

    Args:
        product: name of the product.
        version: v1, v2, ... or "latest", the newest that is not withdrawn.
        catalog: folder or URL of the catalogue.
        group: "ensemble" (member, time, y, x); "series", the same laid out for time series at a point;
            "overview" (statistics over members); or "coarse" (the totals that every member conserves).
        storage_options: options of the fsspec filesystem, for s3.

    Warns:
        WithdrawnWarning: the version is withdrawn; the message says why.

    Raises:
        StoreError: no such product or version.
    """
    import xarray as xr

    found = find(product, version, catalog, storage_options=storage_options)
    if found.withdrawn:
        message = f"{product} {found.version} is withdrawn: {found.withdrawn}. Open its latest version instead."
        warnings.warn(message, WithdrawnWarning, stacklevel=2)
    options = dict(storage_options or {}) or None
    return xr.open_zarr(found.asset_url(group), storage_options=options, chunks=None)
