"""What an item of this catalogue must be: strict models that every item passes before it is published.

They ask for more than the published schemas do, which accept an item if one asset is right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from stsr_core.catalog.addresses import SHA256, inside
from stsr_core.catalog.items import EXTENSIONS, Entries
from stsr_core.configuration import PRODUCT_NAME
from stsr_core.errors import PublicationError


def _inside(href: str) -> str:
    if not inside(href):
        raise ValueError(f"{href!r} is outside the version; addresses begin with ./")
    return href


Inside = Annotated[str, AfterValidator(_inside)]
Instant = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=PRODUCT_NAME)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class ZarrAsset(_Strict):
    """A group of the version's store."""

    href: Inside
    type: Literal["application/vnd.zarr"]  # with a version behind it, xpystac does not know it
    title: str
    roles: list[str] = Field(min_length=1)
    consolidated: Literal[True] = Field(alias="zarr:consolidated")
    node_type: Literal["group"] = Field(alias="zarr:node_type")
    zarr_format: Literal[3] = Field(alias="zarr:zarr_format")


class FileAsset(_Strict):
    """A file beside the stores, with its digest."""

    href: Inside
    type: str
    title: str
    roles: list[str] = Field(min_length=1)
    checksum: str = Field(alias="file:checksum", pattern=f"^{SHA256}[0-9a-f]{{64}}$")
    size: int = Field(alias="file:size", gt=0)


class Assets(_Strict):
    """All assets of a version."""

    ensemble: ZarrAsset
    series: ZarrAsset
    overview: ZarrAsset
    coarse: ZarrAsset
    manifest: FileAsset
    quality: FileAsset
    map: FileAsset
    thumbnail: FileAsset
    quicklook: FileAsset


class Link(_Strict):
    """A link; those into the catalogue are relative."""

    rel: Literal["root", "parent", "collection", "derived_from", "predecessor-version"]
    href: str = Field(min_length=1)
    type: str | None = None
    title: str | None = None

    @model_validator(mode="after")
    def _relative(self) -> Self:
        if self.rel != "derived_from" and ("://" in self.href or self.href.startswith("/")):
            raise ValueError(f"link {self.rel} points out of the catalogue: {self.href}")
        return self


class Dimension(_Strict):
    """An axis of the ensemble."""

    type: Literal["realization", "temporal", "spatial"]
    values: list[int] | None = None
    axis: Literal["x", "y"] | None = None
    extent: list[Instant] | list[float] | None = None
    step: float | None = None
    reference_system: int | None = None


class Variable(_Strict):
    """A variable of the ensemble."""

    dimensions: list[str]
    type: Literal["data"]
    unit: str
    description: str


class Provider(_Strict):
    """Who made the source."""

    name: str = Field(min_length=1)
    roles: list[str]


class Render(_Strict):
    """How to draw an asset."""

    title: str
    assets: list[str]
    bidx: list[int]
    rescale: list[list[float]]
    colormap_name: str


class GateResult(_Strict):
    """A gate that was passed: nothing else is published."""

    name: str
    passed: Literal[True]
    found: str
    needed: str
    where: str


class Properties(_Strict):
    """All that is said of a version."""

    title: str
    description: str
    datetime: None
    start_datetime: Instant
    end_datetime: Instant
    created: Instant
    updated: Instant
    license: str = Field(min_length=1)
    providers: list[Provider] = Field(min_length=1)
    version: str = Field(pattern=r"^v[1-9]\d*$")
    deprecated: Literal[False]
    level: Literal["L4"] = Field(alias="processing:level")
    software: dict[str, str] = Field(alias="processing:software")
    lineage: str = Field(alias="processing:lineage")
    renders: dict[str, Render]
    dimensions: dict[Literal["member", "time", "y", "x"], Dimension] = Field(
        alias="cube:dimensions", min_length=4, max_length=4
    )
    variables: dict[Literal["precipitation"], Variable] = Field(alias="cube:variables", min_length=1)
    code: str | None = Field(alias="proj:code")
    wkt2: str | None = Field(default=None, alias="proj:wkt2")
    shape: list[int] = Field(alias="proj:shape", min_length=2, max_length=2)
    transform: list[float] = Field(alias="proj:transform", min_length=6, max_length=6)
    proj_bbox: list[float] = Field(alias="proj:bbox", min_length=4, max_length=4)
    source_url: str = Field(alias="stsr:source_url", min_length=1)
    source_fingerprint: str = Field(alias="stsr:source_fingerprint", min_length=1)
    source_attribution: str = Field(alias="stsr:source_attribution")
    source_license: str = Field(alias="stsr:source_license")
    requested_factor: tuple[float, float] = Field(alias="stsr:requested_factor")
    factor: tuple[int, int] = Field(alias="stsr:factor")
    spacing_km: int = Field(alias="stsr:spacing_km", ge=1)
    match_distance: float = Field(alias="stsr:match_distance", ge=0)
    beta: float = Field(alias="stsr:beta")
    noise: dict[str, float] = Field(alias="stsr:noise")
    context_length: int = Field(alias="stsr:context_length")
    conservation: dict[str, float | None] = Field(alias="stsr:conservation")
    conserved: bool = Field(alias="stsr:conserved")
    checkpoint: str = Field(alias="stsr:checkpoint")
    checkpoint_digest: Digest = Field(alias="stsr:checkpoint_digest")
    network_evaluations: int = Field(alias="stsr:network_evaluations")
    code_version: str = Field(alias="stsr:code_version")
    seed: int = Field(alias="stsr:seed")
    members: int = Field(alias="stsr:members", ge=1)
    driving_members: list[str] = Field(alias="stsr:driving_members")
    scores: dict[str, float] = Field(alias="stsr:scores")
    statics: dict[str, str] = Field(alias="stsr:statics")
    configuration: Entries = Field(alias="stsr:configuration")
    gates: list[GateResult] = Field(alias="stsr:gates", min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.start_datetime >= self.end_datetime:
            raise ValueError(f"the period ends at {self.end_datetime}, before it starts at {self.start_datetime}")
        values = self.dimensions["member"].values or []
        if len(values) != self.members:
            raise ValueError(f"{len(values)} members in the cube, {self.members} in the provenance")
        if self.configuration.source.url != self.source_url:
            raise ValueError(f"the source is {self.source_url}, by the configuration {self.configuration.source.url}")
        return self


def _closed(ring: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(ring) < 4 or ring[0] != ring[-1]:
        raise ValueError("the footprint is no closed ring")
    return ring


Ring = Annotated[list[tuple[float, float]], AfterValidator(_closed)]
Rings = Annotated[list[Ring], Field(min_length=1, max_length=1)]


class Polygon(_Strict):
    """The footprint."""

    type: Literal["Polygon"]
    coordinates: Rings


class MultiPolygon(_Strict):
    """The footprint of what crosses the antimeridian, cut there."""

    type: Literal["MultiPolygon"]
    coordinates: list[Rings] = Field(min_length=2)


class Item(_Strict):
    """A published version."""

    type: Literal["Feature"]
    stac_version: Literal["1.1.0"]
    stac_extensions: list[str]
    id: str
    collection: Name
    bbox: tuple[float, float, float, float]
    geometry: Annotated[Polygon | MultiPolygon, Field(discriminator="type")]
    properties: Properties
    links: list[Link]
    assets: Assets

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stac_extensions != EXTENSIONS:
            raise ValueError(f"extensions are {self.stac_extensions}, not those of this catalogue")
        if self.id != f"{self.collection}-{self.properties.version}":
            raise ValueError(f"id {self.id!r} is not that of {self.collection} {self.properties.version}")
        crosses = isinstance(self.geometry, MultiPolygon)  # then west may be greater than east
        if (self.bbox[0] > self.bbox[2] and not crosses) or self.bbox[1] > self.bbox[3]:
            raise ValueError(f"box {self.bbox} is empty")
        rels = [link.rel for link in self.links]
        if any(rels.count(rel) != 1 for rel in ("root", "parent", "collection")) or "derived_from" not in rels:
            raise ValueError(f"links are {rels}; root, parent, collection and derived_from are needed")
        return self


def validate(document: Mapping[str, Any]) -> None:
    """Validate an item by the models above and by the STAC core schemas, offline.

    Raises:
        PublicationError: it is not valid; the message names the first fields.
    """
    import pystac
    from pystac.validation import validate_dict

    name = str(document.get("id", "?"))
    try:
        Item.model_validate_json(json.dumps(document))
        validate_dict({**document, "stac_extensions": []}, stac_object_type=pystac.STACObjectType.ITEM)
    except ValidationError as e:
        first = "; ".join(f"{'.'.join(map(str, p['loc'])) or 'item'}: {p['msg']}" for p in e.errors()[:3])
        raise PublicationError(f"Item {name} is not valid: {first}. Nothing was published.") from e
    except pystac.errors.STACValidationError as e:
        raise PublicationError(f"Item {name} is no valid STAC item: {e}. Nothing was published.") from e
