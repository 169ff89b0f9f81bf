"""catalog.yaml: the sources, target grids, products and archives that an operator edits."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from stsr_core.errors import ConfigurationError
from stsr_core.grids import TimeLabel
from stsr_core.sources.declared import Accumulation, Declared, Label

PRODUCT_NAME = r"^[a-z0-9][a-z0-9_-]*$"  # a folder of the catalogue and part of ids, as STAC and every store take them
NAMES_TAKEN = {"all": "means every product", "checkpoints": "is the folder of checkpoints in the catalogue"}


def free_name(name: str) -> str:
    """Return the name of a product unless something else has it; raises ValueError."""
    if name in NAMES_TAKEN:
        raise ValueError(f"{name!r} {NAMES_TAKEN[name]}; name the product otherwise")
    return name


Entry = TypeVar("Entry")
FreeName = Annotated[str, Field(pattern=PRODUCT_NAME), AfterValidator(free_name)]


class _Loader(yaml.SafeLoader):
    """YAML without what surprises: dates stay text, also those that only other calendars have, and 1e20 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Read a mapping; raises YAMLError where a key is there twice, of which all but the last would be lost."""
        keys = [key.value for key, _ in node.value]
        if twice := sorted({key for key in keys if isinstance(key, str) and keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if not tag.endswith(":timestamp")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)  # JSON has neither


class Declarations(_Frozen):
    """What files do not say themselves, each as a line of catalog.yaml or of `--declare`."""

    units: str | None = Field(default=None, description="Units by the CF rules, where the file is silent or wrong.")
    crs: str | None = Field(
        default=None, description="EPSG code, PROJ string or WKT, where the file is silent or wrong."
    )
    time_label: TimeLabel | None = Field(
        default=None, description="Which point of its interval a time stamp names, where there are no time bounds."
    )
    step_h: float | None = Field(
        default=None, gt=0, description="Hours of a step; with time_label it replaces missing or broken time bounds."
    )
    accumulated: Accumulation | None = Field(
        default=None, description="run or day: amounts since the start of the run or since 00 h; none: per step."
    )
    missing_values: tuple[float, ...] = Field(
        default=(), strict=False, description="Values that mark missing cells and that the file does not name."
    )
    max_negative_mm: float | None = Field(
        default=None, ge=0, description="Negative amounts per step down to this become 0."
    )
    select: dict[str, Label | list[Label]] = Field(
        default={},
        description="Label (or number) along every dimension that is neither time nor space; several, or `all`, along "
        "that of the driving members.",
    )
    period: tuple[str, str] | None = Field(
        default=None,
        strict=False,
        description="Start and end, ISO dates (their midnight) or times; only whole steps between them are read.",
    )

    @property
    def declared(self) -> Declared:
        """What the files do not say themselves."""
        select = {dim: tuple(wanted) if isinstance(wanted, list) else wanted for dim, wanted in self.select.items()}
        return Declared(**{field.name: getattr(self, field.name) for field in fields(Declared)} | {"select": select})

    def over(self, declared: Declared) -> Declared:
        """What is declared here, else there."""
        return replace(declared, **{name: getattr(self.declared, name) for name in self.model_fields_set})

    @classmethod
    def of(cls, lines: Sequence[str]) -> Self:
        """Read declarations from lines as catalog.yaml has them, such as `units: mm/h`.

        Raises:
            ConfigurationError: a line that is no declaration.
        """
        try:
            found: dict[str, object] = {}
            for line in lines:
                read = yaml.load(line, _Loader)
                if not isinstance(read, dict):
                    raise ConfigurationError(f"{line!r} is no declaration. Write NAME: VALUE, as 'units: mm/h'.")
                if isinstance(before := found.get("select"), dict) and isinstance(more := read.get("select"), dict):
                    read = {**read, "select": before | more}
                elif other := [str(name) for name in read if name in found and read[name] != found[name]]:
                    raise ConfigurationError(f"{other[0]} is declared twice, and otherwise. Declare it once.")
                found |= read
            return cls.model_validate(found)
        except yaml.YAMLError as e:
            raise ConfigurationError(f"A declaration is no YAML ({e}). Write NAME: VALUE, as 'units: mm/h'.") from e
        except ValidationError as e:
            have = ", ".join(cls.model_fields)
            said = "; ".join(f"{'.'.join(map(str, x['loc']))}: {x['msg']}" for x in e.errors())
            raise ConfigurationError(f"What is declared cannot be used ({said}). There are {have}.") from e


class _Data(Declarations):
    """Data by what it is and whose, and what its files do not say themselves."""

    variable: str
    description: str
    license: str = Field(min_length=1, description="SPDX identifier or name of the licence.")
    attribution: str = Field(min_length=1)


class Source(_Data):
    """Coarse model output: where it is, and what the files do not say themselves."""

    url: str = Field(description="Path (relative to catalog.yaml), fsspec URL, or package:FILE for shipped files.")


class Archive(_Data):
    """Fine precipitation that networks learn from: where it is, and what the files do not say themselves."""

    train: tuple[str, ...] = Field(
        strict=False, min_length=1, description="Paths, globs or URLs to fit on; every file is a place of its own."
    )
    validation: tuple[str, ...] = Field(
        strict=False, min_length=1, description="Likewise, to watch the loss on; other places or years than `train`."
    )

    @model_validator(mode="after")
    def _apart(self) -> Self:
        both = sorted(set(self.train) & set(self.validation))
        if both:
            raise ValueError(f"{', '.join(both)} is named by train and by validation; keep them apart")
        return self


class Static(_Frozen):
    """A field that does not change in time, such as orography, for checkpoints that were trained with it."""

    url: str = Field(description="Path (relative to catalog.yaml), fsspec URL, or package:FILE for shipped files.")
    variable: str
    crs: str | None = Field(default=None, description="EPSG code, PROJ string or WKT, where the file is silent.")
    missing_values: tuple[float, ...] = Field(
        default=(), strict=False, description="Values that mark missing cells and that the file does not name."
    )
    description: str
    license: str = Field(description="SPDX identifier or name of the licence.")
    attribution: str


class TargetGrid(_Frozen):
    """A box of fine cells."""

    crs: str = Field(description="A projected CRS in metres, such as EPSG:2154.")
    spacing_m: float = Field(gt=0)
    x_min: float
    x_max: float
    y_min: float
    y_max: float
    fine_step_h: float = Field(default=1.0, gt=0)

    @field_validator("crs")
    @classmethod
    def _in_metres(cls, crs: str) -> str:
        from pyproj import CRS
        from pyproj.exceptions import CRSError

        try:
            found = CRS.from_user_input(crs)
        except CRSError as e:
            raise ValueError(f"{crs!r} is no CRS that is known; name a projected one in metres, as EPSG:2154") from e
        if not found.is_projected:
            raise ValueError(f"{crs!r} is not projected; name a projected CRS in metres, as EPSG:2154")
        units = sorted({axis.unit_name for axis in found.axis_info[:2]})
        if units != ["metre"]:
            raise ValueError(f"{crs!r} is in units of {' and '.join(units)}; name a CRS in metres, as EPSG:2154")
        return crs

    @model_validator(mode="after")
    def _whole_cells(self) -> Self:
        for low, high in ((self.x_min, self.x_max), (self.y_min, self.y_max)):
            cells = (high - low) / self.spacing_m
            if cells < 1 or abs(cells - round(cells)) > 1e-6:
                raise ValueError(f"{low:g} to {high:g} is no whole number of cells of {self.spacing_m:g} m")
        return self


class LikeCard(_Frozen):
    """Bounds of the statistics of an ensemble over those on the checkpoint's card, see `store.statistics`.

    Between ensembles of one checkpoint in dissimilar weather (fronts and storms over five regions of the United States,
    ARPEGE over France) detail lies within 0.8 to 1.7, the others within 0.8 to 1.25.
    """

    detail: tuple[float, float] = Field(
        default=(0.5, 2.0), strict=False, description="Amplitude of what is finer than coarse cells."
    )
    members: tuple[float, float] = Field(
        default=(0.75, 1.35), strict=False, description="Difference between members; 0 where they are the same."
    )
    hours: tuple[float, float] = Field(
        default=(0.7, 1.4), strict=False, description="Change from step to step; small where it stands still."
    )
    neighbours: tuple[float, float] = Field(
        default=(0.65, 1.5), strict=False, description="Difference between neighbours; large for noise."
    )
    wet: tuple[float, float] = Field(
        default=(0.7, 1.4), strict=False, description="Wet cells, given how uneven the amounts are."
    )


class Gates(_Frozen):
    """What an ensemble must meet before it is published."""

    max_closure_quanta: int = Field(default=0, ge=0, description="Largest closure of a coarse cell, in quanta.")
    max_mm: float = Field(default=300.0, gt=0, description="Largest plausible amount per fine step.")
    min_relative_spread: float = Field(
        default=0.05, ge=0, description="Smallest standard deviation over mean, where it rains."
    )
    min_wet_fraction: float = Field(
        default=0.01, ge=0, le=1, description="Smallest share of wet fine cells, where coarse cells are wet."
    )
    spread_skill: tuple[float, float] = Field(
        default=(0.5, 1.5), strict=False, description="Bounds of spread over skill on the checkpoint's card."
    )
    wet_fraction_ratio: tuple[float, float] = Field(
        default=(0.5, 2.0), strict=False, description="Bounds of wet fraction over that of truth on the card."
    )
    like_card: LikeCard = Field(
        default=LikeCard(), description="Bounds of the ensemble's statistics over those on the card."
    )


class Product(_Frozen):
    """What users subscribe to: a source on a target grid."""

    title: str
    description: str
    source: str
    grid: str
    members: int = Field(ge=1, description="Members; of each driving member, where the source has several.")
    seed: int = Field(ge=0)
    conserve: bool = True
    keywords: tuple[str, ...] = Field(default=(), strict=False)
    gates: Gates = Gates()


class Configuration(_Frozen):
    """All of catalog.yaml."""

    sources: dict[str, Source]
    grids: dict[str, TargetGrid]
    products: dict[FreeName, Product]
    archives: dict[str, Archive] = {}
    statics: dict[str, Static] = {}

    @model_validator(mode="after")
    def _references(self) -> Self:
        for name, product in self.products.items():
            if product.source not in self.sources:
                raise ValueError(f"product {name} names source {product.source!r}; there are {sorted(self.sources)}")
            if product.grid not in self.grids:
                raise ValueError(f"product {name} names grid {product.grid!r}; there are {sorted(self.grids)}")
        return self

    @classmethod
    def load(cls, path: Path) -> Configuration:
        """Read and validate catalog.yaml.

        Raises:
            ConfigurationError: no file, no YAML, or a value that is not understood; the message names it.
        """
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except OSError as e:
            raise ConfigurationError(f"{path} cannot be read ({e.strerror}). Name it with STSR_CATALOG_FILE.") from e
        except UnicodeDecodeError as e:
            line = e.object.count(b"\n", 0, e.start) + 1
            raise ConfigurationError(f"{path} is not UTF-8 (line {line}: {e.reason}). Save it in UTF-8.") from e
        except yaml.YAMLError as e:
            raise ConfigurationError(f"{path} is no valid YAML: {e}. Mend it there.") from e
        try:
            return cls.model_validate(content)
        except ValidationError as e:
            problems = "; ".join(f"{'.'.join(map(str, p['loc'])) or 'file'}: {p['msg']}" for p in e.errors())
            raise ConfigurationError(f"{path} is not understood: {problems}. Mend these entries.") from e

    def source(self, name: str) -> Source:
        """Return a source; raises ConfigurationError where there is none of that name."""
        return _named("source", self.sources, name)

    def archive(self, name: str) -> Archive:
        """Return an archive; raises ConfigurationError where there is none of that name."""
        return _named("archive", self.archives, name)

    def product(self, name: str) -> Product:
        """Return a product; raises ConfigurationError where there is none of that name."""
        return _named("product", self.products, name)


def _named(kind: str, there: Mapping[str, Entry], name: str) -> Entry:
    if name not in there:
        have = ", ".join(there) or "none"
        raise ConfigurationError(f"No {kind} {name!r} in catalog.yaml; there are {have}. Name one of these.")
    return there[name]


def shipped_catalog() -> Path:
    """Return the catalog.yaml that came with stsr: beside the package when installed, else the repository's."""
    package = Path(str(files("stsr_core")))
    installed = package / "catalog.yaml"
    return installed if installed.is_file() else package.parent / "catalog.yaml"


def choose_catalog(named: Path | None, folder: Path = Path()) -> Path:
    """Return the catalog.yaml to use in a folder: the one named, else the one there, else the shipped one."""
    local = folder / "catalog.yaml"
    return folder / named if named else local if local.is_file() else shipped_catalog()
