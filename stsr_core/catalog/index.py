"""The index of a product's versions: two stac-geoparquet files that its collection names, so search needs no database.

`index-recent` is written with every version and holds at most RECENT rows; when it is full its rows move to `index`.
So a publisher writes little however many versions there are. Both are written under fresh names, and become the index
in the compare-and-swap of the collection that publishes the version.
"""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import reduce
from typing import TYPE_CHECKING, Any

from stsr_core.catalog.addresses import checksum, inside
from stsr_core.catalog.query import interval, mask, parse, period, properties, touching
from stsr_core.errors import ConfigurationError, StoreError

if TYPE_CHECKING:
    import pyarrow as pa

    from stsr_core.catalog.documents import Document, Documents

PARQUET = "application/vnd.apache.parquet"
KEYS = ("index", "index-recent")  # assets of the collection
RECENT = 256  # rows of the file that every publication writes
TIMES = ("datetime", "start_datetime", "end_datetime", "created", "updated")
ALWAYS = ("id", "version", "bbox", *TIMES)  # columns that every search reads
TEXTS = ("stsr:configuration",)  # kept as JSON: `select` may hold a number here and a list there, no column both
MAX_LIMIT = 10_000


def _row(item: Mapping[str, Any], href: str) -> dict[str, Any]:
    """One row: an item with its properties at the top, times as times, the footprint as WKB, the recipe as JSON."""
    import shapely

    own = {k: _filled(v) for k, v in item.items() if k not in ("properties", "geometry", "bbox", "links")}
    times = {t: datetime.fromisoformat(v) if (v := item["properties"].get(t)) else None for t in TIMES}
    texts = {name: json.dumps(item["properties"][name]) for name in TEXTS if name in item["properties"]}
    west, south, east, north = item["bbox"]
    link = {"rel": "self", "href": f"../{href.removeprefix('./')}", "type": "application/geo+json"}
    return {
        **own,
        **_filled(item["properties"]),
        **times,
        **texts,
        "geometry": shapely.to_wkb(shapely.from_geojson(json.dumps(item["geometry"]))),
        "bbox": {"xmin": west, "ymin": south, "xmax": east, "ymax": north},
        "links": [link],
        "href": href,
    }


def _filled(value: Any) -> Any:
    """Value without empty objects, which parquet cannot hold."""
    if not isinstance(value, dict):
        return value
    return {k: None if v == {} else _filled(v) for k, v in value.items()}


def bare(value: Any) -> Any:
    """Value without what the rows of other items put into it."""
    if isinstance(value, dict):
        return {k: bare(v) for k, v in value.items() if v is not None}
    return [bare(v) for v in value] if isinstance(value, list) else value


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    import pyarrow as pa

    table = pa.Table.from_pylist(list(rows))
    for name in TIMES:
        place = table.column_names.index(name)
        table = table.set_column(place, name, table[name].cast(pa.timestamp("us", "UTC")))
    geo = {
        "version": "1.1.0",
        "primary_column": "geometry",
        "columns": {"geometry": {"encoding": "WKB", "geometry_types": ["Polygon", "MultiPolygon"]}},
    }
    return table.replace_schema_metadata({"geo": json.dumps(geo), "stac-geoparquet": json.dumps({"version": "1.1.0"})})


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """Join tables of rows whose columns may differ; at least one is there."""
    import pyarrow as pa

    metadata = tables[-1].schema.metadata  # of the newest, which knows all that rows may hold
    return pa.concat_tables(tables, promote_options="permissive").replace_schema_metadata(metadata)


def _encoded(table: pa.Table) -> bytes:
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=4096)
    return buffer.getvalue()


def _read(
    documents: Documents, product: str, asset: Mapping[str, Any], columns: Iterable[str] | None = None
) -> pa.Table:
    """Rows of an index file; of all columns without a choice.

    Raises:
        StoreError: the file is missing, outside the product, or not the one that was published.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    href = str(asset["href"])
    if not inside(href) or not href.startswith("./index/"):
        raise StoreError(
            f"The collection of {product} names an index at {asset['href']!r}, outside it. Do not trust it."
        )
    path = f"{product}/{href.removeprefix('./')}"
    found = documents.fetch(path)
    if found is None or checksum(found[0]) != asset.get("file:checksum"):
        raise StoreError(f"Index {path} is missing or not as published. Restore it from a backup.")
    source = pq.ParquetFile(pa.BufferReader(found[0]))
    wanted = None if columns is None else [c for c in columns if c in source.schema_arrow.names]
    return _with_texts(source.read(columns=wanted))


def _with_texts(table: pa.Table) -> pa.Table:
    """Table whose TEXTS are JSON also where an earlier state of this code wrote them as objects."""
    import pyarrow as pa

    for name in TEXTS:
        if name in table.column_names and pa.types.is_struct(table.schema.field(name).type):
            texts = [None if value is None else json.dumps(bare(value)) for value in table[name].to_pylist()]
            table = table.set_column(table.column_names.index(name), name, pa.array(texts, pa.string()))
    return table


def with_row(documents: Documents, product: str, collection: Document, item: Document, href: str) -> dict[str, Any]:
    """Write the index that has one more row, under fresh names.

    Returns:
        Assets of the collection that name it.
    """
    assets = dict(collection.get("assets", {}))

    def there(key: str) -> list[pa.Table]:
        return [_read(documents, product, assets[key])] if key in assets else []

    recent = joined([*there(KEYS[1]), _table([_row(item, href)])])
    if recent.num_rows > RECENT:
        full = joined([*there(KEYS[0]), recent.slice(0, RECENT)])
        assets[KEYS[0]] = _written(documents, product, full, "Index of all versions but the newest")
        recent = recent.slice(RECENT)
    assets[KEYS[1]] = _written(documents, product, recent, "Index of the newest versions")
    return assets


def without_rows(documents: Documents, product: str, collection: Document, versions: Sequence[str]) -> dict[str, Any]:
    """Write the index that lacks some versions, under fresh names.

    Returns:
        Assets of the collection that name it.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    assets = dict(collection.get("assets", {}))
    for key in (k for k in KEYS if k in assets):
        table = _read(documents, product, assets[key])
        kept = table.filter(pc.invert(pc.is_in(table["version"], pa.array(list(versions), pa.string()))))
        if kept.num_rows < table.num_rows:
            assets[key] = _written(documents, product, kept, assets[key]["title"])
    return assets


def with_values(
    documents: Documents, product: str, collection: Document, version: str, values: Mapping[str, bool | str | None]
) -> dict[str, Any]:
    """Write the index in which some properties of one version have other values, under fresh names.

    Returns:
        Assets of the collection that name it.
    """
    import pyarrow.compute as pc

    assets = dict(collection.get("assets", {}))
    for key in (k for k in KEYS if k in assets):
        table = _read(documents, product, assets[key])
        mine = pc.equal(table["version"], version)
        if pc.any(mine).as_py():
            assets[key] = _written(documents, product, _with_columns(table, mine, values), assets[key]["title"])
    return assets


def _with_columns(table: pa.Table, rows: Any, values: Mapping[str, bool | str | None]) -> pa.Table:
    """Table with other values in some rows; columns that it lacks are empty elsewhere."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for name, value in values.items():
        kind = pa.bool_() if isinstance(value, bool) else pa.string()
        old = table[name].cast(kind) if name in table.column_names else pa.nulls(table.num_rows, kind)
        new = pc.if_else(rows, pa.scalar(value, kind), old)
        place = table.column_names.index(name) if name in table.column_names else None
        table = table.append_column(name, new) if place is None else table.set_column(place, name, new)
    return table


def _written(documents: Documents, product: str, table: pa.Table, title: str) -> dict[str, Any]:
    raw = _encoded(table)
    path = f"index/{uuid.uuid4().hex[:12]}.parquet"
    documents.write(f"{product}/{path}", raw)
    return {
        "href": f"./{path}", "type": PARQUET, "title": title, "roles": ["index", "stac-items"],
        "file:checksum": checksum(raw), "file:size": len(raw), "stsr:rows": table.num_rows,
    }  # fmt: skip


def created(documents: Documents, product: str, collection: Document) -> dict[str, datetime]:
    """When each version that the index holds was made, oldest first.

    Raises:
        StoreError: the index is damaged.
    """
    table = read_index(documents, product, collection, ("created", "version"))
    rows = [] if table is None else table.select(["version", "created"]).to_pylist()
    return {row["version"]: row["created"] for row in rows}


def named(collection: Mapping[str, Any]) -> set[str]:
    """Names of the index files that a collection names."""
    return {str(a["href"]).rsplit("/", 1)[-1] for k, a in collection.get("assets", {}).items() if k in KEYS}


@dataclass(frozen=True)
class Query:
    """What to look for.

    Attributes:
        bbox: west, south, east, north [degrees]; items whose box touches it.
        datetime: a time, a day, or START/END with `..` for an open end.
        filter: CQL2 as text, or as JSON object.
        sortby: properties, with `-` before those that descend; without it the newest version first.
        limit: most rows that are returned.
        offset: rows that are left out at the beginning.
        ids: ids of items; without them all.
        intersects: GeoJSON geometry; items whose footprint touches it.
    """

    bbox: tuple[float, float, float, float] | None = None
    datetime: str | None = None
    filter: str | Mapping[str, Any] | None = None
    sortby: tuple[str, ...] = ()
    limit: int = 10
    offset: int = 0
    ids: tuple[str, ...] = ()
    intersects: Mapping[str, Any] | None = None


def look_up(documents: Documents, collections: Mapping[str, Document], query: Query) -> dict[str, list[str]]:
    """Search the indexes of products; a property that only some of them have is null in the others.

    Args:
        documents: the catalogue.
        collections: of the products, by name.
        query: what to look for; its limit counts per product.

    Returns:
        The versions that were asked for, of each product that has an index.

    Raises:
        ConfigurationError: the query is not understood.
        StoreError: an index is damaged.
    """
    _require_served(query)
    needed = _needed(parse(query.filter) if query.filter else None, _order(query), query)
    read = {name: read_index(documents, name, collection, needed) for name, collection in collections.items()}
    tables = _alike({name: table for name, table in read.items() if table is not None})
    return {name: table["version"].take(select(table, query)[0]).to_pylist() for name, table in tables.items()}


def _alike(tables: Mapping[str, pa.Table]) -> dict[str, pa.Table]:
    """Tables that all have the columns that any of them has."""
    import pyarrow as pa

    kinds = {field.name: field.type for table in tables.values() for field in table.schema}
    found = dict(tables)
    for name, column in [(n, c) for n, t in tables.items() for c in kinds.keys() - set(t.column_names)]:
        found[name] = found[name].append_column(column, pa.nulls(found[name].num_rows, kinds[column]))
    return found


def select(table: pa.Table, query: Query) -> tuple[pa.Array, int]:
    """Find rows of an index.

    Args:
        table: rows in order of publication.
        query: what to look for.

    Returns:
        Numbers of the rows of the page that was asked for, in order, equal ones newest first; and how many there are
        in all.

    Raises:
        ConfigurationError: the query is not understood.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    _require_served(query)
    expression = parse(query.filter) if query.filter else None
    order = _order(query)
    if unknown := [name for name, _ in order if name not in table.column_names]:
        raise ConfigurationError(f"Items have no property {unknown[0]!r} to sort by. `stsr catalog show` lists those.")
    if nested := [n for n, _ in order if n in TEXTS or pa.types.is_nested(table.schema.field(n).type)]:
        raise ConfigurationError(f"Property {nested[0]!r} is a list or an object, which has no order. Sort by another.")
    table = table.select([c for c in _needed(expression, order, query) if c in table.column_names])
    table = table.append_column("__row", pa.array(np.arange(table.num_rows)))
    parts = [_within(table, query.bbox), _during(table, query.datetime), _identified(table, query.ids)]
    parts += [touching(table, query.intersects)] if query.intersects is not None else []
    parts += [mask(table, expression)] if expression is not None else []
    kept = reduce(pc.and_, [p for p in parts if p is not None], pa.array(np.ones(table.num_rows, bool)))
    table = table.filter(kept)
    started = period(table)[0]  # a period is sorted by its start
    table = table.set_column(table.column_names.index("datetime"), "datetime", started)
    keys = [*order, ("__row", "descending")]
    found = pc.sort_indices(table, sort_keys=keys)[query.offset : query.offset + query.limit]
    return table["__row"].take(found).combine_chunks(), table.num_rows


def _require_served(query: Query) -> None:
    if not 1 <= query.limit <= MAX_LIMIT or query.offset < 0:
        raise ConfigurationError(
            f"Limit {query.limit} from {query.offset} is asked for; 1 to {MAX_LIMIT} from 0 is served."
        )


def _order(query: Query) -> list[tuple[str, str]]:
    """Columns to sort by, with their directions; each once, since a second time changes nothing."""
    order: dict[str, str] = {}
    for name in query.sortby:
        direction = "descending" if name.startswith("-") else "ascending"
        order.setdefault(name.lstrip("+-").removeprefix("properties."), direction)
    return list(order.items())


def _needed(expression: Mapping[str, Any] | None, order: list[tuple[str, str]], query: Query) -> list[str]:
    """Columns that a search reads."""
    shape = ("geometry",) if query.intersects is not None else ()
    return sorted({*ALWAYS, *shape, *properties(expression), *(name for name, _ in order)})


def _identified(table: pa.Table, ids: tuple[str, ...]) -> Any:
    """Rows with one of some ids; all where none is asked for."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.is_in(table["id"], pa.array(ids, pa.string())) if ids else None


def read_index(
    documents: Documents, product: str, collection: Document, columns: Iterable[str] | None = None
) -> pa.Table | None:
    """Rows of both files of an index, in order of publication; of all columns without a choice.

    Returns:
        The rows, None where the collection names no index.

    Raises:
        StoreError: the index is damaged.
    """
    assets = [collection["assets"][k] for k in KEYS if k in collection.get("assets", {})]  # in order of publication
    tables = [_read(documents, product, a, columns) for a in assets]
    return joined(tables) if tables else None


def _within(table: pa.Table, bbox: tuple[float, float, float, float] | None) -> Any:
    """Rows whose box touches a box; of either, one whose west is greater than its east crosses the antimeridian."""
    import pyarrow.compute as pc

    if bbox is None:
        return None
    west, south, east, north = bbox
    if not (-90 <= south <= north <= 90 and -180 <= west <= 180 and -180 <= east <= 180):
        raise ConfigurationError(f"Box {bbox} is no west,south,east,north in degrees. Example: 4,43,8,46")
    low, high, bottom, top = (pc.struct_field(table["bbox"], n) for n in ("xmin", "xmax", "ymin", "ymax"))
    reaches_east, reaches_west = pc.less_equal(low, east), pc.greater_equal(high, west)
    either, crossing = pc.or_(reaches_east, reaches_west), pc.greater(low, high)
    both = pc.and_(reaches_east, reaches_west)
    along = pc.if_else(crossing, either, both) if west <= east else pc.or_(either, crossing)
    return pc.and_(along, pc.and_(pc.less_equal(bottom, north), pc.greater_equal(top, south)))


def _during(table: pa.Table, text: str | None) -> Any:
    """Rows whose period touches a time or an interval."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if text is None:
        return None
    start, end = (pa.scalar(t, pa.timestamp("us", "UTC")) for t in interval(text))
    first, last = period(table)
    return pc.and_(pc.less_equal(first, end), pc.greater_equal(last, start))
