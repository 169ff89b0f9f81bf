"""The windows that cover a box, on a lattice fixed in absolute place and time, and how they are blended.

All indices count coarse cells or steps. Along each axis windows start at multiples of the stride; a window
is clipped to what a shard reaches, and dropped where a neighbour covers what is left of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stsr_core.factors import FactorConfiguration

    Weights = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]

WINDOW_CELLS = 192  # fine cells along a window; larger ones cost memory, smaller ones more overlap
OVERLAP_CELLS = 24  # fine cells that neighbouring windows share at least
FAR_CELLS = 48  # fine cells that windows reach beyond a shard, and half of L in time: steps across shards are as inside
LEAST_FAR = 3  # coarse cells and steps, at least: with 2 cells at (25,6) steps across shards grow by 2 %

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class AxisLattice:
    """Windows along one axis, in coarse cells.

    Attributes:
        length: of a window.
        overlap: of neighbouring windows.
        far: what lies further from a box hardly changes it; windows are at least as long.
    """

    length: int
    overlap: int
    far: int

    @property
    def stride(self) -> int:
        """From window to window."""
        return self.length - self.overlap

    def reach(self, start: int, stop: int, domain: tuple[int, int]) -> tuple[int, int]:
        """What a box needs of the domain: the windows that reach into it or into the blend around it.

        They are cut off where they are `far` from the box, but not made shorter than that: slivers know too little.
        """
        first = (start - self.overlap - self.length) // self.stride * self.stride + self.stride
        last = (stop + self.overlap - 1) // self.stride * self.stride
        low = max(first, min(start, first + self.length) - self.far)
        high = min(last + self.length, max(stop, last) + self.far)
        return max(domain[0], low), min(domain[1], high)

    def covering(self, span: tuple[int, int]) -> list[tuple[int, int]]:
        """Windows that cover a span, clipped to it."""
        first, last = (span[0] - self.length) // self.stride + 1, (span[1] - 1) // self.stride
        return [self._clipped(k, span) for k in range(first, last + 1) if not self._covered(k, span)]

    def _clipped(self, k: int, span: tuple[int, int]) -> tuple[int, int]:
        first = k * self.stride
        return max(span[0], first), min(span[1], first + self.length)

    def _covered(self, k: int, span: tuple[int, int]) -> bool:
        """Whether a neighbour holds all that the span left of window k; of two equal ones the first stays."""
        a, b = self._clipped(k, span)
        _, previous_end = self._clipped(k - 1, span)
        next_start, next_end = self._clipped(k + 1, span)
        return previous_end >= b or (next_start <= a and next_end > b)

    def weights(self, span: tuple[int, int], parts: int) -> list[NDArray[np.float32]]:
        """Blending weights of the windows that cover a span, along `parts` fine cells for each coarse one.

        Positive; they fall linearly over the overlap, and those of all windows add up to 1 in every fine cell.
        """
        windows, total = self.covering(span), np.zeros((span[1] - span[0]) * parts)
        width, ramps = max(1, self.overlap * parts), []
        for a, b in windows:
            inside = np.arange((b - a) * parts) + 0.5
            ramps.append(np.minimum(1.0, np.minimum(inside, inside[::-1]) / width))
            total[(a - span[0]) * parts : (b - span[0]) * parts] += ramps[-1]
        return [
            (ramp / total[(a - span[0]) * parts : (b - span[0]) * parts]).astype(np.float32)
            for (a, b), ramp in zip(windows, ramps, strict=True)
        ]


@dataclass(frozen=True)
class WindowLattice:
    """Windows in time and space for one factor configuration."""

    time: AxisLattice
    space: AxisLattice

    @classmethod
    def of(cls, configuration: FactorConfiguration) -> WindowLattice:
        """Lattice of a configuration: L coarse steps, about WINDOW_CELLS fine cells, a tapered overlap."""
        length, s = configuration.context_length, configuration.factor.space
        overlap, blend = max(1, length // 4) if length > 1 else 0, round(OVERLAP_CELLS / s)
        return cls(
            AxisLattice(length, overlap, max(LEAST_FAR, length // 2)),
            AxisLattice(round(WINDOW_CELLS / s), blend, max(LEAST_FAR, round(FAR_CELLS / s))),
        )

    @property
    def axes(self) -> tuple[AxisLattice, AxisLattice, AxisLattice]:
        """Along time, y and x."""
        return self.time, self.space, self.space

    def reach(self, box: Box, domain: Box) -> Box:
        """What a box needs of the domain: itself with the margin around it."""
        t, y, x = (a.reach(*span, limits) for a, span, limits in zip(self.axes, box, domain, strict=True))
        return t, y, x

    def covering(self, reach: Box) -> list[Box]:
        """Windows ((t0, t1), (y0, y1), (x0, x1)) of what a box reaches, x fastest."""
        t, y, x = (axis.covering(span) for axis, span in zip(self.axes, reach, strict=True))
        return list(product(t, y, x))

    def cut(self, window: Box) -> tuple[int, int]:
        """Coarse rows and columns of a window, in absolute indices, that were cut off before what is left of it."""
        _, (y, _), (x, _) = window
        return y % self.space.stride, x % self.space.stride

    def weights(self, reach: Box, parts: tuple[int, int, int]) -> list[Weights]:
        """Blending weights of the same windows along t, y and x; their product is that of a fine cell and step."""
        t, y, x = (axis.weights(span, n) for axis, span, n in zip(self.axes, reach, parts, strict=True))
        return list(product(t, y, x))
