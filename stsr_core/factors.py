"""Factors, their hyperparameters (the recipe), and the family that serves them.

This is the one place that says what beta, correlation of noise, context length L and conservation function f belong
to a factor; training and sampling both read it here, and a checkpoint's card repeats what it was trained with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from stsr_core.errors import FactorError

LONGEST_CONTEXT = 1440  # coarse frames: more than twelve hours of minutes, doubled
ATTENTION_HORIZON_H = 12.0  # hours that a window's attention spans; reference settings span 10 to 18 h
LARGEST = (25, 6)  # factor in space and in time
SPACINGS_KM = (1, 2, 3, 4, 5)  # of fine grids, that networks can be told
# What noise has in common, see `NoiseCorrelation`: for every bit of missing detail beyond so many, and for every octave
# of the fine spacing.
CORRELATED_BITS = 9.3
BESIDE_PER_BIT, BEFORE_PER_BIT = 0.01788, 0.21215
BESIDE_PER_OCTAVE, BEFORE_PER_OCTAVE = 0.04, 0.26


class Factor(BaseModel):
    """How many fine cells along x and y (space) and fine steps (time) one coarse cell holds."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    space: int = Field(ge=1, le=LARGEST[0], description="Fine cells along each axis of a coarse cell.")
    time: int = Field(ge=1, le=LARGEST[1], description="Fine steps of a coarse step.")

    @classmethod
    def of(cls, space: int, time: int) -> Factor:
        """The factor (space, time).

        Raises:
            FactorError: none of the family.
        """
        if not (1 <= space <= LARGEST[0] and 1 <= time <= LARGEST[1]):
            raise FactorError(
                f"Factor ({space},{time}) is asked for; it can be 1 to {LARGEST[0]} in space and 1 to {LARGEST[1]} in "
                "time. Ask for one of these."
            )
        return cls(space=space, time=time)

    def __str__(self) -> str:
        return f"({self.space},{self.time})"

    @property
    def underdetermination(self) -> float:
        """Bits of missing detail per coarse cell, log2(s * s * t)."""
        return math.log2(self.space**2 * self.time)


class ConservationFunction(BaseModel):
    """The mass-conservation function f.

    f takes `threshold_mm` off every amount, max(x - threshold, 0) as the authors do: it removes the drizzle that
    networks leave and sharpens what is then scaled to the coarse totals. Where the coarse input means less than 0.2 mm
    per fine step it takes off less in proportion; else all of a light rain would fall in a few showers. `excess` bounds
    one cell: where W is the largest coarse amount [mm per coarse step] among its coarse cell and the neighbours of that
    in space and time, it holds at most W + excess * sqrt(W * 1 mm); the remainder goes to the other cells of the block.
    `excess=None` is the exact f, any other the tapered f.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    threshold_mm: float = Field(ge=0.0)
    excess: float | None = Field(default=None, ge=0.0)


class NoiseCorrelation(BaseModel):
    """What the noise of a cell has in common with that of others, see `diffusion.correlated`; white noise has nothing.

    Attributes:
        beside: weight of each cell beside along y and x; that of the cell itself is 1.
        before: weight of the step before; that of the one before it is its square.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    beside: float = Field(default=0.0, ge=0.0)
    before: float = Field(default=0.0, ge=0.0, lt=1.0)

    @property
    def white(self) -> bool:
        """Whether there is nothing in common."""
        return not (self.beside or self.before)


class FactorConfiguration(BaseModel):
    """A factor with the paper's three hyperparameters, and the correlation of noise.

    Attributes:
        factor: (s, t).
        beta: noise amplitude, the last value of the linear beta schedule over 1000 steps.
        noise: its correlation on a fine grid of 1 km.
        context_length: L, the coarse frames that a window holds.
        conservation: f.
        spacing_km: spacing of the fine grid as the networks are told it, one of SPACINGS_KM. Rain moves, grows and
            decays slower where it is counted in larger cells.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    factor: Factor
    beta: float = Field(gt=0.0, lt=1.0)
    noise: NoiseCorrelation = NoiseCorrelation()
    context_length: int = Field(ge=1, le=LONGEST_CONTEXT)
    conservation: ConservationFunction
    spacing_km: int = Field(default=1, ge=SPACINGS_KM[0], le=SPACINGS_KM[-1])

    def told(self, spacing_km: int) -> FactorConfiguration:
        """The same on a fine grid of another spacing."""
        return self.model_copy(update={"spacing_km": spacing_km})

    @property
    def correlation(self) -> NoiseCorrelation:
        """Of noise on a fine grid of its spacing.

        Networks know rain at 1 km best. Counted in wider cells it lasts longer, and more of what the coarse input does
        not tell spans several of them; so does noise then, which says what of all that is possible a member has. On
        validation windows averaged to 2 to 5 km, members of white noise changed 1.1 to 1.3 times as much from step to
        step as the data where steps are refined, and had up to 5 dB less power at 4 to 8 cells; with what this gives,
        0.9 to 1.1 times, and half of that. Hourly coarse steps ask for more beside.
        """
        octaves = math.log2(self.spacing_km)
        return NoiseCorrelation(
            beside=self.noise.beside + BESIDE_PER_OCTAVE * octaves / self.factor.time ** (1 / 3),
            before=max(self.noise.before, BEFORE_PER_OCTAVE * octaves),
        )


def nearest_spacing(km: float, spacings: Sequence[int] = SPACINGS_KM) -> int:
    """The spacing among those that can be told that is nearest to one in km, by the logarithm."""
    return min(spacings, key=lambda known: abs(math.log(known / km)))


def recipe(factor: Factor, *, fine_step_h: float = 1.0) -> FactorConfiguration:
    """Hyperparameters of a factor.

    - beta grows with the underdetermination: 0.006 + 0.002 per bit. Larger beta drives the noised
      residual closer to pure noise, so a member keeps less of the mean and the ensemble spreads more
      (arXiv 2604.21903). The line passes near the authors' settings 0.010-0.020 at (10,1)-(10,3) and
      0.035 at (25,6).
    - Noise is white where less than CORRELATED_BITS of detail are missing. Beyond, members miss power at scales between
      the cell and the coarse cell, of which networks make too little out of noise of single cells and steps: at (25,6)
      CRPS is 1.2 % less with what this gives there, and change from step to step 11 % less.
    - L keeps the attention horizon L * t * step near 12 h, with 3 coarse frames at least
      (the authors use 10 to 18 h).
    - f takes 0.08 + 0.016 t^2 mm off: networks leave drizzle, the more of it the more steps they share an amount out to
      (wet fraction at (25,6) 1.04 and 1.00 times that of the radar with 0.5 and 0.65 mm, averaged to 5 km 1.09 and
      1.04, with CRPS within 0.1 %). Where cells stay as they are (s = 1) it takes 0.4 mm off. Its taper has the excess
      s / t^(1/4): the variance of rain grows with its mean, as that of a sum of showers does, and less of W falls in
      one of several steps. Of radar cells above 10 mm/h one in a thousand holds more than W + 0.7 to 1.0 times that
      * sqrt(W), at each served factor with s > 1 (MRMS training windows). Without a taper the largest members are twice
      the radar's; one that grows in proportion to W is too tight where W is small and too loose where it is large.

    Source: settings of arXiv 2604.21903 as starting point; chosen on MRMS validation windows.
    """
    bits = factor.underdetermination
    beyond = max(0.0, bits - CORRELATED_BITS)
    return FactorConfiguration(
        factor=factor,
        beta=round(0.006 + 0.002 * bits, 4),
        noise=NoiseCorrelation(beside=round(BESIDE_PER_BIT * beyond, 4), before=round(BEFORE_PER_BIT * beyond, 4)),
        context_length=max(3, round(ATTENTION_HORIZON_H / (factor.time * fine_step_h))),
        conservation=ConservationFunction(
            threshold_mm=0.4 if factor.space == 1 else round(0.08 + 0.016 * factor.time**2, 2),
            excess=round(factor.space / factor.time**0.25, 1),
        ),
    )


AUTHORS = {  # factor: beta, L (settings of the public research code of arXiv 2604.21903)
    (1, 3): (0.015, 4),
    (10, 1): (0.010, 10),
    (10, 3): (0.020, 5),
    (25, 6): (0.035, 3),
}


def authors_recipe(factor: Factor) -> FactorConfiguration:
    """The authors' beta and L with our f; their own f, which closes whole tiles, is in `evaluation.reference`.

    Raises:
        FactorError: a factor that they give no setting for.
    """
    found = AUTHORS.get((factor.space, factor.time))
    if found is None:
        have = ", ".join(f"({s},{t})" for s, t in AUTHORS)
        raise FactorError(f"The authors give no setting for factor {factor}; they do for {have}. Ask for one of these.")
    beta, context_length = found
    ours = recipe(factor)
    return FactorConfiguration(factor=factor, beta=beta, context_length=context_length, conservation=ours.conservation)


@dataclass(frozen=True)
class Match:
    """What `Family.nearest` answers: what was asked for, what serves it, and how far apart they are."""

    requested_space: float
    requested_time: float
    factor: Factor
    distance: float


def _instead(space: float, time: float, served: Sequence[Factor], limit: float) -> str:
    """What to do about a factor (space, time) that is not served within a ratio of `limit`."""
    whole = max(1, round(space)), max(1, round(time))
    if min(space, time) * limit < 1:
        changes = _changes(min(1.0, space), min(1.0, time))
        return (
            f"The source is finer than the target grid, and no factor averages: the target grid needs {changes}, or "
            "the source must be coarser."
        )
    if whole[0] > LARGEST[0] or whole[1] > LARGEST[1]:
        changes = _changes(max(1.0, space / LARGEST[0]), max(1.0, time / LARGEST[1]))
        return (
            f"No factor goes beyond ({LARGEST[0]},{LARGEST[1]}), so none can be trained: the target grid needs "
            f"{changes}, or the source must be finer."
        )
    if whole == (1, 1):
        return "(1,1) refines nothing: ask for a narrower spacing or shorter steps."
    if whole in [(factor.space, factor.time) for factor in served]:
        return "Ask for another spacing or cadence, or allow a larger ratio (STSR_MATCH_LIMIT)."
    return (
        f"Train ({whole[0]},{whole[1]}) with `stsr train --space {whole[0]} --time {whole[1]}`, or ask for another "
        "spacing or cadence."
    )


def _changes(wider: float, longer: float) -> str:
    """What a target grid needs of these, where they are not 1."""
    changes = (f"a spacing {wider:.3g} times as wide", wider), (f"steps {longer:.3g} times as long", longer)
    return " and ".join(text for text, times in changes if times != 1)


@dataclass(frozen=True)
class Family:
    """All factors that can be served."""

    factors: tuple[Factor, ...]

    def nearest(self, space: float, time: float, *, limit: float = 1.5) -> Match:
        """Return the factor nearest to a request by log distance on both axes.

        Args:
            space: wanted fine cells per coarse cell along one axis, > 0, need not be whole.
            time: wanted fine steps per coarse step, > 0, need not be whole.
            limit: the largest ratio on one axis between the request and what serves it.

        Raises:
            FactorError: the family is empty, its nearest factor is further away than `limit`, or the request is none.
        """
        if not self.factors:
            raise FactorError("No checkpoint is installed, so no factor is served. Train one with `stsr train`.")
        if not all(math.isfinite(f) and f > 0 for f in (space, time)):
            raise FactorError(
                f"Factor ({space},{time}) is asked for; finite numbers above 0 are needed. Does the source have cells "
                "and steps of a known size at the target?"
            )

        def off(f: Factor) -> tuple[float, float]:
            return math.log(f.space / space), math.log(f.time / time)

        best = min(self.factors, key=lambda f: (math.hypot(*off(f)), f.space, f.time))
        if max(abs(d) for d in off(best)) > math.log(limit) + 1e-9:
            raise FactorError(
                f"Factor ({space:.3g},{time:.3g}) is asked for; the nearest that is served is {best}, further than "
                f"a ratio of {limit:g} on an axis. Served: {self}. {_instead(space, time, self.factors, limit)}"
            )
        return Match(space, time, best, math.hypot(*off(best)))

    def exact(self, space: int, time: int) -> Factor:
        """Return the factor (space, time) itself.

        Raises:
            FactorError: it is not served; the message names the nearest that is.
        """
        for factor in self.factors:
            if (factor.space, factor.time) == (space, time):
                return factor
        nearest = self.nearest(space, time, limit=math.inf).factor
        raise FactorError(
            f"Factor ({space},{time}) is not served; served are {self}. The nearest is {nearest}: ask for it. "
            f"{_instead(space, time, self.factors, 1.0)}"
        )

    def __str__(self) -> str:
        return ", ".join(str(f) for f in sorted(self.factors, key=lambda f: (f.space, f.time))) or "none"
