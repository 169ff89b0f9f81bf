"""Mass conservation: the function f, the scaling to coarse totals, and exact quantisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from stsr_core.errors import ClosureError, ShapeError

if TYPE_CHECKING:
    from stsr_core.factors import ConservationFunction, Factor

SMOOTH_PASSES = 14  # passes of the smooth gain; more change less than the members differ
RELAXATION = 1.8  # of a pass; 14 passes then do the work of 25, and with 2.2 they no longer converge
GAIN_PARTS = 4  # parts along a coarse cell, at least, whose amounts the smooth gain is found with
FILLING_PASSES = 3  # passes that hand what capped cells may not hold to the others of their block
CEILING_MM = 250.0  # per fine step; an hour of more has been measured a few times in the world
LARGEST_PASS = 3.0  # largest change of the logarithm of the gain in one pass ...
LARGEST_LOG_GAIN = 12.0  # ... and in all; the rest is left to the gain of each block
SLAB_CELLS = 2**17  # fine cell-steps that a CPU works on together
LIGHT_MM = 0.2  # mean amount per fine step below which f takes off less than its threshold, in proportion
LIFTED_SHARE = 0.4  # of the cells of a block that networks leave dry have rain, in one of its steps
TINY = torch.finfo(torch.float32).tiny
PARTS = 2**20  # of a quantum, in which the amounts of a block are added up before they are rounded to quanta


def _blocks(fine: Tensor, factor: Factor) -> Tensor:
    """View (..., T*t, Y*s, X*s) as (..., T, t, Y, s, X, s)."""
    s, t = factor.space, factor.time
    *lead, nt, ny, nx = fine.shape
    return fine.reshape(*lead, nt // t, t, ny // s, s, nx // s, s)


def _side_by_side(blocks: Tensor) -> Tensor:
    """View blocks (..., T, t, Y, s, X, s) with the cells of each side by side, (..., T, Y, X, t, s, s)."""
    return blocks.movedim((-5, -3, -1), (-3, -2, -1))


def _in_place(cells: Tensor) -> Tensor:
    """Inverse of `_side_by_side`."""
    return cells.movedim((-3, -2, -1), (-5, -3, -1))


def block_sums(fine: Tensor, factor: Factor) -> Tensor:
    """Sum (..., T*t, Y*s, X*s) over every coarse cell and step, (..., T, Y, X)."""
    return _blocks(fine, factor).sum(dim=(-5, -3, -1))


def _check(fine_shape: tuple[int, ...], coarse_shape: tuple[int, ...], factor: Factor) -> None:
    expected = tuple(n * f for n, f in zip(coarse_shape[-3:], (factor.time, factor.space, factor.space), strict=True))
    if tuple(fine_shape[-3:]) != expected:
        raise ShapeError(f"Fine {fine_shape} is not coarse {coarse_shape} refined by {factor}; {expected} is needed.")


@cache  # never freed: memory of one stream of a GPU would be used again while another reads it
def _interpolation(cells: int, parts: int, device: torch.device) -> Tensor:
    """Weights (cells * parts, cells) with which values at the centres of cells make those at the centres of parts.

    Made on the CPU, so that they are there for every stream of a GPU.
    """
    with torch.inference_mode(mode=False):  # training uses them too
        fine, coarse = (torch.arange(n, dtype=torch.float64) for n in (cells * parts, cells))
        at = ((fine + 0.5) / parts - 0.5).clamp(0, cells - 1)
        return (1 - (at[:, None] - coarse).abs()).clamp(min=0).float().to(device)


@dataclass(frozen=True)
class _Refinement:
    """Linear interpolation of (N, T, Y, X), axis by axis: a third of the time of torch's, and step by step in little
    memory. Axes that are not refined have no weights.

    Attributes:
        t: weights (T, t, T) along time.
        y: weights (Y*s, Y) along y.
        x: weights (X*s, X) along x.
    """

    t: Tensor | None
    y: Tensor | None
    x: Tensor | None

    @classmethod
    def of(cls, coarse: Tensor, factor: Factor) -> _Refinement:
        """That of fields shaped like `coarse`."""
        nt, ny, nx = coarse.shape[-3:]
        t, y, x = (
            _interpolation(n, parts, coarse.device) if parts > 1 else None
            for n, parts in ((nt, factor.time), (ny, factor.space), (nx, factor.space))
        )
        return cls(None if t is None else t.unflatten(0, (nt, factor.time)), y, x)

    def __call__(self, coarse: Tensor, steps: slice = slice(None)) -> Tensor:
        """Interpolate to (N, T*t, Y*s, X*s), of T only `steps`; always a new tensor."""
        with torch.autocast(coarse.device.type, enabled=False):
            if self.t is None:
                frames = coarse[:, steps].clone()
            else:
                frames = torch.einsum("ft,ntyx->nfyx", self.t[steps].flatten(0, 1), coarse)
            return frames if self.y is None or self.x is None else self.y @ frames @ self.x.T


def refined(coarse: Tensor, factor: Factor) -> Tensor:
    """Interpolate (N, T, Y, X) linearly to (N, T*t, Y*s, X*s); the edges are repeated."""
    return _Refinement.of(coarse, factor)(coarse)


def _filled(values: Tensor, known: Tensor) -> Tensor:
    """Replace unknown values of (N, T, Y, X) by the mean of known ones around them, by 0 where there are none."""
    weight = known.to(values.dtype)

    def around(x: Tensor) -> Tensor:
        return F.avg_pool3d(F.pad(x[:, None], (1, 1, 1, 1, 1, 1), mode="replicate"), 3, stride=1)[:, 0]

    mean = around(values * weight) / around(weight).clamp(min=1e-6)
    return torch.where(known, values, mean)


def _smooth_gain(blocks: Tensor, wanted: Tensor, factor: Factor) -> Tensor:
    """Logarithm of the gain that, interpolated and applied, brings blocks close to their coarse amounts.

    Ratios of wanted to found block amounts are interpolated, applied, and taken again, SMOOTH_PASSES times.

    Args:
        blocks: amount before, (N, T, t, Y, s, X, s), >= 0.
        wanted: coarse amount, (N, T, Y, X), >= 0, no NaN.
        factor: (s, t) of `blocks`.

    Returns:
        (N, T, Y, X).
    """
    log_gain, refine, parts = torch.zeros_like(wanted), _Refinement.of(wanted, factor), slabs(wanted, factor)
    for _ in range(SMOOTH_PASSES):
        totals = [_total(blocks[:, part] * _blocks(refine(log_gain, part).exp_(), factor), factor) for part in parts]
        found = torch.cat(totals, dim=1)[:, :, 0, :, 0, :, 0]
        known = (found > 0) & (wanted > 0)
        ratio = torch.where(known, wanted / found.clamp(min=TINY), 1.0).log().clamp(-LARGEST_PASS, LARGEST_PASS)
        log_gain.add_(_filled(ratio, known), alpha=RELAXATION).clamp_(-LARGEST_LOG_GAIN, LARGEST_LOG_GAIN)
    return log_gain


def _parts(fine: Tensor, factor: Factor) -> tuple[Tensor, Factor]:
    """Blocks of means over squares, as few along a coarse cell as GAIN_PARTS and s allow, and the factor of these."""
    s = factor.space
    cells = max(d for d in range(1, s + 1) if s % d == 0 and (d == 1 or s // d >= GAIN_PARTS))
    coarser = factor.model_copy(update={"space": s // cells})
    return _blocks(F.avg_pool2d(fine, cells) if cells > 1 else fine, coarser), coarser


def threshold(coarse: Tensor, factor: Factor, function: ConservationFunction, steps: slice = slice(None)) -> Tensor:
    """What f takes off fine amounts [mm per fine step], see `ConservationFunction`.

    Args:
        coarse: amount [mm per coarse step], (N, T, Y, X), no NaN.
        factor: (s, t).
        function: f.
        steps: those of T that it is wanted for.

    Returns:
        (N, T*t, Y*s, X*s) of the steps; smooth across borders of coarse cells, which would show otherwise.
    """
    share = (coarse / (factor.time * LIGHT_MM)).clamp(max=1.0)
    return _Refinement.of(coarse, factor)(share, steps).mul_(function.threshold_mm)


def _largest(wanted: Tensor, excess: float | None) -> Tensor:
    """Most that a cell of a block may hold [mm per fine step], (N, T, 1, Y, 1, X, 1), see `ConservationFunction`."""
    around = F.max_pool3d(wanted[:, None], 3, stride=1, padding=1)[:, 0]
    most = torch.full_like(around, CEILING_MM) if excess is None else around + excess * around.sqrt()
    return most.clamp(max=CEILING_MM)[:, :, None, :, None, :, None]


def conserve(fine: Tensor, coarse: Tensor, factor: Factor, function: ConservationFunction) -> Tensor:
    """Apply f and scale fine amounts so that every block returns its coarse amount.

    f takes its threshold off every amount, less in light rain. A block that f leaves dry but whose coarse cell is wet
    is lifted: it rains in the LIFTED_SHARE of its cells, shared among its steps, that were nearest to rain, the more
    the nearer they were; one without differences is filled evenly. A gain that is smooth across the borders of coarse
    cells brings all blocks close to their amounts, and one gain per block closes the rest, so that coarse cells do not
    show as squares. What a cell would hold above the taper of f, or above CEILING_MM with any f, goes to the other
    cells of its block in proportion, and to dry ones where these are full too.

    Args:
        fine: amount [mm per fine step], (..., T*t, Y*s, X*s), float32; below 0 a cell is dry, and the farther
            from rain the lower it is.
        coarse: amount [mm per coarse step], (..., T, Y, X), float32, >= 0 or NaN; leading dimensions
            broadcast against those of `fine`.
        factor: (s, t); cells of one block have equal area.
        function: f.

    Returns:
        Amount [mm per fine step], shaped like `fine`; summed over t and averaged over s x s it equals
        `coarse` to 1e-5 relative. A dry coarse cell gives a dry block, a NaN coarse cell a NaN block.

    Raises:
        ShapeError: `fine` is not `coarse` refined by `factor`.
        ClosureError: `fine` is not finite.

    Source: f of arXiv 2604.21903; the gain per block is the multiplicative constraint of Harder et al.,
    arXiv 2208.05424; smoothing it between blocks is ours.
    """
    _check(tuple(fine.shape), tuple(coarse.shape), factor)
    if not bool(torch.isfinite(fine).all()):
        raise ClosureError("Fine amounts to conserve are not finite; the network's output is damaged.")
    whole = fine.reshape(-1, *fine.shape[-3:])
    amount = coarse.expand(*fine.shape[:-3], *coarse.shape[-3:]).reshape(-1, *coarse.shape[-3:])
    known, wanted = amount.nan_to_num(), amount[:, :, None, :, None, :, None]
    most = _largest(known, function.excess)
    raw, result = _blocks(whole, factor), torch.empty_like(whole, memory_format=torch.contiguous_format)
    blocks, parts = _blocks(result, factor), slabs(amount, factor)
    for part in parts:
        taken = _blocks(threshold(known, factor, function, part), factor)
        blocks[:, part] = _shape(raw[:, part], taken, amount[:, part], most[:, part])
    parted, coarser = _parts(result, factor)  # the gain hardly differs from cell to cell
    log_gain, refine = _smooth_gain(parted, known, coarser), _Refinement.of(amount, factor)
    for part in parts:
        gain = _blocks(refine(log_gain, part).exp_(), factor)
        blocks[:, part] = _closed(blocks[:, part] * gain, wanted[:, part], most[:, part], factor)
    return result.reshape(fine.shape)


def slabs(coarse: Tensor, factor: Factor) -> list[slice]:
    """Coarse steps of (..., T, Y, X) that are worked on together.

    As many as the caches of a CPU hold, in little memory; all at once on a GPU, which would wait for every call.
    """
    steps = coarse.shape[-3]
    cells = coarse.numel() // steps * factor.space**2 * factor.time
    at_once = steps if coarse.is_cuda else max(1, SLAB_CELLS // cells)
    return [slice(first, first + at_once) for first in range(0, steps, at_once)]


def _total(blocks: Tensor, factor: Factor) -> Tensor:
    """Amount of every block [mm per coarse step], (..., T, 1, Y, 1, X, 1)."""
    return blocks.sum(dim=(-5, -3, -1), keepdim=True) / factor.space**2


def _shape(raw: Tensor, taken: Tensor, wanted: Tensor, most: Tensor) -> Tensor:
    """How the amounts of blocks (N, T, t, Y, s, X, s) are to be distributed: f of them, lifted where that is dry."""
    raw = torch.minimum(raw, torch.where(most > 0, most, math.inf))
    shape = (raw - taken).clamp(min=0.0)
    dry = (wanted > 0) & (shape.amax(dim=(-5, -3, -1)) <= 0)
    if bool(dry.any()):
        cells = _side_by_side(raw)[dry]
        lifted = _lifted(cells.flatten(1), round(LIFTED_SHARE / raw.shape[2] * cells[0].numel()))
        lifted *= wanted[dry][:, None] * cells[0, 0].numel()
        shape = _in_place(_side_by_side(shape).index_put((dry,), lifted.reshape(cells.shape)))
    return shape


def _lifted(cells: Tensor, count: int) -> Tensor:
    """What the `count` largest cells of each block (K, n), one at least, are above the largest of the others.

    Relative to its sum, (K, n); 0 in blocks without differences.
    """
    count = min(max(1, count), cells.shape[1] - 1)
    above = (cells - cells.topk(count + 1, dim=1).values[:, -1:]).clamp(min=0.0)
    return above / above.sum(dim=1, keepdim=True).clamp(min=TINY)


def _closed(smooth: Tensor, wanted: Tensor, most: Tensor, factor: Factor) -> Tensor:
    """Blocks scaled to their coarse amounts, no cell above the most that it may hold if that can be; NaN where NaN."""
    result = smooth * torch.nan_to_num(wanted / _total(smooth, factor), nan=0.0, posinf=0.0)
    for _ in range(FILLING_PASSES):
        held = torch.minimum(result, most)
        free = torch.where(held < most, held, 0.0)
        lacking = (wanted - _total(held, factor)).clamp(min=0.0)
        result = held + free * torch.nan_to_num(lacking / _total(free, factor), posinf=0.0)
    held = torch.minimum(result, most)
    room = most - held
    lacking = (wanted - _total(held, factor)).clamp(min=0.0)
    result = held + room * torch.nan_to_num(lacking / _total(room, factor), posinf=0.0)
    result = result * torch.nan_to_num(wanted / _total(result, factor), nan=0.0)  # second: removes float32 residue
    return torch.where(torch.isnan(wanted), torch.nan, result)


def wanted_quanta(coarse: Tensor, factor: Factor, quantum_mm: float) -> Tensor:
    """Quanta that the cells of each block sum to: rint(s * s * coarse / quantum), int64, 0 where NaN."""
    return (factor.space**2 * coarse.nan_to_num().double() / quantum_mm).round_().long()


def quantise(fine: Tensor, coarse: Tensor | None, factor: Factor, quantum_mm: float) -> Tensor:
    """Round fine amounts to whole quanta that sum exactly to the rounded coarse total of their block.

    Each cell is the difference of the rounded running sum inside its block, so no cell is off by more
    than one and a half quanta, and a dry cell stays dry. Sums are of integers: no device rounds them in another order.

    Args:
        fine: amount [mm per fine step], (..., T*t, Y*s, X*s), >= 0 or NaN.
        coarse: amount [mm per coarse step], (..., T, Y, X), that each block must sum to; None rounds
            towards the blocks' own totals.
        factor: (s, t).
        quantum_mm: storage quantum [mm].

    Returns:
        Quanta, int64, shaped like `fine`; -1 where `fine` is NaN, and in all of its block. With `coarse`, a block sums
        to `wanted_quanta`.

    Raises:
        ShapeError: `fine` is not `coarse` refined by `factor`.
    """
    if coarse is not None:
        _check(tuple(fine.shape), tuple(coarse.shape), factor)
    rows = _side_by_side(_blocks(fine, factor)).flatten(-3)
    missing = rows.isnan().any(dim=-1, keepdim=True)
    parts = (rows.nan_to_num() * (PARTS / quantum_mm)).double().round_().long()
    running = parts.cumsum_(dim=-1).double()
    scale = torch.full_like(running[..., -1:], 1 / PARTS)
    if coarse is not None:
        target = wanted_quanta(coarse, factor, quantum_mm).double()[..., None]
        total = running[..., -1:]
        scale = torch.where(total > 0, target / total.clamp(min=1), 0.0)
    whole = running.mul_(scale).round_().long()
    quanta = whole.diff(dim=-1, prepend=torch.zeros_like(whole[..., :1])).masked_fill_(missing, -1)
    return _in_place(quanta.unflatten(-1, (factor.time, factor.space, factor.space))).reshape(fine.shape)
