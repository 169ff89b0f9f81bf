"""Regular grids and axes, and the one block reduction between fine and coarse."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import cftime
import numpy as np

from stsr_core.errors import ShapeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stsr_core.factors import Factor

TimeLabel = Literal["start", "middle", "end"]
BEFORE: dict[TimeLabel, float] = {"start": 0.0, "middle": 0.5, "end": 1.0}  # share of an interval before its label
HALO = 1  # coarse cells and steps on every side of a field that its interpolation to fine ones reads
EPOCH_YEAR = 1850  # origin of the time lattice; any fixed year would do
NANOSECONDS = np.datetime64("1678-01-01", "us"), np.datetime64("2262-01-01", "us")  # what datetime64[ns] holds


@dataclass(frozen=True)
class Axis:
    """A regular axis of cells.

    Attributes:
        first: centre of the first cell, in units of the axis.
        step: signed distance between neighbouring centres, not 0; negative where the axis descends.
        size: number of cells.
    """

    first: float
    step: float
    size: int

    @property
    def centres(self) -> NDArray[np.float64]:
        """Cell centres, (size,)."""
        return self.first + self.step * np.arange(self.size, dtype=np.float64)

    @property
    def edges(self) -> NDArray[np.float64]:
        """Cell edges, (size + 1,)."""
        return self.first + self.step * (np.arange(self.size + 1, dtype=np.float64) - 0.5)

    def refine(self, parts: int) -> Axis:
        """Split every cell into `parts` equal cells."""
        fine = self.step / parts
        return Axis(self.first - self.step / 2 + fine / 2, fine, self.size * parts)

    def isel(self, start: int, stop: int) -> Axis:
        """Return the axis of cells start..stop."""
        return Axis(self.first + self.step * start, self.step, stop - start)

    @property
    def lattice_index(self) -> int:
        """Index of the first cell on the lattice fixed in absolute place: the same cell of space has
        the same index in every subset of a grid. Counts along the direction of the axis.

        A quarter cell is added before rounding down, so that centres on whole or half multiples of
        the step, the usual ones, cannot flip by rounding error.
        """
        return math.floor(self.first / self.step + 0.25)


@dataclass(frozen=True)
class Grid:
    """A regular grid: two axes and the CRS that gives them meaning (WKT), or None where unknown."""

    y: Axis
    x: Axis
    crs_wkt: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(Y, X)."""
        return self.y.size, self.x.size

    @property
    def spacing_km(self) -> float:
        """Geometric mean of the sides of the cell in the middle, on the ground; 1 km where no CRS tells."""
        if self.crs_wkt is None:
            return 1.0
        from pyproj import CRS, Geod, Transformer
        from pyproj.exceptions import ProjError

        try:
            to_degrees = Transformer.from_crs(CRS.from_wkt(self.crs_wkt), 4326, always_xy=True)
        except ProjError:  # of a workshop or a model domain that lies nowhere
            return 1.0
        west_east, south_north = np.array([-0.5, 0.5, 0.0, 0.0]), np.array([0.0, 0.0, -0.5, 0.5])
        longitude, latitude = to_degrees.transform(
            self.x.first + self.x.step * (self.x.size // 2 + west_east),
            self.y.first + self.y.step * (self.y.size // 2 + south_north),
        )
        sides = Geod(ellps="WGS84").inv(longitude[::2], latitude[::2], longitude[1::2], latitude[1::2])[2]
        side = math.sqrt(math.prod(sides)) / 1000.0
        return side if side > 0 else 1.0  # at a pole, or beyond the reach of its CRS

    def refine(self, parts: int) -> Grid:
        """Split every cell into `parts` x `parts` equal cells."""
        return Grid(self.y.refine(parts), self.x.refine(parts), self.crs_wkt)


@dataclass(frozen=True, eq=False)
class Cells:
    """Any cells: curvilinear grids, meshes, and axes that are not regular.

    Attributes:
        corners: corners of every cell as (x, y), (N, V, 2), float64; short cells repeat NaN at the end.
        crs_wkt: the CRS that gives them meaning.
    """

    corners: NDArray[np.float64]
    crs_wkt: str

    @property
    def shape(self) -> tuple[int]:
        """(N,)."""
        return (len(self.corners),)

    def __eq__(self, other: object) -> bool:
        return self._digest == other._digest if isinstance(other, Cells) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._digest)

    @cached_property
    def _digest(self) -> bytes:
        """Of corners and CRS: millions of cells are compared by it again and again."""
        return hashlib.sha256(np.ascontiguousarray(self.corners).tobytes() + self.crs_wkt.encode()).digest()


def around_nodes(node: NDArray[np.float64]) -> NDArray[np.float64]:
    """Corners (Y * X, 4, 2) of the cells between nodes (Y + 1, X + 1, 2), row by row."""
    rings = np.stack((node[:-1, :-1], node[:-1, 1:], node[1:, 1:], node[1:, :-1]), axis=2)
    return rings.reshape(-1, 4, 2)


@dataclass(frozen=True)
class TimeAxis:
    """A regular time axis of intervals, in the calendar of its source.

    Attributes:
        start: start of the first interval; a naive `datetime` (UTC) or a `cftime.datetime`.
        step: length of every interval.
        size: number of intervals.
        label: which point of its interval the time coordinate names.
    """

    start: datetime | cftime.datetime
    step: timedelta
    size: int
    label: TimeLabel = "end"

    def _at(self, positions: NDArray[np.float64]) -> NDArray[np.generic]:
        if isinstance(self.start, cftime.datetime):
            return np.array([self.start + self.step * float(p) for p in positions.ravel()], dtype=object).reshape(
                positions.shape
            )
        offsets = np.round(positions * (self.step / timedelta(microseconds=1))).astype("timedelta64[us]")
        dates = np.datetime64(self.start, "us") + offsets
        if dates.size and (dates.min() < NANOSECONDS[0] or dates.max() > NANOSECONDS[1]):
            return dates
        return dates.astype("datetime64[ns]")

    @property
    def labels(self) -> NDArray[np.generic]:
        """The time coordinate, (size,), cftime objects or datetime64[ns], which beyond its centuries is [us]."""
        return self._at(np.arange(self.size, dtype=np.float64) + BEFORE[self.label])

    @property
    def bounds(self) -> NDArray[np.generic]:
        """Start and end of every interval, (size, 2), as `labels`."""
        return self._at(np.arange(self.size, dtype=np.float64)[:, None] + np.array([0.0, 1.0]))

    def refine(self, parts: int) -> TimeAxis:
        """Split every interval into `parts` equal intervals."""
        return TimeAxis(self.start, self.step / parts, self.size * parts, self.label)

    def isel(self, start: int, stop: int) -> TimeAxis:
        """Return the axis of intervals start..stop."""
        return TimeAxis(self.start + self.step * start, self.step, stop - start, self.label)

    @property
    def since_epoch(self) -> timedelta:
        """Time from the origin of the time lattice to the start of the first interval."""
        if isinstance(self.start, cftime.datetime):
            since: timedelta = self.start - cftime.datetime(EPOCH_YEAR, 1, 1, calendar=self.start.calendar)
            return since
        return self.start - datetime(EPOCH_YEAR, 1, 1)

    @property
    def lattice_index(self) -> int:
        """Index of the first interval on the lattice fixed in absolute time (steps since 1850)."""
        return math.floor(self.since_epoch / self.step + 0.25)


def coarsen(fine: NDArray[np.float32], factor: Factor) -> NDArray[np.float32]:
    """Coarse totals of fine amounts: the sum over t steps of the area mean of s x s cells.

    Args:
        fine: amount [mm per fine step], (..., T*t, Y*s, X*s); cells of one block have equal area.
        factor: (s, t).

    Returns:
        Amount [mm per coarse step], (..., T, Y, X), float64 summed and returned as float32; NaN where any
        fine cell of the block is NaN.

    Raises:
        ShapeError: the last three sizes are no multiples of the factor.
    """
    *lead, nt, ny, nx = fine.shape
    s, t = factor.space, factor.time
    if nt % t or ny % s or nx % s:
        raise ShapeError(f"Shape {fine.shape} is no multiple of factor {factor}; crop it to whole blocks first.")
    blocks = fine.reshape(*lead, nt // t, t, ny // s, s, nx // s, s)
    total = blocks.sum(axis=(-5, -3, -1), dtype=np.float64) / (s * s)
    return total.astype(np.float32)
