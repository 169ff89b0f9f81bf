"""For readers: find versions and open them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from stsr_core.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import xarray as xr


@dataclass(frozen=True)
class Version:
    """A published version: its name, its item and where the item is."""

    product: str
    version: str
    item: Mapping[str, Any]
    url: str

    def asset_url(self, key: str) -> str:
        """Address of an asset."""
        folder = self.url.rsplit("/", 1)[0]
        return f"{folder}/{str(self.item['assets'][key]['href']).removeprefix('./')}"


def _documents(catalog: str, options: Mapping[str, object] | None) -> Any:
    from stsr_core.catalog.documents import Documents

    return Documents(str(catalog), dict(options or {}))


def ls(catalog: str, *, storage_options: Mapping[str, object] | None = None) -> dict[str, list[str]]:
    """List products and their versions, oldest first.

    Raises:
        StoreError: there is no catalogue.
    """
    from stsr_core.catalog.publish import versions

    documents = _documents(catalog, storage_options)
    root = documents.read("catalog.json")
    if root is None:
        raise StoreError(f"No catalogue is at {catalog}. Name the folder or prefix that holds catalog.json.")
    listed = {}
    for link in root[0]["links"]:
        if link["rel"] == "child":
            product = str(link["href"]).removeprefix("./").split("/")[0]
            found = documents.read(f"{product}/collection.json")
            listed[product] = versions(found[0]) if found else []
    return listed


def find(product: str, version: str, catalog: str, *, storage_options: Mapping[str, object] | None = None) -> Version:
    """Find a version by name, or "latest".

    Raises:
        StoreError: no such product or version; the message says what there is.
    """
    from stsr_core.catalog.publish import versions

    documents = _documents(catalog, storage_options)
    found = documents.read(f"{product}/collection.json")
    listed = versions(found[0]) if found else []
    if not listed:
        have = ", ".join(ls(catalog, storage_options=storage_options)) or "none"
        raise StoreError(f"No version of product {product!r} is published in {catalog}; its products are {have}.")
    name = listed[-1] if version == "latest" else version
    stored = documents.read(f"{product}/{name}.json") if name in listed else None
    if stored is None:
        raise StoreError(f"{product} has no version {version!r}; it has {', '.join(listed)}.")
    return Version(product, name, stored[0], f"{catalog}/{product}/{name}.json")


def latest(product: str, catalog: str, *, storage_options: Mapping[str, object] | None = None) -> Version | None:
    """Return the latest version of a product, None where nothing is published yet."""
    found = _documents(catalog, storage_options).read(f"{product}/collection.json")
    if found is None or not any(link["rel"] == "item" for link in found[0]["links"]):
        return None
    return find(product, "latest", catalog, storage_options=storage_options)


def open_version(
    product: str,
    version: str = "latest",
    *,
    catalog: str,
    group: Literal["ensemble", "overview"] = "ensemble",
    storage_options: Mapping[str, object] | None = None,
) -> xr.Dataset:
    """Open a published version lazily.

    Args:
        product: name of the product.
        version: v1, v2, ... or "latest".
        catalog: folder or URL of the catalogue.
        group: "ensemble" (member, time, y, x) or "overview" (statistics over members).
        storage_options: options of the fsspec filesystem, for s3.

    Raises:
        StoreError: no such product or version.
    """
    import xarray as xr

    found = find(product, version, catalog, storage_options=storage_options)
    options = dict(storage_options or {}) or None
    return xr.open_zarr(found.asset_url(group), storage_options=options, chunks=None)
