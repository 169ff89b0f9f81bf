"""Making one shard: windows denoised side by side and blended at every step, then conserved and quantised."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from stsr_core.conservation import quantise
from stsr_core.diffusion import sample
from stsr_core.ensemble.noise import lattice_noise
from stsr_core.ensemble.plan import HALO, Box, ShardTask, shard_windows, shifted
from stsr_core.ensemble.windows import WindowLattice
from stsr_core.errors import StoreError
from stsr_core.store.layout import MISSING, QUANTUM_MM

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stsr_core.downscaler import Downscaler

Progress = Callable[[int, float], None]  # network evaluations just done, and the seconds they took
WET_MM = 0.1  # amount per fine step above which a cell counts as wet


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

    def statistics(self) -> dict[str, float]:
        """Counts and moments for the receipt, see `store.receipts.Receipt`."""
        missing = self.quanta == MISSING
        amount = np.where(missing, 0, self.quanta) * QUANTUM_MM
        wet = amount > WET_MM
        rainy = amount[:, wet.any(axis=0)]
        spread = rainy.std(axis=0, ddof=1).mean() if len(amount) > 1 and rainy.size else 0.0
        return {
            "wet": int(wet.sum()),
            "missing": int(missing.sum()),
            "sum_mm": float(amount.sum()),
            "max_mm": float(amount.max(initial=0.0)),
            "rain_mm": float(rainy.mean()) if rainy.size else 0.0,
            "spread_mm": float(spread),
        }


@dataclass(frozen=True)
class _Window:
    """A wet window: its place in the block's fine fields, and its blending weights."""

    place: tuple[slice, slice, slice]
    taper: Tensor


class _Block:
    """The part of the domain that one shard computes: its windows, and the fields shared by all members."""

    def __init__(self, task: ShardTask, downscaler: Downscaler) -> None:
        self.task, self.downscaler = task, downscaler
        factor = downscaler.factor
        self.parts = (factor.time, factor.space, factor.space)
        lattice = WindowLattice.of(downscaler.served.configuration)
        boxes = [shifted(w, task.origin) for w in shard_windows(lattice, task.shard.box, task.origin, task.shape)]
        coarse = torch.from_numpy(fill_missing(task.coarse))
        self.coarse = coarse.to(downscaler.device)
        inner = tuple((a + HALO, b - HALO) for a, b in task.read)
        self.start = tuple(a for a, _ in inner)
        self.shape = tuple((b - a) * n for (a, b), n in zip(inner, self.parts, strict=True))
        self.windows = [self._window(box, lattice) for box in boxes if self._is_wet(box)]
        self.weight = torch.zeros(self.shape, device=downscaler.device)
        for window in self.windows:
            self.weight[window.place] += window.taper
        self.weight.clamp_(min=torch.finfo(torch.float32).tiny)
        statics = None if task.statics is None else torch.from_numpy(task.statics)[None]
        self.conditions = downscaler.condition(self.coarse[None], statics)
        self.evaluations = 0

    def _is_wet(self, box: Box) -> bool:
        if not self.task.recipe.conserve:
            return True
        local = tuple(slice(a - r[0], b - r[0]) for (a, b), r in zip(box, self.task.read, strict=True))
        return bool((self.coarse[local] > 0).any())

    def _window(self, box: Box, lattice: WindowLattice) -> _Window:
        t, y, x = (slice((a - s) * n, (b - s) * n) for (a, b), s, n in zip(box, self.start, self.parts, strict=True))
        taper = torch.from_numpy(lattice.taper(box, self.parts)).to(self.downscaler.device)
        return _Window((t, y, x), taper)

    def blend(self, evaluate: Callable[[_Window], Tensor], progress: Progress) -> Tensor:
        """Evaluate every wet window, (1, T, 1, H, W) each, and blend them; 0 where all windows are dry."""
        total = torch.zeros(self.shape, device=self.downscaler.device)
        for window in self.windows:
            started = time.perf_counter()
            found = evaluate(window)
            if found.is_cuda:
                torch.cuda.synchronize()
            progress(1, time.perf_counter() - started)
            total[window.place] += window.taper * found[0, :, 0]
            self.evaluations += 1
        return total / self.weight

    def window_conditions(self, window: _Window) -> Tensor:
        t, y, x = window.place
        return self.conditions[:, t, :, y, x]

    def mean(self, progress: Progress) -> Tensor:
        return self.blend(lambda w: self.downscaler.mean(self.window_conditions(w)), progress)

    def member(self, member: int, mean: Tensor, progress: Progress) -> Tensor:
        """Amounts [mm per fine step] of one member in the whole block, before conservation."""
        start = tuple((s + o) * n for s, o, n in zip(self.start, self.task.origin, self.parts, strict=True))
        noise = lattice_noise(self.task.recipe.seed, member, start, self.shape)  # type: ignore[arg-type]

        def denoise(noisy: Tensor, angle: float) -> Tensor:
            def expected(window: _Window) -> Tensor:
                return self.downscaler.expected_residual(
                    noisy[window.place][None, :, None],
                    angle,
                    mean[window.place][None, :, None],
                    self.window_conditions(window),
                )

            return self.blend(expected, progress)

        residual = sample(denoise, torch.from_numpy(noise).to(mean.device), self.downscaler.angles())
        return self.downscaler.amounts(mean, residual)

    def cut(self, fine: Tensor, box: Box) -> Tensor:
        """Cut a box (coarse indices of the cube) out of a fine field of the block."""
        t, y, x = (slice((a - s) * n, (b - s) * n) for (a, b), s, n in zip(box, self.start, self.parts, strict=True))
        return fine[t, y, x]


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


def make_shard(task: ShardTask, downscaler: Downscaler, progress: Progress = lambda _, __: None) -> ShardResult:
    """Make one shard.

    Deterministic: the same task gives the same bytes on one kind of device, whatever ran before.

    Args:
        task: what to make.
        downscaler: networks for the task's checkpoint and factor.
        progress: called with the number of network evaluations just done and the seconds they took.

    Raises:
        StoreError: an amount beyond what 16 bits hold at the storage quantum.
    """
    first, last = task.shard.members
    core = task.coarse[_inside(task.shard.box, task.read)]
    block = None
    if not task.recipe.conserve or bool((core > 0).any()):
        block = _Block(task, downscaler)
        mean = block.mean(progress)
    members = []
    for member in range(first, last):
        if block is None:
            fine = np.zeros([n * p for n, p in zip(core.shape, _parts(downscaler), strict=True)], np.float32)
        else:
            fine = _finished(block, block.member(member, mean, progress))
        members.append(_stored(fine, core, task, downscaler))
    quanta = np.stack(members)
    return ShardResult(quanta, _closure(quanta, core, downscaler), block.evaluations if block else 0)


def _inside(box: Box, read: Box) -> tuple[slice, ...]:
    """Slices of a box in what was read."""
    return tuple(slice(a - r[0], b - r[0]) for (a, b), r in zip(box, read, strict=True))


def _parts(downscaler: Downscaler) -> tuple[int, int, int]:
    factor = downscaler.factor
    return factor.time, factor.space, factor.space


def _finished(block: _Block, fine: Tensor) -> NDArray[np.float32]:
    """Conserve a member and cut the shard out of it.

    Conservation sees the blend around the shard, so that its gain passes smoothly into the neighbour's.
    """
    task, downscaler = block.task, block.downscaler
    box = task.shard.box
    if not task.recipe.conserve:
        return block.cut(fine, box).cpu().numpy()
    lattice = WindowLattice.of(downscaler.served.configuration)
    overlaps = (lattice.time.overlap, lattice.space.overlap, lattice.space.overlap)
    t, y, x = ((max(0, a - o), min(n, b + o)) for (a, b), o, n in zip(box, overlaps, task.shape, strict=True))
    around = (t, y, x)
    coarse = torch.from_numpy(task.coarse[_inside(around, task.read)]).to(fine.device)
    closed = downscaler.conserve(block.cut(fine, around), coarse)
    inner = tuple(
        slice((a - low) * n, (b - low) * n) for (a, b), (low, _), n in zip(box, around, block.parts, strict=True)
    )
    return closed[inner].cpu().numpy()


def _stored(
    fine: NDArray[np.float32], coarse: NDArray[np.float32], task: ShardTask, downscaler: Downscaler
) -> NDArray[np.uint16]:
    """Quantise one member, and mark what is missing in the input."""
    quanta = quantise(fine, coarse if task.recipe.conserve else None, downscaler.factor, QUANTUM_MM)
    most = int(quanta.max(initial=0))
    if most >= MISSING:
        raise StoreError(
            f"Shard {task.shard.key} holds {most * QUANTUM_MM:.0f} mm in one fine cell and step; the store holds up "
            f"to {(MISSING - 1) * QUANTUM_MM:.2f} mm. Check the unit of the input."
        )
    hole = np.isnan(coarse)
    for axis, parts in enumerate(_parts(downscaler)):
        hole = hole.repeat(parts, axis=axis)
    return np.where(hole | (quanta < 0), MISSING, quanta).astype(np.uint16)


def _closure(quanta: NDArray[np.uint16], coarse: NDArray[np.float32], downscaler: Downscaler) -> int:
    factor = downscaler.factor
    amount = np.where(quanta == MISSING, 0, quanta).astype(np.float64)
    s, t = factor.space, factor.time
    m, nt, ny, nx = amount.shape
    sums = amount.reshape(m, nt // t, t, ny // s, s, nx // s, s).sum(axis=(2, 4, 6))
    wanted = np.rint(s * s * np.nan_to_num(coarse).astype(np.float64) / QUANTUM_MM)
    return int(np.abs(sums - wanted).max(initial=0))
