"""For readers: find versions and open them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from stsr_core.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import xarray as xr

    from stsr_core.catalog.documents import Document, Documents
    from stsr_core.catalog.index import Hit, Query

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

    def asset_url(self, key: str) -> str:
        """Address of an asset.

        Raises:
            StoreError: there is no such asset, or it is outside the version.
        """
        assets = self.item.get("assets", {})
        if key not in assets:
            raise StoreError(f"{self.product} {self.version} has no asset {key!r}; it has {', '.join(assets)}.")
        href = str(assets[key]["href"])
        if not href.startswith("./") or ".." in href.split("/"):
            raise StoreError(f"{self.url} names {href!r} outside the version as {key!r}. It is forged; do not use it.")
        return f"{self.folder}/{href.removeprefix('./')}"


def _documents(catalog: str, options: Mapping[str, object] | None) -> Documents:
    from stsr_core.catalog.documents import Documents

    return Documents(str(catalog).rstrip("/"), dict(options or {}))


def _products(documents: Documents) -> list[str]:
    root = documents.read("catalog.json")
    if root is None:
        raise StoreError(f"No catalogue is at {documents.destination}. Name the folder or prefix of its catalog.json.")
    links = [str(link["href"]) for link in root[0]["links"] if link["rel"] == "child"]
    return [href.removeprefix("./").split("/")[0] for href in links]


def _collection(documents: Documents, product: str) -> Document:
    """Collection of a product; without versions where there is none."""
    if not product or product != product.strip("./\\") or "/" in product:
        raise StoreError(f"{product!r} is no name of a product.")
    found = documents.read(f"{product}/collection.json")
    return found[0] if found else {}


def ls(catalog: str, *, storage_options: Mapping[str, object] | None = None) -> dict[str, list[str]]:
    """List products and their versions, oldest first.

    Raises:
        StoreError: there is no catalogue.
    """
    from stsr_core.catalog.publish import versions

    documents = _documents(catalog, storage_options)
    return {product: versions(_collection(documents, product)) for product in _products(documents)}


def find(product: str, version: str, catalog: str, *, storage_options: Mapping[str, object] | None = None) -> Version:
    """Find a version by name, or "latest".

    Raises:
        StoreError: no such product or version; the message says what there is.
    """
    from stsr_core.catalog.publish import listed

    documents = _documents(catalog, storage_options)
    there = listed(_collection(documents, product))
    if not there:
        have = ", ".join(ls(catalog, storage_options=storage_options)) or "none"
        raise StoreError(f"No version of product {product!r} is published in {catalog}; its products are {have}.")
    name = next(reversed(there)) if version == "latest" else version
    if name not in there:
        raise StoreError(f"{product} has no version {version!r}; it has {', '.join(there)}.")
    return _version(documents, product, name, there[name])


def _version(documents: Documents, product: str, version: str, href: str) -> Version:
    """Read the item of a version."""
    path = f"{product}/{href.removeprefix('./')}"
    found = documents.read(path)
    if found is None:
        raise StoreError(f"{documents.destination}/{path} is listed but missing. Restore it from a backup.")
    return Version(product, version, found[0], f"{documents.destination}/{path}")


def latest(product: str, catalog: str, *, storage_options: Mapping[str, object] | None = None) -> Version | None:
    """Return the latest version of a product, None where nothing is published yet."""
    from stsr_core.catalog.publish import listed

    documents = _documents(catalog, storage_options)
    there = listed(_collection(documents, product))
    if not there:
        return None
    name = next(reversed(there))
    return _version(documents, product, name, there[name])


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
    found = []
    for name in [product] if product else _products(documents):
        found += [(name, hit) for hit in _hits(documents, name, query)]
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda p: _version(documents, p[0], p[1].version, p[1].href), found))


def _hits(documents: Documents, product: str, query: Query) -> list[Hit]:
    """Search one product; again where a publisher replaced the index meanwhile and a reconcile removed the old one."""
    from stsr_core.catalog.index import look_up

    collection = _collection(documents, product)
    while True:
        try:
            return look_up(documents, product, collection, query)[0]
        except StoreError:
            newer = _collection(documents, product)
            if newer.get("assets") == collection.get("assets"):
                raise
            collection = newer


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
        version: v1, v2, ... or "latest".
        catalog: folder or URL of the catalogue.
        group: "ensemble" (member, time, y, x); "series", the same laid out for time series at a point;
            "overview" (statistics over members); or "coarse" (the totals that every member conserves).
        storage_options: options of the fsspec filesystem, for s3.

    Raises:
        StoreError: no such product or version.
    """
    import xarray as xr

    found = find(product, version, catalog, storage_options=storage_options)
    options = dict(storage_options or {}) or None
    return xr.open_zarr(found.asset_url(group), storage_options=options, chunks=None)
