"""Types of flow parameters: what the form in the Prefect UI offers, explains and refuses."""

from __future__ import annotations

from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from stsr_core.configuration import FreeName
from stsr_core.home import at_home

ALL = "all"

# Titles and help of a form come from the names and docstrings of the flow; bounds and nested forms from here.
ProductName = Annotated[str, Field(min_length=1)]
Members = Annotated[int | None, Field(ge=1, le=10_000)]
PublishAs = FreeName | None
HomePath = Annotated[Path, AfterValidator(at_home)]
Place = Annotated[str, AfterValidator(at_home)]  # a path, glob or URL
CatalogFile = Annotated[Path | None, AfterValidator(at_home)]
Destination = Annotated[str | None, AfterValidator(at_home)]
SmokeMembers = Annotated[int, Field(ge=1, le=8)]


class Order(StrEnum):
    """Which piece of a period comes first."""

    oldest_first = "oldest first"
    newest_first = "newest first"


class _Form(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Period(_Form):
    """Whole days, the last one included."""

    first: date = Field(description="First day (UTC, or the calendar of the source).")
    last: date = Field(description="Last day, included.")

    @model_validator(mode="after")
    def _forwards(self) -> Self:
        if self.last < self.first:
            raise ValueError(f"the last day {self.last} is before the first {self.first}")
        return self

    def __str__(self) -> str:
        return f"{self.first}..{self.last}"


class Pieces(_Form):
    """How a period is cut, and how fast it goes."""

    days: int = Field(default=31, ge=1, le=3660, description="Days of a piece.")
    order: Order = Field(default=Order.oldest_first, description="Which piece comes first.")
    pause_s: float = Field(default=0.0, ge=0, le=86_400, description="Seconds to rest between pieces.")
    workers: int = Field(default=1, ge=0, le=1024, description="Dask workers; 0 for one per core or GPU.")


class Retention(_Form):
    """Which superseded versions go. The latest version of a product always stays."""

    keep: int = Field(default=30, ge=1, le=100_000, description="Newest versions that stay, whatever their age.")
    days: int = Field(default=365, ge=0, le=36_500, description="Versions younger than this stay as well.")


class Withdrawal(_Form):
    """A version that must no longer be used. It stays listed and says why."""

    version: str = Field(pattern=r"^v[1-9]\d*$", description="v1, v2, ...")
    reason: str = Field(min_length=1, max_length=500, description="What is wrong with it, for those who used it.")
