"""Where things lie in a catalogue, and which names, addresses and bytes in it may be believed."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from stsr_core.errors import StoreError

if TYPE_CHECKING:
    from stsr_core.catalog.documents import Documents

CATALOG = "catalog.json"
SHA256 = "1220"  # what multihashes begin with that are a sha256


def collection_path(product: str) -> str:
    """Path of a product's collection below the destination."""
    return f"{product}/collection.json"


def is_name(product: str) -> bool:
    """Whether a product may be called so: its name is that of one folder, which is not hidden."""
    return bool(product) and product == product.strip("./\\") and "/" not in product


def inside(href: str) -> bool:
    """Whether an address begins with ./ and stays in the folder that it is relative to."""
    return href.startswith("./") and not {"", ".."} & set(href.removeprefix("./").split("/"))


def checksum(data: bytes) -> str:
    """Sha256 of a file as the file extension of STAC wants it."""
    return SHA256 + hashlib.sha256(data).hexdigest()


def product_names(documents: Documents) -> list[str]:
    """Names of the products that the catalogue's root lists.

    Raises:
        StoreError: there is no catalogue, or it lists something outside it.
    """
    root = documents.read(CATALOG)
    if root is None:
        raise StoreError(f"No catalogue is at {documents.destination}. Name the folder or prefix of its {CATALOG}.")
    hrefs = [str(link.get("href")) for link in root[0].get("links", []) if link.get("rel") == "child"]
    names = [href.removeprefix("./").removesuffix(collection_path("")) for href in hrefs]
    if bad := [name for name in names if not is_name(name)]:
        raise StoreError(f"The catalogue names a product at {bad[0]!r}, outside it. Do not trust it.")
    return names
