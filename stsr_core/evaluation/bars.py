"""What a good checkpoint keeps to, and whether one does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stsr_core.evaluation.baselines import BASELINES

if TYPE_CHECKING:
    from stsr_core.factors import Factor

BARS = {  # (lowest, highest) of scores; ratios are over truth
    "spread_skill": (0.85, 1.15),
    "quantile_ratio_0.99": (0.85, 1.15),
    "quantile_ratio_0.999": (0.85, 1.15),
    "wet_fraction_ratio": (0.9, 1.1),
    "hourly_change_ratio": (0.9, 1.1),
    "spectrum_db": (0.0, 2.0),
    "seam_ratio": (0.95, 1.05),
    "closure_quanta": (0.0, 0.0),
}
BETTER = 1.0  # CRPS over every baseline, at least
CRPS_BARS = {  # CRPS over a baseline, for the factors that are compared from release to release
    "rainfarm": {(8, 3): 0.75, (10, 1): 0.85, (25, 6): 0.75},
    "linear": {(8, 3): 0.68, (10, 1): 0.80, (25, 6): 0.62},
}
UNDEFINED = "undefined at this factor, of so few members or steps, or where it hardly rains"


@dataclass(frozen=True)
class Bar:
    """A score, what was found, and the bounds that it must keep to.

    Attributes:
        score: its name.
        found: its value, NaN where it is unknown.
        low: lowest that is good.
        high: highest that is good.
        unknown: why it is unknown, if it is.
    """

    score: str
    found: float
    low: float
    high: float
    unknown: str

    @property
    def met(self) -> bool | None:
        """Whether it is kept to; None where that cannot be judged."""
        return None if math.isnan(self.found) else self.low <= self.found <= self.high

    @property
    def verdict(self) -> str:
        """`met`, `missed`, or why it cannot be judged."""
        return f"not judged: {self.unknown}" if self.met is None else "met" if self.met else "missed"


def bars(scores: Mapping[str, float], factor: Factor, left_out: Mapping[str, str]) -> list[Bar]:
    """Return all bars of a checkpoint's scores at a factor; `left_out` says why baselines were, by name."""
    over = {b: CRPS_BARS.get(b, {}).get((factor.space, factor.time), BETTER) for b in BASELINES}
    wanted = {f"crps_over_{b}": (0.0, bar) for b, bar in over.items()} | BARS
    return [
        Bar(name, scores.get(name, math.nan), low, high, left_out.get(name.removeprefix("crps_over_"), UNDEFINED))
        for name, (low, high) in wanted.items()
    ]
