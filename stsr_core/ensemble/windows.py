"""The windows that cover a box, on a lattice fixed in absolute place and time, and how they are blended.

All indices count coarse cells or steps. Along each axis windows start at multiples of the stride; a window
is clipped to the domain, and dropped where a neighbour covers what is left of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stsr_core.factors import FactorConfiguration

WINDOW_CELLS = 192  # fine cells along a window; larger ones cost memory, smaller ones more overlap
OVERLAP_CELLS = 24  # fine cells that neighbouring windows share at least


@dataclass(frozen=True)
class AxisLattice:
    """Windows along one axis: `length` and `overlap` in coarse cells."""

    length: int
    overlap: int

    def covering(self, start: int, stop: int, domain: tuple[int, int]) -> list[tuple[int, int]]:
        """Windows that reach into start..stop, clipped to the domain.

        Args:
            start: first index of the box.
            stop: index behind its last.
            domain: first index of the domain, and the index behind its last.
        """
        stride = self.length - self.overlap
        found = []
        for k in range((start - self.length) // stride + 1, (stop - 1) // stride + 1):
            a, b = self._clipped(k, domain)
            if a < b and b > start and a < stop and not self._covered(k, domain):
                found.append((a, b))
        return found

    def _clipped(self, k: int, domain: tuple[int, int]) -> tuple[int, int]:
        first = k * (self.length - self.overlap)
        return max(domain[0], first), min(domain[1], first + self.length)

    def _covered(self, k: int, domain: tuple[int, int]) -> bool:
        """Whether a neighbour holds all that the domain left of window k; of two equal ones the first stays."""
        a, b = self._clipped(k, domain)
        _, previous_end = self._clipped(k - 1, domain)
        next_start, next_end = self._clipped(k + 1, domain)
        return previous_end >= b or (next_start <= a and next_end > b)


@dataclass(frozen=True)
class WindowLattice:
    """Windows in time and space for one factor configuration."""

    time: AxisLattice
    space: AxisLattice

    @classmethod
    def of(cls, configuration: FactorConfiguration) -> WindowLattice:
        """Lattice of a configuration: L coarse steps, about WINDOW_CELLS fine cells, a tapered overlap."""
        length, s = configuration.context_length, configuration.factor.space
        return cls(
            AxisLattice(length, max(1, length // 4) if length > 1 else 0),
            AxisLattice(max(6, round(WINDOW_CELLS / s)), max(1, round(OVERLAP_CELLS / s))),
        )

    def covering(
        self, box: tuple[tuple[int, int], ...], domain: tuple[tuple[int, int], ...]
    ) -> list[tuple[tuple[int, int], ...]]:
        """Windows ((t0, t1), (y0, y1), (x0, x1)) that reach into a box or into the blend around it."""
        axes = []
        for lattice, (start, stop), limits in zip((self.time, self.space, self.space), box, domain, strict=True):
            low, high = max(limits[0], start - lattice.overlap), min(limits[1], stop + lattice.overlap)
            axes.append(lattice.covering(low, high, limits))
        return list(product(*axes))

    def taper(self, window: tuple[tuple[int, int], ...], parts: tuple[int, int, int]) -> NDArray[np.float32]:
        """Blending weights of a window on the fine grid, > 0, falling linearly over the overlap."""
        ramps = []
        for lattice, (a, b), n in zip((self.time, self.space, self.space), window, parts, strict=True):
            inside = np.arange((b - a) * n) + 0.5
            width = max(1, lattice.overlap * n)
            ramps.append(np.minimum(1.0, np.minimum(inside, inside[::-1]) / width).astype(np.float32))
        t, y, x = ramps
        return t[:, None, None] * y[None, :, None] * x[None, None, :]
