"""STAC items and collections: what the catalogue says of a version."""

from __future__ import annotations

from calendar import monthrange
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import cftime
import numpy as np
from pydantic import BaseModel, ConfigDict

from stsr_core.catalog.footprint import footprint
from stsr_core.configuration import Product, Source, Static, TargetGrid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stsr_core.grids import Grid
    from stsr_core.store.layout import StoreLayout

ZARR = "application/vnd.zarr"
_BASE = "https://stac-extensions.github.io"
VERSION = f"{_BASE}/version/v1.2.0/schema.json"
FILE = f"{_BASE}/file/v2.1.0/schema.json"
EXTENSIONS = [
    VERSION,
    f"{_BASE}/processing/v1.2.0/schema.json",
    f"{_BASE}/datacube/v2.3.0/schema.json",
    f"{_BASE}/projection/v2.0.0/schema.json",
    FILE,
    f"{_BASE}/zarr/v1.1.0/schema.json",
    f"{_BASE}/render/v2.0.0/schema.json",
]
MLM = f"{_BASE}/mlm/v1.5.2/schema.json"
ROOT = "../../../catalog.json"  # from an item
COLLECTION = "../../collection.json"


class Entries(BaseModel):
    """Entries of catalog.yaml that a version was made by; URLs without credentials."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    product: Product
    source: Source
    grid: TargetGrid
    statics: dict[str, Static] = {}

    @property
    def making(self) -> dict[str, Any]:
        """The part of them that determines the bytes of a version, together with the content of its source."""
        told = {"url", "description", "license", "attribution"}
        return {
            "product": self.product.model_dump(include={"members", "seed", "conserve"}),
            "source": self.source.model_dump(exclude=told),
            "grid": self.grid.model_dump(),
            "static": {name: static.model_dump(exclude=told) for name, static in self.statics.items()},
        }


class Provenance(BaseModel):
    """What a version was made from: enough to make it again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source_url: str
    source_fingerprint: str
    source_attribution: str
    source_license: str
    requested_factor: tuple[float, float]
    factor: tuple[int, int]
    spacing_km: int  # of the fine grid, as the networks were told it
    match_distance: float
    beta: float
    noise: dict[str, float]  # its correlation
    context_length: int
    conservation: dict[str, float | None]
    conserved: bool
    checkpoint: str
    checkpoint_digest: str
    network_evaluations: int
    code_version: str
    seed: int
    members: int
    driving_members: tuple[str, ...] = ()
    scores: dict[str, float]
    statics: dict[str, str] = {}  # fingerprints of the static fields
    configuration: Entries


@dataclass(frozen=True)
class Description:
    """What a product says of itself."""

    product: str
    title: str
    description: str
    license: str
    attribution: str
    keywords: tuple[str, ...]


@dataclass(frozen=True)
class SideFile:
    """A small file beside the data: address relative to the item, media type, checksum, size."""

    href: str
    media_type: str
    checksum: str
    size: int
    title: str
    roles: tuple[str, ...]


def period_of(layout: StoreLayout) -> list[str]:
    """Start and end of a version as STAC wants them.

    On days of other calendars that the standard one lacks, as 30 February, starts move back to the last day of the
    month and ends on to the next month, so that every period has a length.
    """
    bounds = layout.times.bounds
    return [_instant(bounds[0, 0], after=False), _instant(bounds[-1, 1], after=True)]


def _instant(value: Any, *, after: bool) -> str:
    if not isinstance(value, cftime.datetime):
        return f"{np.datetime_as_string(np.datetime64(value, 's'))}Z"
    last = monthrange(value.year, value.month)[1]
    if value.day > last and after:
        return stamp(datetime(value.year, value.month, last, tzinfo=UTC) + timedelta(days=1))
    day = min(value.day, last)
    return stamp(datetime(value.year, value.month, day, value.hour, value.minute, value.second, tzinfo=UTC))


def stamp(when: datetime) -> str:
    """Format a moment of UTC as STAC wants it."""
    return when.isoformat(timespec="seconds").replace("+00:00", "Z")


def _cube(layout: StoreLayout) -> dict[str, Any]:
    y, x = np.sort(layout.grid.y.edges), np.sort(layout.grid.x.edges)
    return {
        "cube:dimensions": {
            "member": {"type": "realization", "values": list(range(layout.members))},
            "time": {"type": "temporal", "extent": period_of(layout)},
            "y": {"type": "spatial", "axis": "y", "extent": [float(y[0]), float(y[-1])],
                  "step": abs(layout.grid.y.step), **_reference(layout.grid)},
            "x": {"type": "spatial", "axis": "x", "extent": [float(x[0]), float(x[-1])],
                  "step": abs(layout.grid.x.step), **_reference(layout.grid)},
        },
        "cube:variables": {
            "precipitation": {"dimensions": ["member", "time", "y", "x"], "type": "data", "unit": "mm",
                              "description": "precipitation amount per step"},
        },
    }  # fmt: skip


def _epsg(grid: Grid) -> int | None:
    from pyproj import CRS

    return CRS.from_wkt(grid.crs_wkt).to_epsg() if grid.crs_wkt else None


def _reference(grid: Grid) -> dict[str, Any]:
    code = _epsg(grid)
    return {"reference_system": code} if code else {}


def _projection(grid: Grid) -> dict[str, Any]:
    x, y = grid.x, grid.y
    code = _epsg(grid)
    return {
        "proj:code": f"EPSG:{code}" if code else None,
        **({} if code or grid.crs_wkt is None else {"proj:wkt2": grid.crs_wkt}),
        "proj:shape": list(grid.shape),
        "proj:transform": [x.step, 0.0, float(x.edges[0]), 0.0, y.step, float(y.edges[0])],
        "proj:bbox": [float(min(x.edges)), float(min(y.edges)), float(max(x.edges)), float(max(y.edges))],
    }


@dataclass(frozen=True)
class Lineage:
    """Where an item stands among others; addresses relative to it, None where there is none."""

    version: str
    predecessor: str | None
    checkpoint: str


def zarr_asset(group: str, title: str, role: str) -> dict[str, Any]:
    """Asset of a group of the version's store."""
    return {
        "href": f"./data.zarr/{group}", "type": ZARR, "title": title, "roles": [role],
        "zarr:consolidated": True, "zarr:node_type": "group", "zarr:zarr_format": 3,
    }  # fmt: skip


def _assets(side_files: Mapping[str, SideFile]) -> dict[str, Any]:
    stores = {
        "ensemble": zarr_asset("ensemble", "All members", "data"),
        "series": zarr_asset("series", "All members, laid out for time series at a point", "data"),
        "overview": zarr_asset("overview", "Mean, quantiles and exceedance probabilities over members", "overview"),
        "coarse": zarr_asset("coarse", "Coarse totals that every member conserves", "source"),
    }
    small = {
        key: {
            "href": side.href, "type": side.media_type, "title": side.title, "roles": list(side.roles),
            "file:checksum": side.checksum, "file:size": side.size,
        }
        for key, side in side_files.items()
    }  # fmt: skip
    return {**stores, **small}


def _links(provenance: Provenance, lineage: Lineage) -> list[dict[str, str]]:
    source = {"rel": "derived_from", "href": provenance.source_url, "title": provenance.source_attribution}
    links = [
        {"rel": "root", "href": ROOT, "type": "application/json"},
        {"rel": "parent", "href": COLLECTION, "type": "application/json"},
        {"rel": "collection", "href": COLLECTION, "type": "application/json"},
        *([source] if "://" in provenance.source_url else []),  # paths are relative to catalog.yaml, not to the item
        {"rel": "derived_from", "href": lineage.checkpoint, "type": "application/geo+json",
         "title": f"Checkpoint {provenance.checkpoint}"},
    ]  # fmt: skip
    if lineage.predecessor is not None:
        links.append({"rel": "predecessor-version", "href": lineage.predecessor, "type": "application/geo+json"})
    return links


def item(
    description: Description,
    lineage: Lineage,
    layout: StoreLayout,
    provenance: Provenance,
    side_files: Mapping[str, SideFile],
    gates: list[dict[str, Any]],
    published: datetime,
) -> dict[str, Any]:
    """Make the STAC item of a version.

    Args:
        description: the product.
        lineage: v1, v2, ... and what it follows.
        layout: axes of the ensemble.
        provenance: what it was made from.
        side_files: assets besides the stores, by key.
        gates: gate results.
        published: now.
    """
    bbox, geometry = footprint(layout.grid)
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": EXTENSIONS,
        "id": f"{description.product}-{lineage.version}",
        "collection": description.product,
        "bbox": bbox,
        "geometry": geometry,
        "properties": _properties(description, lineage.version, layout, provenance, gates, published),
        "links": _links(provenance, lineage),
        "assets": _assets(side_files),
    }


def _properties(
    description: Description,
    version: str,
    layout: StoreLayout,
    provenance: Provenance,
    gates: list[dict[str, Any]],
    published: datetime,
) -> dict[str, Any]:
    start, end = period_of(layout)
    now = stamp(published)
    return {
        "title": f"{description.title}, {version}",
        "description": description.description,
        "datetime": None,
        "start_datetime": start,
        "end_datetime": end,
        "created": now,
        "updated": now,
        "license": description.license,
        "providers": [{"name": provenance.source_attribution, "roles": ["producer", "licensor"]}],
        "version": version,
        "deprecated": False,
        "processing:level": "L4",
        "processing:software": {"stsr": provenance.code_version},
        "processing:lineage": (
            f"Downscaled by factor ({provenance.factor[0]},{provenance.factor[1]}): conditional mean and residual "
            f"diffusion, checkpoint {provenance.checkpoint}, seed {provenance.seed}."
        ),
        "renders": {
            "total": {
                "title": "Ensemble mean, total of the period", "assets": ["map"], "bidx": [1],
                "rescale": [[0.0, 100.0]], "colormap_name": "turbo",
            },
        },
        **_cube(layout),
        **_projection(layout.grid),
        **{f"stsr:{k}": v for k, v in provenance.model_dump(mode="json").items()},
        "stsr:gates": gates,
    }  # fmt: skip


def collection(description: Description, bbox: list[float], interval: list[str]) -> dict[str, Any]:
    """Make the collection of a product without versions yet."""
    return {
        "type": "Collection",
        "stac_version": "1.1.0",
        "stac_extensions": [VERSION, FILE],
        "id": description.product,
        **told(description),
        "extent": {"spatial": {"bbox": [bbox]}, "temporal": {"interval": [interval]}},
        "links": [
            {"rel": "root", "href": "../catalog.json", "type": "application/json"},
            {"rel": "parent", "href": "../catalog.json", "type": "application/json"},
        ],
    }


def told(description: Description) -> dict[str, Any]:
    """What a collection says of its product, in the words of the newest version."""
    return {
        "title": description.title,
        "description": description.description,
        "license": description.license,
        "keywords": list(description.keywords),
        "providers": [{"name": description.attribution, "roles": ["producer", "licensor"]}],
    }


def root_catalog() -> dict[str, Any]:
    """Make the catalogue's root without products yet."""
    return {
        "type": "Catalog",
        "stac_version": "1.1.0",
        "id": "stsr",
        "title": "Downscaled climate projections",
        "description": "Versioned high-resolution precipitation ensembles published by stsr.",
        "links": [{"rel": "root", "href": "./catalog.json", "type": "application/json"}],
    }
