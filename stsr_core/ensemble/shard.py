"""Making one shard: windows denoised side by side and blended at every step, then conserved and quantised."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from stsr_core.conservation import quantise
from stsr_core.diffusion import sample
from stsr_core.ensemble.noise import lattice_noise, stream_of
from stsr_core.ensemble.plan import HALO, ShardTask, grown, shifted
from stsr_core.ensemble.windows import Box, WindowLattice
from stsr_core.errors import StoreError
from stsr_core.store.layout import MISSING, QUANTUM_MM
from stsr_core.store.statistics import WET_MM, sums

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stsr_core.downscaler import Downscaler
    from stsr_core.ensemble.windows import Weights
    from stsr_core.factors import Factor

Progress = Callable[[int, float], None]  # network evaluations just done, and the seconds they took


@dataclass(frozen=True)
class ShardResult:
    """A finished shard, ready to be written.

    Attributes:
        quanta: amount in quanta of 0.01 mm, (M, t, y, x), uint16, MISSING where the input is missing.
        closure_quanta: largest absolute difference between a block's sum and its rounded coarse total.
        evaluations: network evaluations on windows, those of the mean included.
    """

    quanta: NDArray[np.uint16]
    closure_quanta: int
    evaluations: int

    def counts(self) -> dict[str, float]:
        """Counts and moments for the receipt, see `store.receipts.Receipt`."""
        missing = self.quanta == MISSING
        amount = np.where(missing, np.uint16(0), self.quanta) * np.float32(QUANTUM_MM)
        wet = amount > WET_MM
        rainy = amount[:, wet.any(axis=0)]
        spread = rainy.std(axis=0, ddof=1).mean() if len(amount) > 1 and rainy.size else 0.0
        return {
            "wet": int(wet.sum()),
            "missing": int(missing.sum()),
            "sum_mm": float(amount.sum(dtype=np.float64)),
            "max_mm": float(amount.max(initial=0.0)),
            "rain_mm": float(rainy.mean(dtype=np.float64)) if rainy.size else 0.0,
            "spread_mm": float(spread),
        }

    def sums(self, factor: Factor) -> dict[str, float]:
        """Sums for the receipt, see `store.statistics.sums`."""
        amount = np.where(self.quanta == MISSING, np.float32(np.nan), self.quanta * np.float32(QUANTUM_MM))
        return sums(amount, factor)


@dataclass(frozen=True)
class Fields:
    """What the device makes of a shard: amounts that are conserved, but not stored yet.

    Attributes:
        fine: amount [mm per fine step], (M, t, y, x), float32.
        evaluations: network evaluations on windows, those of the mean included.
    """

    fine: NDArray[np.float32]
    evaluations: int


@dataclass(frozen=True)
class _Window:
    """A wet window: its place in the block's fine fields, what it reads of the coarse ones, the gain that makes their
    interpolation pycnophylactic, and its blending weights."""

    place: tuple[slice, slice, slice]
    read: tuple[slice, slice, slice]
    log_gain: Tensor
    taper: tuple[Tensor, Tensor, Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        """Fine steps, rows and columns."""
        return tuple(map(len, self.taper))

    def weights(self) -> Tensor:
        """Blending weights (t, y, x); those of all windows together would take more memory than the fields."""
        t, y, x = self.taper
        return t[:, None, None] * y[:, None] * x


class _Block:
    """The part of the domain that one shard computes: its windows, and the fields shared by all members."""

    def __init__(self, task: ShardTask, downscaler: Downscaler) -> None:
        self.task, self.downscaler = task, downscaler
        factor = downscaler.factor
        self.parts = (factor.time, factor.space, factor.space)
        self.lattice = lattice = WindowLattice.of(downscaler.served.configuration)
        coarse = torch.from_numpy(fill_missing(task.coarse))
        self.coarse = coarse.to(downscaler.device)
        reach = grown(task.read, -HALO)
        self.start = tuple(a for a, _ in reach)
        self.shape = tuple((b - a) * n for (a, b), n in zip(reach, self.parts, strict=True))
        t, y, x = task.origin
        absolute = shifted(reach, (-t, -y, -x))
        boxes = [shifted(box, task.origin) for box in lattice.covering(absolute)]
        tapers = lattice.weights(absolute, self.parts)
        windows = [self._window(box, taper) for box, taper in zip(boxes, tapers, strict=True) if self._is_wet(box)]
        self.windows = sorted(windows, key=lambda w: w.shape)  # those of one size side by side, see `groups`
        self.statics = None if task.statics is None else torch.from_numpy(task.statics).to(downscaler.device)
        self.evaluations = 0

    def _is_wet(self, box: Box) -> bool:
        if not self.task.recipe.conserve:
            return True
        local = tuple(slice(a - r[0], b - r[0]) for (a, b), r in zip(box, self.task.read, strict=True))
        return bool((self.coarse[local] > 0).any())

    def _window(self, box: Box, weights: Weights) -> _Window:
        t, y, x = (slice((a - s) * n, (b - s) * n) for (a, b), s, n in zip(box, self.start, self.parts, strict=True))
        rt, ry, rx = (slice(a - s, b - s + 2 * HALO) for (a, b), s in zip(box, self.start, strict=True))
        gain = self.downscaler.pycnophylactic_gain(self.coarse[rt, ry, rx][None])
        wt, wy, wx = (torch.from_numpy(axis).to(self.downscaler.device) for axis in weights)
        return _Window((t, y, x), (rt, ry, rx), gain, (wt, wy, wx))

    def groups(self, members: int) -> Iterator[Sequence[_Window]]:
        """Windows of one size, as many as the device takes at once."""
        for shape, alike in groupby(self.windows, key=lambda w: w.shape):
            windows, count = list(alike), max(1, self.downscaler.batch_cells // (members * math.prod(shape)))
            yield from (windows[i : i + count] for i in range(0, len(windows), count))

    def blend(self, evaluate: Callable[[Sequence[_Window]], Tensor], members: int, progress: Progress) -> Tensor:
        """Evaluate every wet window and blend them; dry ones, where there is no mean nor residual, count as zeros.

        Args:
            evaluate: maps W windows of one size to (W * members, T, 1, H, W), members fastest.
            members: members side by side.
            progress: see `make_shard`.

        Returns:
            (members, T, H, W) of the block.
        """
        total = torch.zeros((members, *self.shape), device=self.downscaler.device)
        for windows in self.groups(members):
            started = time.perf_counter()
            found = evaluate(windows)
            progress(len(found), time.perf_counter() - started)
            self.evaluations += len(found)
            for window, part in zip(windows, found[:, :, 0].split(members), strict=True):
                total[:, *window.place] += window.weights() * part
        if total.is_cuda:  # waited for once: meanwhile the next windows were on their way to the device
            started = time.perf_counter()
            torch.cuda.synchronize()
            progress(0, time.perf_counter() - started)
        return total

    def window_conditions(self, windows: Sequence[_Window], members: int) -> Tensor:
        """Conditioning frames, made anew each time: held for the whole block they would be most of its memory.

        Making them takes 1 % of the time of a network evaluation on a CPU.
        """
        parts = [self._conditions(window) for window in windows]
        return _stacked([part.expand(members, *part.shape[1:]) for part in parts])

    def _conditions(self, window: _Window) -> Tensor:
        _, y, x = window.place
        statics = None if self.statics is None else self.statics[None, :, y, x]
        return self.downscaler.condition(self.coarse[window.read][None], statics, window.log_gain)

    def mean(self, progress: Progress) -> Tensor:
        """Transformed conditional mean of the whole block, (1, T, H, W)."""
        return self.blend(lambda windows: self.downscaler.mean(self.window_conditions(windows, 1)), 1, progress)

    def members(self, members: range, mean: Tensor, box: Box, progress: Progress) -> Tensor:
        """Amounts [mm per fine step] of members in a box, (M, t, y, x), before conservation."""
        start = tuple((s + o) * n for s, o, n in zip(self.start, self.task.origin, self.parts, strict=True))
        seed, stream, count = self.task.recipe.seed, stream_of(self.task.driving), len(members)
        noise = np.stack([lattice_noise(seed, m, start, self.shape, stream) for m in members])  # type: ignore[arg-type]
        means = mean.expand(count, *self.shape)

        def denoise(noisy: Tensor, angle: float) -> Tensor:
            def expected(windows: Sequence[_Window]) -> Tensor:
                cut = [_stacked([field[:, *w.place] for w in windows])[:, :, None] for field in (noisy, means)]
                return self.downscaler.expected_residual(cut[0], angle, cut[1], self.window_conditions(windows, count))

            return self.blend(expected, count, progress)

        residual = sample(denoise, torch.from_numpy(noise).to(mean.device), self.downscaler.angles())
        return self.downscaler.amounts(self.cut(mean, box), self.cut(residual, box))

    def conserved(self) -> Box:
        """What conservation sees: the shard with the blend around it, where its gain passes into the neighbour's."""
        axes = zip(self.lattice.axes, self.task.shard.box, self.task.shape, strict=True)
        t, y, x = ((max(0, a - axis.overlap), min(n, b + axis.overlap)) for axis, (a, b), n in axes)
        return t, y, x

    def cut(self, fine: Tensor, box: Box) -> Tensor:
        """Cut a box (coarse indices of the cube) out of fine fields of the block."""
        t, y, x = (slice((a - s) * n, (b - s) * n) for (a, b), s, n in zip(box, self.start, self.parts, strict=True))
        return fine[..., t, y, x]


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first axis; one alone is not copied."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


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


def make_shard(task: ShardTask, downscaler: Downscaler) -> ShardResult:
    """Make one shard, see `compute_fields` and `quantised`."""
    return quantised(task, compute_fields(task, downscaler))


def compute_fields(task: ShardTask, downscaler: Downscaler, progress: Progress = lambda _, __: None) -> Fields:
    """Make the amounts of one shard: all that needs the device.

    Deterministic: the same task gives the same bytes on one kind of device, whatever ran before.

    Args:
        task: what to make.
        downscaler: networks for the task's checkpoint and factor.
        progress: called with the number of network evaluations just done and the seconds they took.
    """
    first, last = task.shard.numbers
    shape = [(b - a) * n for (a, b), n in zip(task.shard.box, _parts(downscaler.factor), strict=True)]
    fine = np.zeros((last - first, *shape), np.float32)
    if task.recipe.conserve and not bool((_core(task) > 0).any()):
        return Fields(fine, 0)
    block = _Block(task, downscaler)
    mean, around = block.mean(progress), block.conserved()
    at_once = last - first if downscaler.batch_cells else 1
    for member in range(first, last, at_once):
        group = range(member, min(member + at_once, last))
        fine[member - first :][: len(group)] = _finished(block, block.members(group, mean, around, progress), around)
    return Fields(fine, block.evaluations)


def quantised(task: ShardTask, fields: Fields) -> ShardResult:
    """Round the amounts of a shard to what is stored; needs no device.

    Raises:
        StoreError: an amount beyond what 16 bits hold at the storage quantum.
    """
    quanta = np.stack([_stored(member, task) for member in fields.fine])
    return ShardResult(quanta, _closure(quanta, task), fields.evaluations)


def _core(task: ShardTask) -> NDArray[np.float32]:
    """Coarse amounts of the shard itself."""
    return task.coarse[_inside(task.shard.box, task.read)]


def _inside(box: Box, read: Box) -> tuple[slice, ...]:
    """Slices of a box in what was read."""
    return tuple(slice(a - r[0], b - r[0]) for (a, b), r in zip(box, read, strict=True))


def _parts(factor: Factor) -> tuple[int, int, int]:
    return factor.time, factor.space, factor.space


def _finished(block: _Block, fine: Tensor, around: Box) -> NDArray[np.float32]:
    """Conserve members in a box around the shard, and cut the shard out of them."""
    task = block.task
    if task.recipe.conserve:
        coarse = torch.from_numpy(task.coarse[_inside(around, task.read)]).to(fine.device)
        fine = block.downscaler.conserve(fine, coarse)
    axes = zip(task.shard.box, around, block.parts, strict=True)
    t, y, x = (slice((a - low) * n, (b - low) * n) for (a, b), (low, _), n in axes)
    return fine[..., t, y, x].cpu().numpy()


def _stored(fine: NDArray[np.float32], task: ShardTask) -> NDArray[np.uint16]:
    """Quantise one member, and mark what is missing in the input."""
    coarse, factor = _core(task), task.recipe.served.configuration.factor
    quanta = quantise(fine, coarse if task.recipe.conserve else None, factor, QUANTUM_MM)
    most = int(quanta.max(initial=0))
    if most >= MISSING:
        raise StoreError(
            f"Shard {task.shard.key} holds {most * QUANTUM_MM:.0f} mm in one fine cell and step; the store holds up "
            f"to {(MISSING - 1) * QUANTUM_MM:.2f} mm. Check the unit of the input."
        )
    hole = np.isnan(coarse)
    for axis, parts in enumerate(_parts(factor)):
        hole = hole.repeat(parts, axis=axis)
    return np.where(hole | (quanta < 0), MISSING, quanta).astype(np.uint16)


def _closure(quanta: NDArray[np.uint16], task: ShardTask) -> int:
    coarse, factor = _core(task), task.recipe.served.configuration.factor
    amount = np.where(quanta == MISSING, 0, quanta).astype(np.float64)
    s, t = factor.space, factor.time
    m, nt, ny, nx = amount.shape
    sums = amount.reshape(m, nt // t, t, ny // s, s, nx // s, s).sum(axis=(2, 4, 6))
    wanted = np.rint(s * s * np.nan_to_num(coarse).astype(np.float64) / QUANTUM_MM)
    return int(np.abs(sums - wanted).max(initial=0))
