"""The STAC API over a catalogue in memory: read-only, without a database; `stsr catalog serve`.

Routes, parameters and conformance classes are stac-fastapi's; what is found comes from `snapshot.py`. Requests name
only what is in memory, so none of them reaches the store.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

import attr
import orjson
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from stac_fastapi.api.app import StacApi
from stac_fastapi.api.models import ItemCollectionUri, create_get_request_model, create_post_request_model
from stac_fastapi.extensions.fields import FieldsExtension
from stac_fastapi.extensions.filter import FilterExtension
from stac_fastapi.extensions.filter.client import BaseFiltersClient
from stac_fastapi.extensions.filter.filter import FilterConformanceClasses as Cql2
from stac_fastapi.extensions.pagination import TokenPaginationExtension
from stac_fastapi.extensions.sort import SortConformanceClasses, SortExtension
from stac_fastapi.types.config import ApiSettings
from stac_fastapi.types.core import BaseCoreClient
from stac_fastapi.types.errors import NotFoundError
from stac_fastapi.types.requests import get_base_url
from starlette.requests import ClientDisconnect

from stsr_core.catalog.index import Query
from stsr_core.catalog.metrics import add_metrics
from stsr_core.catalog.snapshot import OTHER, TOP, Loaded, Product, Snapshot, place_of
from stsr_core.errors import ConfigurationError, StoreError

GEOJSON = "application/geo+json"
MAX_ITEMS = 1000  # items of a page; more are asked for in pages
MAX_BODY = 1_000_000  # bytes of a request
MAX_IDS = 1000
MAX_FIELDS = 200
DEFAULT_FIELDS = (  # by the fields extension: for those who include nothing in so many words
    "type", "stac_version", "id", "collection", "geometry", "bbox", "links", "assets", "properties.datetime",
)  # fmt: skip
FILTERS = [
    Cql2.FILTER, Cql2.SEARCH, Cql2.ITEMS, Cql2.BASIC_CQL2, Cql2.CQL2_JSON, Cql2.CQL2_TEXT,
    Cql2.ADVANCED_COMPARISON_OPERATORS, Cql2.BASIC_SPATIAL_FUNCTIONS, Cql2.ARITHMETIC,
    Cql2.CASE_INSENSITIVE_COMPARISON,
]  # fmt: skip
SORTS = [
    SortConformanceClasses.ITEM_SEARCH_SORT, SortConformanceClasses.FEATURES_SORT,
    "https://api.stacspec.org/v1.0.0/item-search#sort",  # clients of today ask for this one
]  # fmt: skip
_log = logging.getLogger(__name__)


def make_app(loaded: Loaded, public: str | None = None) -> FastAPI:
    """Make the application that serves a catalogue.

    Args:
        loaded: the catalogue.
        public: address of the catalogue's files for readers; without it the one that they are read from here.
    """
    place = place_of(public or loaded.documents.destination)
    extensions = [
        FilterExtension(client=Queryables(loaded), conformance_classes=[str(c) for c in FILTERS]),
        SortExtension(conformance_classes=[str(c) for c in SORTS]),
        FieldsExtension(),
        TokenPaginationExtension(),
    ]
    api = StacApi(
        settings=ApiSettings(
            _env_file=None,
            stac_fastapi_title="stsr",
            stac_fastapi_description="Downscaled climate projections",
            stac_fastapi_version="1.0",
            stac_fastapi_landing_id="stsr",
        ),
        client=Client(loaded=loaded, place=place, landing_page_id="stsr"),
        extensions=extensions,
        stac_version="1.1.0",
        search_get_request_model=create_get_request_model(extensions),
        search_post_request_model=create_post_request_model(extensions),
        items_get_request_model=create_get_request_model(extensions, ItemCollectionUri),
        health_check=lambda: _health(loaded),
    )
    app: FastAPI = api.app
    app.middleware("http")(_bounded)
    add_metrics(app, loaded)
    app.add_exception_handler(ConfigurationError, _answer(400))
    app.add_exception_handler(NotFoundError, _answer(404))
    app.add_exception_handler(StoreError, _answer(503))
    return app


def _health(loaded: Loaded) -> dict[str, Any]:
    """UP while something is served; a change that could not be read is said."""
    snapshot = loaded.current()
    items = sum(p.rows.num_rows for p in snapshot.products.values() if p.rows is not None)
    return {"status": "UP", "items": items, "state": snapshot.name, "failure": loaded.failure}


def _answer(status: int) -> Callable[[Request, Exception], Response]:
    def answer(request: Request, error: Exception) -> Response:
        _log.warning("%s %s: %d, %s", request.method, request.url.path[:200], status, str(error)[:300])
        return JSONResponse({"code": type(error).__name__, "description": str(error)}, status)

    return answer


async def _bounded(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Refuse bodies that are no query: those too long, or of unknown length, and those that are no JSON object."""
    if request.method == "POST":
        length = request.headers.get("content-length", "")
        if not length.isdigit() or int(length) > MAX_BODY:
            said = f"A body of {length or 'unknown'} bytes is sent; at most {MAX_BODY} are served. Shorten the query."
            return JSONResponse({"code": "TooLong", "description": said}, 413)
        try:
            _object((await request.body()).decode(errors="replace"), "body")
        except ClientDisconnect:
            return Response(status_code=400)  # nobody hears it
        except ConfigurationError as e:
            return _answer(400)(request, e)
    return await call_next(request)


@attr.s(auto_attribs=True)
class Queryables(BaseFiltersClient):
    """What can be asked for in filters: the columns of the index."""

    loaded: Loaded

    def get_queryables(self, collection_id: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Queryables of a collection, or of all."""
        snapshot = self.loaded.current()
        rows = snapshot.rows if collection_id is None else _product(snapshot, collection_id).rows
        names = [] if rows is None else [f for f in rows.schema if f.name not in (*TOP, *OTHER)]
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "$id": str(kwargs["request"].url),
            "type": "object",
            "title": f"Queryables of {collection_id or 'all collections'}",
            "properties": {
                "id": {"type": "string"},
                "collection": {"type": "string"},
                "geometry": {"$ref": "https://geojson.org/schema/Geometry.json"},
                **{field.name: _kind(field) for field in names},
            },
            "additionalProperties": False,
        }


def _kind(field: Any) -> dict[str, str]:
    """JSON schema of the values of a column."""
    import pyarrow as pa

    if pa.types.is_timestamp(field.type):
        return {"type": "string", "format": "date-time"}
    kinds = {"boolean": pa.types.is_boolean, "integer": pa.types.is_integer, "number": pa.types.is_floating,
             "string": pa.types.is_string, "array": pa.types.is_list, "object": pa.types.is_struct}  # fmt: skip
    return {"type": next((name for name, is_it in kinds.items() if is_it(field.type)), "null")}


@attr.s(auto_attribs=True, kw_only=True)
class Client(BaseCoreClient):
    """What stac-fastapi asks for, answered from memory.

    Attributes:
        loaded: the catalogue.
        place: address of its files for readers.
    """

    loaded: Loaded
    place: str

    def all_collections(self, **kwargs: Any) -> Any:
        """All products."""
        base = get_base_url(kwargs["request"])
        products = self.loaded.current().products
        links = [_link("self", f"{base}collections"), _link("root", base), _link("parent", base)]
        return {"collections": [_collection(p, base, self.place) for p in products.values()], "links": links}

    def get_collection(self, collection_id: str, **kwargs: Any) -> Any:
        """One product."""
        product = _product(self.loaded.current(), collection_id)
        return _collection(product, get_base_url(kwargs["request"]), self.place)

    def get_item(self, item_id: str, collection_id: str, **kwargs: Any) -> Any:
        """One version."""
        snapshot = self.loaded.current()
        _product(snapshot, collection_id)
        found, _ = snapshot.search(Query(ids=(item_id,), limit=1), [collection_id])
        if not found:
            raise NotFoundError(f"Collection {collection_id} has no item {item_id}.")
        return self._served(found[0], snapshot, get_base_url(kwargs["request"]))

    def item_collection(self, collection_id: str, *args: Any, **kwargs: Any) -> Any:
        """Versions of one product."""
        _product(self.loaded.current(), collection_id)
        return self._get(f"collections/{collection_id}/items", kwargs, [collection_id])

    def get_search(self, *args: Any, **kwargs: Any) -> Any:
        """Search by GET."""
        return self._get("search", kwargs, kwargs.get("collections") or [])

    def _get(self, path: str, asked: dict[str, Any], collections: Sequence[str]) -> Any:
        request: Request = asked["request"]
        base = get_base_url(request)
        text, shape = asked.get("filter_expr"), asked.get("intersects")
        wanted = {
            **asked,
            "filter_expr": _object(text, "filter") if text and asked.get("filter_lang") == "cql2-json" else text,
            "intersects": _object(shape, "intersects") if shape else None,
        }
        fields = [f for f in asked.get("fields") or () if f]
        chosen = [f.lstrip("+ ") for f in fields if f[0] != "-"], [f[1:] for f in fields if f[0] == "-"]
        parameters = [(k, v) for k, v in request.query_params.multi_items() if k != "token"]

        def following(token: str) -> dict[str, Any]:
            return _link("next", f"{base}{path}?{urlencode([*parameters, ('token', token)])}", GEOJSON)

        return self._page(base, path, wanted, collections, chosen, following)

    def post_search(self, search_request: Any, **kwargs: Any) -> Any:
        """Search by POST."""
        asked = search_request.model_dump(mode="json", exclude_unset=True)
        base = get_base_url(kwargs["request"])
        order = [f"{'-' if s['direction'] == 'desc' else ''}{s['field']}" for s in asked.get("sortby") or ()]
        fields = asked.get("fields", {})
        if fields is None:
            raise ConfigurationError("Member fields is null. Give an object with include or exclude, or leave it out.")
        include, exclude = list(fields.get("include") or ()), list(fields.get("exclude") or ())
        if "include" in fields and not include:
            include = [name for name in DEFAULT_FIELDS if name not in exclude]
        chosen = include, exclude

        def following(token: str) -> dict[str, Any]:
            body = {"method": "POST", "body": {"token": token}, "merge": True}
            return {**_link("next", f"{base}search", GEOJSON), **body}

        return self._page(base, "search", {**asked, "sortby": order}, asked.get("collections") or [], chosen, following)

    def _page(
        self,
        base: str,
        path: str,
        asked: Mapping[str, Any],
        collections: Sequence[str],
        fields: tuple[Sequence[str], Sequence[str]],
        following: Callable[[str], dict[str, Any]],
    ) -> dict[str, Any]:
        """One page; the token of the next one names the snapshot, so that no publication shifts the pages."""
        if sum(map(len, fields)) > MAX_FIELDS:
            raise ConfigurationError(f"{sum(map(len, fields))} fields are named; at most {MAX_FIELDS} are served.")
        name, offset = _position(asked.get("token"))
        snapshot = self.loaded.of(name)
        found, total = snapshot.search(_query(asked, offset), collections)
        links = [_link("root", base), _link("self", f"{base}{path}", GEOJSON)]
        if found and offset + len(found) < total:
            links.append(following(f"{snapshot.name}.{offset + len(found)}"))
        features = [pick(self._served(item, snapshot, base), *fields) for item in found]
        return {
            "type": "FeatureCollection", "features": features, "links": links, "numberMatched": total,
            "numberReturned": len(features),
        }  # fmt: skip

    def _served(self, item: Mapping[str, Any], snapshot: Snapshot, base: str) -> dict[str, Any]:
        """Item with the links of this server and absolute addresses of its files."""
        product, version = str(item["collection"]), str(item["properties"]["version"])
        found = snapshot.published(item, self.place)
        own = f"{base}collections/{product}"
        predecessor, successor = snapshot.products[product].neighbours(version)
        neighbours = {"predecessor-version": predecessor, "successor-version": successor}
        links = [
            _link("self", f"{own}/items/{item['id']}", GEOJSON), _link("parent", own), _link("collection", own),
            _link("root", base),
            *(_link(rel, f"{own}/items/{product}-{v}", GEOJSON) for rel, v in neighbours.items() if v),
        ]  # fmt: skip
        return {**found, "links": [*links, *found["links"]]}


def _product(snapshot: Snapshot, name: str) -> Product:
    found = snapshot.products.get(name)
    if found is None:
        raise NotFoundError(f"There is no collection {name[:80]!r}.")
    return found


def _collection(product: Product, base: str, place: str) -> dict[str, Any]:
    """Collection with the links of this server; its items are asked for, not listed."""
    document = product.published(place)
    name = str(document["id"])
    own = f"{base}collections/{name}"
    links = [
        _link("self", own), _link("parent", base), _link("root", base), _link("items", f"{own}/items", GEOJSON),
        _link("http://www.opengis.net/def/rel/ogc/1.0/queryables", f"{own}/queryables", "application/schema+json"),
    ]  # fmt: skip
    if "version" in document:
        links.append(_link("latest-version", f"{own}/items/{name}-{document['version']}", GEOJSON))
    return {**document, "links": [*links, *document["links"]]}


def _link(rel: str, href: str, media_type: str = "application/json") -> dict[str, Any]:
    return {"rel": rel, "href": href, "type": media_type}


def _object(text: str, name: str) -> dict[str, Any]:
    try:
        found = orjson.loads(text)  # unlike json it refuses infinite numbers, which no answer could repeat
    except ValueError as e:
        raise ConfigurationError(f"The {name} is no JSON ({str(e)[:80]}).") from e
    if not isinstance(found, dict):
        raise ConfigurationError(f"The {name} is JSON, but no object.")
    return found


def _position(token: str | None) -> tuple[str | None, int]:
    """Snapshot and offset that a token names."""
    if not token:
        return None, 0
    name, _, offset = token.partition(".")
    if not offset.isascii() or not offset.isdigit() or len(offset) > 9:
        raise ConfigurationError(f"Token {token[:80]!r} is none of this server. Follow the link `next` of a page.")
    return name, int(offset)


def _query(asked: Mapping[str, Any], offset: int) -> Query:
    """What the parameters of a request ask for."""
    bbox, ids, shape = asked.get("bbox"), tuple(asked.get("ids") or ()), asked.get("intersects")
    if bbox and shape is not None:
        raise ConfigurationError("Parameters bbox and intersects are both given; give one.")
    if len(ids) > MAX_IDS:
        raise ConfigurationError(f"{len(ids)} ids are asked for; at most {MAX_IDS} are served.")
    if bbox and len(bbox) == 6:  # heights are left out
        bbox = [bbox[0], bbox[1], bbox[3], bbox[4]]
    return Query(
        bbox=tuple(bbox) if bbox else None, datetime=asked.get("datetime") or None,
        filter=asked.get("filter_expr") or None, sortby=tuple(asked.get("sortby") or ()),
        limit=min(asked.get("limit") or 10, MAX_ITEMS), offset=offset, ids=ids, intersects=shape,
    )  # fmt: skip


def pick(item: Mapping[str, Any], include: Sequence[str], exclude: Sequence[str]) -> dict[str, Any]:
    """Fields of an item as the fields extension chooses them: those included, or all, without those excluded.

    Args:
        item: a STAC item.
        include: names, nested ones by dots.
        exclude: names to leave out; what is included by name, or has a part that is, stays.
    """
    kept = [path.split(".") for path in include]
    dropped = [path.split(".") for path in exclude]
    dropped = [path for path in dropped if not any(k[: len(path)] == path for k in kept)]
    return _without(_only(item, kept) if kept else item, dropped)


def _only(node: Mapping[str, Any], paths: Sequence[Sequence[str]]) -> dict[str, Any]:
    found = {}
    for key, value in node.items():
        below = [path[1:] for path in paths if path[0] == key]
        if below and isinstance(value, dict) and all(below):
            found[key] = _only(value, below)
        elif below:
            found[key] = value
    return found


def _without(node: Mapping[str, Any], paths: Sequence[Sequence[str]]) -> dict[str, Any]:
    found = {}
    for key, value in node.items():
        below = [path[1:] for path in paths if path[0] == key]
        if not all(below):
            continue
        found[key] = _without(value, below) if below and isinstance(value, dict) else value
    return found
