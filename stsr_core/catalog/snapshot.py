"""The whole catalogue in memory, for servers: read again when a collection changed, searched without touching a disk.

A request is answered from one snapshot, so what it says belongs together. A change that cannot be read, or that
should not be believed, is logged and left; what was good is served on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stsr_core.catalog.addresses import collection_path, inside, product_names
from stsr_core.catalog.documents import DamagedError, Documents, encode
from stsr_core.catalog.index import TEXTS, TIMES, Query, bare, joined, read_index, select
from stsr_core.catalog.items import stamp
from stsr_core.catalog.publish import listed
from stsr_core.catalog.withdrawal import Withdrawal, as_withdrawn, withdrawals
from stsr_core.errors import StoreError, StsrError

if TYPE_CHECKING:
    import pyarrow as pa

    from stsr_core.catalog.documents import Document

TOP = ("type", "stac_version", "stac_extensions", "id", "collection", "assets")  # of an item, beside its properties
OTHER = ("geometry", "bbox", "links", "href")  # columns that are no properties either
KEPT = 4  # snapshots that pages of earlier searches may still come from
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Product:
    """A product as its collection was in the state `tag`."""

    tag: str
    collection: Document
    rows: pa.Table | None

    @cached_property
    def _names(self) -> list[str]:
        return list(listed(self.collection))

    @cached_property
    def _places(self) -> dict[str, int]:
        return {version: place for place, version in enumerate(self._names)}

    @cached_property
    def withdrawn(self) -> dict[str, Withdrawal]:
        """Withdrawn versions."""
        return withdrawals(self.collection)

    def neighbours(self, version: str) -> tuple[str | None, str | None]:
        """The versions before and after one, None where there is none."""
        names, place = self._names, self._places[version]
        return names[place - 1] if place else None, names[place + 1] if place + 1 < len(names) else None

    def published(self, place: str) -> Document:
        """Collection whose files have absolute addresses below `place`; its links lead to itself as published."""
        name = str(self.collection["id"])
        return {
            **self.collection,
            "assets": _placed(self.collection.get("assets", {}), f"{place}/{name}"),
            "links": [{"rel": "canonical", "href": f"{place}/{collection_path(name)}", "type": "application/json"}],
        }


@dataclass(frozen=True)
class Snapshot:
    """All products as they were at one time."""

    products: Mapping[str, Product]

    @cached_property
    def name(self) -> str:
        """Digest of the state, the same wherever the state is the same."""
        state = "\n".join(f"{name} {product.tag}" for name, product in sorted(self.products.items()))
        return hashlib.sha256(state.encode()).hexdigest()[:12]

    @cached_property
    def rows(self) -> pa.Table | None:
        """Rows of all products in order of publication."""
        tables = [p.rows for p in self.products.values() if p.rows is not None]
        return joined(tables).sort_by("created") if tables else None

    def search(self, query: Query, products: Sequence[str] = ()) -> tuple[list[Document], int]:
        """Find items.

        Args:
            query: what to look for.
            products: where; without them everywhere.

        Returns:
            The items of the page that was asked for, see `item_of`; and how many there are.

        Raises:
            ConfigurationError: the query is not understood.
        """
        one = self.products.get(products[0]) if len(products) == 1 else None
        table = one.rows if one else self.rows
        if table is None or (products and not set(products) & set(self.products)):
            return [], 0
        if products and one is None:
            table = _of(table, products)
        rows, total = select(table, query)
        return [item_of(row) for row in table.take(rows).to_pylist()], total

    def published(self, item: Mapping[str, Any], place: str) -> Document:
        """Item whose files have absolute addresses below `place`; its links lead to itself as published."""
        product, href = self.products[str(item["collection"])], str(item["href"]).removeprefix("./")
        own = f"{place}/{item['collection']}/{href}"
        said = as_withdrawn(dict(item), product.withdrawn.get(str(item["properties"]["version"])))
        return {
            **{k: v for k, v in said.items() if k != "href"},
            "assets": _placed(item["assets"], own.rpartition("/")[0]),
            "links": [{"rel": "canonical", "href": own, "type": "application/geo+json"}],
        }

    def export(self, folder: Path, place: str) -> int:
        """Write collections.ndjson and items.ndjson, as loaders of databases take them; returns how many items."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = [] if self.rows is None else self.rows.to_pylist()
        items = [self.published(item_of(row), place) for row in rows]
        collections = [product.published(place) for product in self.products.values()]
        (folder / "collections.ndjson").write_bytes(b"".join(map(encode, collections)))
        (folder / "items.ndjson").write_bytes(b"".join(map(encode, items)))
        return len(items)


def _placed(assets: Mapping[str, Any], folder: str) -> dict[str, Any]:
    return {k: {**a, "href": f"{folder}/{a['href'].removeprefix('./')}"} for k, a in assets.items()}


def place_of(address: str) -> str:
    """Absolute address of a catalogue's files."""
    return address.rstrip("/") if "://" in address else str(Path(address).absolute())


def _of(table: pa.Table, products: Sequence[str]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    return table.filter(pc.is_in(table["collection"], pa.array(list(products), pa.string())))


def item_of(row: Mapping[str, Any]) -> Document:
    """Make an item of a row of the index; its links are left to who serves it, `href` is its address in the product."""
    import shapely

    properties = {k: v for k, v in row.items() if k not in (*TOP, *OTHER) and v is not None}
    times = {t: stamp(row[t]) for t in TIMES if row.get(t) is not None}
    objects = {name: json.loads(properties[name]) for name in TEXTS if name in properties}
    west, south, east, north = (row["bbox"][k] for k in ("xmin", "ymin", "xmax", "ymax"))
    return {
        **{k: bare(row[k]) for k in TOP},
        "geometry": shapely.geometry.mapping(shapely.from_wkb(row["geometry"])),
        "bbox": [west, south, east, north],
        "properties": {"datetime": None, **bare(properties), **times, **objects},
        "href": row["href"],
    }


@dataclass
class Loaded:
    """A catalogue in memory that follows the one at its destination.

    Attributes:
        documents: where the catalogue is.
        every_s: seconds after which a request looks for changes.
        failure: why the last change could not be read; None where it could.
    """

    documents: Documents
    every_s: float = 5.0
    failure: str | None = field(default=None, init=False)
    _recent: list[Snapshot] = field(default_factory=list, init=False)
    _checked: float = field(default=0.0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def current(self) -> Snapshot:
        """The catalogue as it is, or was at most `every_s` ago; while one request reads it again, others get the last.

        Raises:
            StoreError: nothing could be read yet.
        """
        due = time.monotonic() - self._checked >= self.every_s
        if (due or not self._recent) and self._lock.acquire(blocking=not self._recent):
            try:
                self._follow()
            finally:
                self._lock.release()
        if not self._recent:
            raise StoreError(self.failure or "Nothing is read yet.")
        return self._recent[-1]

    def of(self, name: str | None) -> Snapshot:
        """The snapshot of a name, so that pages follow each other; the current one where it is forgotten."""
        found = [s for s in self._recent if s.name == name]
        return found[-1] if found else self.current()

    def _follow(self) -> None:
        flaws: list[str] = []
        read = None
        try:
            read = self._read(self._recent[-1].products if self._recent else {}, flaws)
        except StsrError as e:
            flaws = [str(e)]
        finally:
            self._checked = time.monotonic()
        failure = " ".join(flaws) or None
        if failure not in (None, self.failure):
            _log.error("The catalogue cannot be read again; what was good is served on. %s", failure)
        self.failure = failure
        if read is not None and (not self._recent or read.name != self._recent[-1].name):
            self._recent = [*self._recent, read][-KEPT:]

    def _read(self, before: Mapping[str, Product], flaws: list[str]) -> Snapshot:
        """Read what changed; of a damaged product, noted among the flaws, what was good of it stays."""
        products = {}
        for name in product_names(self.documents):
            try:
                product = self._product(name, before.get(name))
            except (StoreError, DamagedError) as e:
                flaws.append(str(e))
                product = before.get(name)
            if product is not None:
                products[name] = product
        return Snapshot(products)

    def _product(self, name: str, before: Product | None) -> Product | None:
        """A product; again where a publisher replaced the index meanwhile and a reconcile removed the old one."""
        tried = None
        while (found := self.documents.read(collection_path(name))) is not None:
            collection, tag = found
            if before is not None and before.tag == tag:
                return before
            try:
                rows = read_index(self.documents, name, collection)
                _require_own(name, collection, rows)
            except StoreError:
                if tag == tried:
                    raise
                tried = tag
                continue
            return Product(tag, collection, rows)
        return None


def _require_own(name: str, collection: Document, rows: pa.Table | None) -> None:
    """Refuse a collection or an index that says what no publisher of this catalogue would."""
    there = {f"./{href}" for href in listed(collection).values()}
    indexed = [] if rows is None else rows["href"].to_pylist()
    if collection.get("id") != name or len(indexed) != len(there) or set(indexed) != there:
        raise StoreError(f"Collection {name} and its index name different items. Restore them from a backup.")
    for asset in [] if rows is None else rows["assets"].combine_chunks().flatten():
        hrefs = {h for h in asset.field("href").to_pylist() if h is not None}
        if bad := [h for h in sorted(hrefs) if not inside(h)]:
            raise StoreError(f"An item of {name} names {bad[0]!r}, outside its version. It is forged; do not trust it.")
