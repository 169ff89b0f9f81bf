"""Making one shard: windows denoised side by side and blended at every step, then conserved and quantised."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from stsr_core.conservation import CEILING_MM, block_sums, quantise, slabs, wanted_quanta
from stsr_core.diffusion import correlated
from stsr_core.ensemble.noise import lattice_noise, stream_of
from stsr_core.ensemble.plan import ShardTask, grown, shifted
from stsr_core.ensemble.sums import counts, sums
from stsr_core.ensemble.windows import Box, WindowLattice
from stsr_core.errors import StoreError
from stsr_core.grids import HALO
from stsr_core.store.layout import MISSING, QUANTUM_MM

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stsr_core.downscaler import Downscaler
    from stsr_core.ensemble.windows import Weights
    from stsr_core.factors import Factor
    from stsr_core.progress import Advance

GAIN_CELLS = 2  # coarse cells and steps around a shard, at least, on which the gain of conservation there depends


@dataclass(frozen=True)
class ShardResult:
    """A finished shard, ready to be written.

    Attributes:
        quanta: amount in quanta of 0.01 mm, (M, t, y, x), uint16, MISSING where the input is missing.
        closure_quanta: largest absolute difference between a block's sum and its rounded coarse total.
        evaluations: network evaluations on windows, those of the mean included.
        counts: counts and moments for the receipt, see `store.receipts.Receipt`.
        sums: sums for the receipt, see `store.statistics`.
    """

    quanta: NDArray[np.uint16]
    closure_quanta: int
    evaluations: int
    counts: dict[str, float]
    sums: dict[str, float]


@dataclass(frozen=True)
class _Window:
    """A wet window.

    Attributes:
        place: where it is in the block's fine fields.
        read: what it reads of the coarse ones.
        cut: fine rows and columns of it before these, which the block does not reach.
        taper: its blending weights along t, y and x.
    """

    place: tuple[slice, slice, slice]
    read: tuple[slice, slice, slice]
    cut: tuple[int, int]
    taper: tuple[Tensor, Tensor, Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        """Fine steps, rows and columns."""
        return tuple(map(len, self.taper))

    def weights(self) -> Tensor:
        """Blending weights (t, y, x); those of all windows together would take more memory than the fields."""
        t, y, x = self.taper
        return t[:, None, None] * y[:, None] * x


@dataclass(frozen=True)
class _Group:
    """Windows that go through a network together, and what they see.

    Attributes:
        windows: W of them, of one size.
        cut: fine rows and columns that were cut off before each of them.
        log_gain: makes the interpolation of their coarse amounts pycnophylactic, (W, T, Y, X).
        conditions: conditioning frames (W, T*t, C, Y*s, X*s); None where memory is dearer than making them anew for
            every network evaluation, which takes 1 % of its time on a CPU.
    """

    windows: Sequence[_Window]
    cut: tuple[int, int]
    log_gain: Tensor
    conditions: Tensor | None


class _Block:
    """The part of the domain that one shard computes: its windows, and the fields shared by all members."""

    def __init__(self, task: ShardTask, downscaler: Downscaler) -> None:
        self.task, self.downscaler = task, downscaler
        factor = downscaler.factor
        self.parts = _parts(factor)
        self.lattice = lattice = WindowLattice.of(downscaler.served.configuration)
        filled = fill_missing(task.coarse)
        self.coarse = torch.from_numpy(filled).to(downscaler.device)
        self.reach = reach = grown(task.read, -HALO)
        self.shape = tuple((b - a) * n for (a, b), n in zip(reach, self.parts, strict=True))
        t, y, x = task.origin
        absolute = shifted(reach, (-t, -y, -x))
        boxes = [shifted(box, task.origin) for box in lattice.covering(absolute)]
        tapers = self._placed(lattice.weights(absolute, self.parts))
        every = not task.recipe.conserve
        windows = [
            self._window(box, taper)
            for box, taper in zip(boxes, tapers, strict=True)
            if every or (task.coarse[_within(box, task.read)] > 0).any()
        ]
        self.statics = None if task.statics is None else torch.from_numpy(task.statics).to(downscaler.device)
        first, last = task.shard.numbers
        self.at_once = last - first if downscaler.batch_cells else 1
        self.groups = [self._group(alike) for alike in self._alike(windows)]
        self.evaluations = 0

    def _placed(self, weights: Sequence[Weights]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Put the weights of all windows on the device; most share theirs along an axis with others."""
        different = {id(axis): axis for taper in weights for axis in taper}
        placed = {key: torch.from_numpy(axis).to(self.downscaler.device) for key, axis in different.items()}
        return [(placed[id(t)], placed[id(y)], placed[id(x)]) for t, y, x in weights]

    def _window(self, box: Box, taper: tuple[Tensor, Tensor, Tensor]) -> _Window:
        t, y, x = self.task.origin
        rows, columns = self.lattice.cut(shifted(box, (-t, -y, -x)))
        cut = rows * self.parts[1], columns * self.parts[2]
        return _Window(_within(box, self.reach, self.parts), _within(grown(box, HALO), self.task.read), cut, taper)

    def _alike(self, windows: Sequence[_Window]) -> Iterator[Sequence[_Window]]:
        """Windows of one size and cut, as many as the device takes at once with all members that go side by side."""

        def kind(window: _Window) -> tuple[tuple[int, ...], tuple[int, int]]:
            return window.shape, window.cut

        for (shape, _), alike in groupby(sorted(windows, key=kind), key=kind):
            same, count = list(alike), max(1, self.downscaler.batch_cells // (self.at_once * math.prod(shape)))
            yield from (same[i : i + count] for i in range(0, len(same), count))

    def _group(self, windows: Sequence[_Window]) -> _Group:
        gain = self.downscaler.pycnophylactic_gain(_stacked(self.coarse, [w.read for w in windows]))
        group = _Group(windows, windows[0].cut, gain, None)
        return replace(group, conditions=self._conditions(group)) if self.downscaler.batch_cells else group

    def _conditions(self, group: _Group) -> Tensor:
        coarse = _stacked(self.coarse, [w.read for w in group.windows])
        below = [(slice(None), *w.place[1:]) for w in group.windows]
        statics = None if self.statics is None else _stacked(self.statics, below)
        return self.downscaler.condition(coarse, statics, group.log_gain)

    def conditions(self, group: _Group, members: int) -> Tensor:
        """Conditioning frames of a group, (W * members, ...), members fastest."""
        found = self._conditions(group) if group.conditions is None else group.conditions
        return found if members == 1 else found.repeat_interleave(members, dim=0)

    def blend(self, evaluate: Callable[[_Group], Tensor], members: int, progress: Advance) -> Tensor:
        """Evaluate every wet window and blend them; dry ones, where there is no mean nor residual, count as zeros.

        Args:
            evaluate: maps W windows of one size to (W * members, T, 1, H, W), members fastest.
            members: members side by side.
            progress: see `make_shard`.

        Returns:
            (members, T, H, W) of the block.
        """
        total = torch.zeros((members, *self.shape), device=self.downscaler.device)
        for group in self.groups:
            started = time.perf_counter()
            found = evaluate(group)
            progress(len(found), time.perf_counter() - started)
            self.evaluations += len(found)
            for window, part in zip(group.windows, found[:, :, 0].split(members), strict=True):
                total[:, *window.place].addcmul_(window.weights(), part)
        if total.is_cuda:  # waited for once: meanwhile the next windows were on their way to the device
            started = time.perf_counter()
            torch.cuda.current_stream().synchronize()
            progress(0, time.perf_counter() - started)
        return total

    def mean(self, progress: Advance) -> Tensor:
        """Transformed conditional mean of the whole block, (1, T, H, W)."""
        return self.blend(lambda group: self.downscaler.mean(self.conditions(group, 1), group.cut), 1, progress)

    def members(self, members: range, mean: Tensor, box: Box, progress: Advance) -> Tensor:
        """Amounts [mm per fine step] of members in a box, (M, t, y, x), below 0 where dry, before conservation."""
        noise, count = [self._noise(m)[None] for m in members], len(members)
        means = mean.expand(count, *self.shape)

        def denoise(noisy: Tensor, angle: float) -> Tensor:
            def expected(group: _Group) -> Tensor:
                places = [w.place for w in group.windows]
                noised, expectation = (_stacked(field, places).flatten(0, 1)[:, :, None] for field in (noisy, means))
                conditions = self.conditions(group, count)
                return self.downscaler.expected_residual(noised, angle, expectation, conditions, group.cut)

            return self.blend(expected, count, progress)

        residual = self.downscaler.residual(denoise, torch.cat(noise) if count > 1 else noise[0])
        inside = _within(box, self.reach, self.parts)
        return self.downscaler.amounts(mean[..., *inside], residual[..., *inside])

    def _noise(self, member: int) -> Tensor:
        """Noise of a member in the whole block, (T, H, W)."""
        recipe, (nt, ny, nx) = self.task.recipe, self.shape
        t, y, x = ((a + o) * n for (a, _), o, n in zip(self.reach, self.task.origin, self.parts, strict=True))
        correlation = recipe.served.configuration.correlation
        stream, device = stream_of(self.task.driving), self.downscaler.device
        if correlation.white:
            return lattice_noise(recipe.seed, member, (t, y, x), (nt, ny, nx), stream, device)
        around = (t - 2, y - 1, x - 1), (nt + 2, ny + 2, nx + 2)
        return correlated(lattice_noise(recipe.seed, member, *around, stream, device), correlation)

    def conserved(self) -> Box:
        """What conservation sees: the shard, the blend around it and GAIN_CELLS at least, so that gains meet there."""
        margins = [max(axis.overlap, GAIN_CELLS) for axis in self.lattice.axes]
        axes = zip(self.task.shard.box, self.reach, margins, strict=True)
        t, y, x = ((max(low, a - margin), min(high, b + margin)) for (a, b), (low, high), margin in axes)
        return t, y, x


def _within(box: Box, outer: Box, parts: tuple[int, int, int] = (1, 1, 1)) -> tuple[slice, slice, slice]:
    """Slices of a box in a field that covers `outer` with `parts` cells for each coarse one; both in coarse indices."""
    t, y, x = (slice((a - o) * n, (b - o) * n) for (a, b), (o, _), n in zip(box, outer, parts, strict=True))
    return t, y, x


def _stacked(field: Tensor, places: Sequence[tuple[slice, slice, slice]]) -> Tensor:
    """Cut W places out of the last three axes of a field, (..., T, Y, X) to (W, ..., t, y, x)."""
    return torch.stack([field[..., *place] for place in places])


def fill_missing(coarse: NDArray[np.float32]) -> NDArray[np.float32]:
    """Replace NaN by the nearest valid cell of the same step, by 0 where a step has none."""
    filled = coarse.copy()
    for step in filled:
        missing = np.isnan(step)
        if missing.all():
            step[:] = 0.0
        elif missing.any():
            nearest = ndimage.distance_transform_edt(missing, return_distances=False, return_indices=True)
            step[missing] = step[tuple(nearest)][missing]
    return filled


def make_shard(task: ShardTask, downscaler: Downscaler, progress: Advance = lambda _, __: None) -> ShardResult:
    """Make one shard.

    Deterministic: the same task gives the same bytes on one kind of device, whatever ran before.

    Args:
        task: what to make.
        downscaler: networks for the task's checkpoint and factor.
        progress: called with the number of network evaluations just done and the seconds they took.

    Raises:
        StoreError: an amount beyond what 16 bits hold at the storage quantum.
    """
    if task.recipe.conserve and not bool((_core(task) > 0).any()):
        return _dry(task)
    block = _Block(task, downscaler)
    mean, around = block.mean(progress), block.conserved()
    first, last = task.shard.numbers
    region = task.shard.region(downscaler.factor.space, downscaler.factor.time)
    stored = torch.empty([part.stop - part.start for part in region], dtype=torch.int16, device=mean.device)
    closure = 0
    for member in range(first, last, block.at_once):
        group = range(member, min(member + block.at_once, last))
        fine = _finished(block, block.members(group, mean, around, progress), around)
        closure = max(closure, _store(task, fine, stored[group.start - first : group.stop - first]))
    return _result(task, stored, closure, block.evaluations)


def _core(task: ShardTask) -> NDArray[np.float32]:
    """Coarse amounts of the shard itself."""
    return task.coarse[_within(task.shard.box, task.read)]


def _hole(task: ShardTask) -> NDArray[np.bool_]:
    """Fine cells and steps (t, y, x) of the shard whose input is missing."""
    hole = np.isnan(_core(task))
    for axis, parts in enumerate(_parts(task.recipe.served.configuration.factor)):
        hole = hole.repeat(parts, axis=axis)
    return hole


def _parts(factor: Factor) -> tuple[int, int, int]:
    return factor.time, factor.space, factor.space


def _dry(task: ShardTask) -> ShardResult:
    """A shard without rain: zeros, and what is missing in the input."""
    first, last = task.shard.numbers
    factor = task.recipe.served.configuration.factor
    quanta = np.repeat(np.where(_hole(task), np.uint16(MISSING), np.uint16(0))[None], last - first, axis=0)
    nothing = torch.zeros((1, *_parts(factor)))
    counted = counts([nothing]) | {"missing": int((quanta == MISSING).sum())}
    return ShardResult(quanta, 0, 0, counted, sums([nothing], factor))


def _result(task: ShardTask, stored: Tensor, closure: int, evaluations: int) -> ShardResult:
    """Count what a receipt says of quanta as `_store` leaves them, and bring them to the host."""
    factor = task.recipe.served.configuration.factor
    steps, rows = stored.shape[1:3] if stored.is_cuda else (1, factor.space)  # a CPU in little memory, see `slabs`
    counted = counts(_amounts(part) for part in stored.split(steps, dim=1))
    summed = sums((_amounts(part) for part in stored.split(rows, dim=2)), factor)
    if stored.is_cuda:
        stored = torch.empty_like(stored, device="cpu", pin_memory=True).copy_(stored)
    return ShardResult(stored.numpy().view(np.uint16), closure, evaluations, counted, summed)


def _amounts(stored: Tensor) -> Tensor:
    """Amounts [mm per fine step] of quanta as `_store` leaves them, NaN where missing."""
    quanta = stored.int() & MISSING
    return torch.where(quanta == MISSING, torch.nan, quanta.float() * QUANTUM_MM)


def _finished(block: _Block, fine: Tensor, around: Box) -> Tensor:
    """Conserve members in a box around the shard, or only keep them in 0..CEILING_MM, and cut the shard out of them."""
    task = block.task
    if task.recipe.conserve:
        coarse = torch.from_numpy(task.coarse[_within(around, task.read)]).to(fine.device)
        fine = block.downscaler.conserve(fine, coarse)
    else:
        fine = fine.clamp(0.0, CEILING_MM)
    return fine[..., *_within(task.shard.box, around, block.parts)]


def _store(task: ShardTask, fine: Tensor, stored: Tensor) -> int:
    """Quantise members (M, t, y, x) and return their largest closure.

    Args:
        task: what they belong to.
        fine: their amounts [mm per fine step].
        stored: takes their quanta, MISSING where the input is missing: 16 bits without a sign, as int16, for torch does
            little with uint16.
    """
    factor = task.recipe.served.configuration.factor
    coarse, hole = (torch.from_numpy(field).to(fine.device) for field in (_core(task), _hole(task)))
    closure = 0
    for part in slabs(coarse, factor):
        steps = slice(part.start * factor.time, part.stop * factor.time)
        quanta = quantise(fine[:, steps], coarse[part] if task.recipe.conserve else None, factor, QUANTUM_MM)
        most = int(quanta.max())
        if most >= MISSING:
            raise StoreError(
                f"Shard {task.shard.key} holds {most * QUANTUM_MM:.0f} mm in one fine cell and step; the store holds "
                f"up to {(MISSING - 1) * QUANTUM_MM:.2f} mm. Check the unit of the input."
            )
        absent = hole[steps] | (quanta < 0)
        off = block_sums(quanta.masked_fill(absent, 0), factor) - wanted_quanta(coarse[part], factor, QUANTUM_MM)
        closure = max(closure, int(off.abs().max()))
        stored[:, steps] = quanta.masked_fill_(absent, MISSING).to(torch.int16)
    return closure
