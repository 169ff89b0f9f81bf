"""What an operator declares about a source, where its files do not say it themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from stsr_core.grids import TimeLabel

Accumulation = Literal["none", "run", "day"]
Label: TypeAlias = int | float | str
ALL = "all"  # every entry along a dimension


@dataclass(frozen=True)
class Declared:
    """Declarations of catalog.yaml or of a command.

    Attributes:
        units: units of the variable; wins over what the file says.
        crs: CRS of the horizontal coordinates; wins likewise.
        time_label: which point of its interval a time stamp names; used where there are no time bounds.
        step_h: length of a step in hours; together with `time_label` it wins over time bounds.
        accumulated: amounts since the start of the run ("run"), since 00 h of the day ("day"), or per step ("none").
        missing_values: values that mark missing cells, beside those that the file names.
        max_negative_mm: negative amounts per step down to this become 0.
        select: index or label along every dimension that is neither time nor space; several of them, or `ALL`, along
            the axis of the driving members.
        period: ISO dates; only steps that lie wholly between them are read.
    """

    units: str | None = None
    crs: str | None = None
    time_label: TimeLabel | None = None
    step_h: float | None = None
    accumulated: Accumulation | None = None
    missing_values: tuple[float, ...] = ()
    max_negative_mm: float | None = None
    select: Mapping[str, Label | tuple[Label, ...]] = field(default_factory=dict)
    period: tuple[str, str] | None = None


NOTHING = Declared()
