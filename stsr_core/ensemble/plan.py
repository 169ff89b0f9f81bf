"""The plan: which shards an ensemble consists of, what each is made from, and what it costs. No torch here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from stsr_core.ensemble.windows import Box, WindowLattice
from stsr_core.errors import ConfigurationError
from stsr_core.grids import HALO
from stsr_core.version import code_version

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stsr_core.checkpoint import Card, Checkpoint, Served
    from stsr_core.grids import Grid, TimeAxis
    from stsr_core.sources.cube import Cube

MEMBER_BLOCK = 4  # members of a shard; they share the mean
SHARD_CELLS = 512  # fine cells along a tile, before rounding to whole coarse cells
SHARD_STEPS = 48  # fine steps of a time block, before rounding to whole coarse steps; windows reach past its ends
MAX_MEMBERS = 10_000


@dataclass(frozen=True)
class Recipe:
    """All that determines an ensemble besides its coarse input.

    Attributes:
        served: factor configuration, residual scale and network evaluations of the checkpoint.
        checkpoint_digest: identifies card and weights.
        seed: product seed.
        members: number of members; of each driving member, where there are several.
        conserve: whether coarse totals are enforced.
    """

    served: Served
    checkpoint_digest: str
    seed: int
    members: int
    conserve: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.members <= MAX_MEMBERS:
            raise ConfigurationError(
                f"{self.members} members are asked for; 1 to {MAX_MEMBERS} can be made. Change members."
            )
        if not 0 <= self.seed < 2**63:
            raise ConfigurationError(f"Seed {self.seed} is asked for; 0 to 2^63 - 1 is needed. Change the seed.")

    @classmethod
    def of(cls, checkpoint: Checkpoint, served: Served, *, seed: int, members: int, conserve: bool) -> Recipe:
        """Recipe for a checkpoint's factor configuration."""
        return cls(served, checkpoint.digest, seed, members, conserve)

    def identity(self) -> dict[str, object]:
        """What a shard's digest covers of the recipe; the number of members is not part of it."""
        return {
            "configuration": self.served.configuration.model_dump(mode="json"),
            "evaluations": self.served.evaluations,
            "checkpoint": self.checkpoint_digest,
            "seed": self.seed,
            "conserve": self.conserve,
            "code": code_version(),
        }


@dataclass(frozen=True)
class Shard:
    """The unit of work, of writing and of resuming: member block x time block x tile.

    Attributes:
        index: (member block, time block, tile row, tile column).
        driving: index of its driving member.
        numbers: first member of that driving member, and the one behind the last.
        members: where they lie along the member axis of the ensemble, likewise.
        box: coarse steps, rows and columns, as (start, stop) in the cube.
    """

    index: tuple[int, int, int, int]
    driving: int
    numbers: tuple[int, int]
    members: tuple[int, int]
    box: Box

    @property
    def key(self) -> str:
        """Name of the shard, the same in logs, receipts and errors."""
        return "m{}-t{}-y{}-x{}".format(*self.index)

    @property
    def place(self) -> tuple[int, Box]:
        """What it shares with other members: the driving member, and the box."""
        return self.driving, self.box

    def region(self, space: int, time: int) -> tuple[slice, slice, slice, slice]:
        """Slices (member, time, y, x) of the fine array that the shard fills."""
        (t0, t1), (y0, y1), (x0, x1) = self.box
        return (
            slice(*self.members),
            slice(t0 * time, t1 * time),
            slice(y0 * space, y1 * space),
            slice(x0 * space, x1 * space),
        )


@dataclass(frozen=True)
class ShardTask:
    """What a worker gets to make one shard: everything but the weights.

    Attributes:
        shard: which shard.
        recipe: how to make it.
        origin: absolute coarse index of the cube's first step, row and column.
        shape: coarse shape of the cube.
        read: coarse steps, rows and columns that `coarse` holds; may reach one cell out of the cube, where
            edge values are repeated.
        coarse: amount [mm per coarse step] in `read`, float32, NaN where missing.
        driving: label of the driving member that `coarse` is of.
        statics: static fields as the networks see them in `read` without its halo, (S, y, x); None without any.
        digest: over everything above.
    """

    shard: Shard
    recipe: Recipe
    origin: tuple[int, int, int]
    shape: tuple[int, int, int]
    read: Box
    coarse: NDArray[np.float32]
    driving: str
    statics: NDArray[np.float32] | None
    digest: str


_Span: TypeAlias = tuple[int, tuple[int, int]]
"""A block along an axis: its number, its start and the index behind its end."""
_Place: TypeAlias = "tuple[Box, NDArray[np.float32], NDArray[np.float32] | None, hashlib._Hash]"
"""What a place reads: its box, the amounts and static fields there, and the digest so far."""


@dataclass(frozen=True)
class Plan:
    """All shards of one ensemble over the coarse cubes of its driving members, which have the same axes.

    Along the member axis lie blocks of members: the first block of every driving member, then the second of every one,
    so that more members come behind those that are there. `statics` holds the static fields that the checkpoint needs,
    (S, Y*s, X*s), see `stsr_core.statics`.
    """

    cubes: tuple[Cube, ...]
    recipe: Recipe
    statics: NDArray[np.float32] | None = None

    @property
    def cube(self) -> Cube:
        """The first driving member's cube, for the axes that all share."""
        return self.cubes[0]

    def part(self, members: int, steps: int) -> Plan:
        """The plan of the first members of every driving member, and of the first coarse steps."""
        cubes = (replace(c, amount=c.amount[:steps], times=c.times.isel(0, steps)) for c in self.cubes)
        return Plan(tuple(cubes), replace(self.recipe, members=members), self.statics)

    @property
    def member_block(self) -> int:
        """Members of a shard. Blocks of several driving members must all be full for shards to follow each other."""
        if len(self.cubes) == 1:
            return MEMBER_BLOCK
        return next(n for n in range(MEMBER_BLOCK, 0, -1) if self.recipe.members % n == 0)

    @property
    def driving(self) -> tuple[str, ...]:
        """Label of the driving member of every member of the ensemble; () where the source is no ensemble."""
        if not self.cube.driving:
            return ()
        blocks = range(0, self.recipe.members, self.member_block)
        sizes = [min(self.member_block, self.recipe.members - first) for first in blocks]
        return tuple(cube.driving for size in sizes for cube in self.cubes for _ in range(size))

    @property
    def space(self) -> int:
        """Fine cells per coarse cell along one axis."""
        return self.recipe.served.configuration.factor.space

    @property
    def time(self) -> int:
        """Fine steps per coarse step."""
        return self.recipe.served.configuration.factor.time

    @property
    def fine_grid(self) -> Grid:
        """Grid of the ensemble."""
        return self.cube.grid.refine(self.space)

    @property
    def fine_times(self) -> TimeAxis:
        """Time axis of the ensemble."""
        return self.cube.times.refine(self.time)

    @property
    def fine_shape(self) -> tuple[int, int, int, int]:
        """(member, time, y, x)."""
        nt, ny, nx = self.cube.amount.shape
        return len(self.cubes) * self.recipe.members, nt * self.time, ny * self.space, nx * self.space

    @property
    def block(self) -> tuple[int, int, int]:
        """Coarse steps, rows and columns of a shard; steps do not depend on the period, so that it can grow."""
        tile = round(SHARD_CELLS / self.space)
        _, ny, nx = self.cube.amount.shape
        return round(SHARD_STEPS / self.time), min(ny, tile), min(nx, tile)

    def strange(self, card: Card) -> str:
        """What its fine grid has that the networks of a card were not trained on, see `Card.strange`."""
        return card.strange(self.fine_grid.spacing_km, self.fine_times.step)

    @cached_property
    def lattice(self) -> WindowLattice:
        """Lattice of the windows."""
        return WindowLattice.of(self.recipe.served.configuration)

    @property
    def origin(self) -> tuple[int, int, int]:
        """Absolute coarse index of the cube's first step, row and column."""
        return self.cube.times.lattice_index, self.cube.grid.y.lattice_index, self.cube.grid.x.lattice_index

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """All shards, members fastest so that neighbours in time and place finish together."""
        sizes = (self.recipe.members, *self.cube.amount.shape)
        blocks = (self.member_block, *self.block)
        axes = [
            [(i, (a, min(n, a + b))) for i, a in enumerate(range(0, n, b))] for n, b in zip(sizes, blocks, strict=True)
        ]
        return tuple(
            self._shard(r, m, (t, y, x))
            for t, y, x in product(*axes[1:]) for r in range(len(self.cubes)) for m in axes[0]
        )  # fmt: skip

    def _shard(self, driving: int, block: _Span, place: tuple[_Span, _Span, _Span]) -> Shard:
        (number, numbers), (t, y, x) = block, place
        index = number * len(self.cubes) + driving
        first = index * self.member_block
        members = (first, first + numbers[1] - numbers[0])
        return Shard((index, t[0], y[0], x[0]), driving, numbers, members, (t[1], y[1], x[1]))

    def reach(self, shard: Shard) -> Box:
        """Coarse steps, rows and columns of the cube that the windows of a shard cover."""
        t, y, x = ((o, o + n) for o, n in zip(self.origin, self.cube.amount.shape, strict=True))
        return shifted(self.lattice.reach(self._absolute(shard.box), (t, y, x)), self.origin)

    def _absolute(self, box: Box) -> Box:
        t, y, x = self.origin
        return shifted(box, (-t, -y, -x))

    def windows(self, shard: Shard) -> list[Box]:
        """Windows of a shard in absolute coarse indices."""
        return self.lattice.covering(self._absolute(self.reach(shard)))

    def _amount(self, shard: Shard) -> NDArray[np.float32]:
        return self.cubes[shard.driving].amount

    def is_dry(self, shard: Shard) -> bool:
        """Whether no coarse cell of the shard holds any rain, so that it needs no network."""
        return self.recipe.conserve and not bool((self._amount(shard)[_slices(shard.box)] > 0).any())

    def _wet(self, shard: Shard, windows: list[Box]) -> list[Box]:
        """Those of the windows of a shard that need the networks."""
        if self.is_dry(shard):
            return []
        amount, always = self._amount(shard), not self.recipe.conserve
        return [w for w in windows if always or (amount[_slices(shifted(w, self.origin))] > 0).any()]

    @cached_property
    def _counts(self) -> dict[tuple[int, Box], tuple[int, int, int]]:
        """Wet windows, all windows, and fine cell-steps of wet ones, by place; all member blocks share them."""
        return {}

    def _count(self, shard: Shard) -> tuple[int, int, int]:
        if shard.place not in self._counts:
            windows = self.windows(shard)
            wet = self._wet(shard, windows)
            cells = sum((t[1] - t[0]) * (y[1] - y[0]) * (x[1] - x[0]) for t, y, x in wet)
            self._counts[shard.place] = len(wet), len(windows), cells * self.time * self.space**2
        return self._counts[shard.place]

    def _passes(self, shard: Shard) -> int:
        """Network evaluations that each wet window takes: one of the mean, those of the members."""
        return 1 + (shard.numbers[1] - shard.numbers[0]) * self.recipe.served.evaluations

    def evaluations(self, shard: Shard) -> int:
        """Network evaluations on wet windows that the shard takes, those of the mean included."""
        return self._count(shard)[0] * self._passes(shard)

    def cell_evaluations(self, shard: Shard) -> int:
        """Fine cell-steps of all those evaluations."""
        return self._count(shard)[2] * self._passes(shard)

    @property
    def skipped(self) -> float:
        """Share of all windows that need no network, because no rain falls in them."""
        wet, windows, _ = np.sum([self._count(shard) for shard in self.shards], axis=0)
        return float(1 - wet / windows)

    def task(self, shard: Shard) -> ShardTask:
        """Cut out what a worker needs to make a shard."""
        if shard.place not in self._last_place:  # members come fastest and share their place
            self._last_place.clear()
            self._last_place[shard.place] = self._place(shard)
        read, coarse, statics, place = self._last_place[shard.place]
        digest = place.copy()
        digest.update(json.dumps(shard.numbers).encode())
        shape, driving = self.cube.amount.shape, self.cubes[shard.driving].driving
        digest.update(driving.encode())
        return ShardTask(shard, self.recipe, self.origin, shape, read, coarse, driving, statics, digest.hexdigest())

    @cached_property
    def _last_place(self) -> dict[tuple[int, Box], _Place]:
        """What members share of the place that was asked for last."""
        return {}

    @cached_property
    def _identity(self) -> bytes:
        return json.dumps(self.recipe.identity(), sort_keys=True).encode()

    def _place(self, shard: Shard) -> _Place:
        read = grown(self.reach(shard), HALO)
        coarse = _padded(self._amount(shard), read)
        # Absolute places only: a longer period or a larger box changes no shard whose windows stay as they are.
        digest = hashlib.sha256(self._identity)
        digest.update(json.dumps([self._absolute(shard.box), self.windows(shard)]).encode())
        digest.update(np.ascontiguousarray(coarse, dtype="<f4").tobytes())
        statics = self._below(read)
        if statics is not None:
            digest.update(np.ascontiguousarray(statics, dtype="<f4").tobytes())
        return read, coarse, statics, digest

    def _below(self, read: Box) -> NDArray[np.float32] | None:
        """Static fields below the windows of what is read; these lie inside the cube, their halo may not."""
        if self.statics is None:
            return None
        y, x = (slice((a + HALO) * self.space, (b - HALO) * self.space) for a, b in read[1:])
        return self.statics[:, y, x]

    def tasks(self) -> Iterator[ShardTask]:
        """Yield the tasks one by one; each holds only its own part of the cube."""
        return (self.task(shard) for shard in self.shards)


def shifted(box: Box, by: tuple[int, int, int]) -> Box:
    """Box in indices that count from `by`."""
    (t0, t1), (y0, y1), (x0, x1) = box
    return (t0 - by[0], t1 - by[0]), (y0 - by[1], y1 - by[1]), (x0 - by[2], x1 - by[2])


def _slices(box: Box) -> tuple[slice, slice, slice]:
    t, y, x = box
    return slice(*t), slice(*y), slice(*x)


def grown(box: Box, by: int) -> Box:
    """Box with `by` cells and steps more on every side."""
    t, y, x = ((a - by, b + by) for a, b in box)
    return t, y, x


def _padded(amount: NDArray[np.float32], read: Box) -> NDArray[np.float32]:
    """Cut `read` out of the cube; indices outside it repeat the edge. Every NaN has the same bits, for digests."""
    indices = [np.clip(np.arange(a, b), 0, n - 1) for (a, b), n in zip(read, amount.shape, strict=True)]
    cut = amount[np.ix_(*indices)]
    cut[np.isnan(cut)] = np.nan
    return cut
