"""The generator of `noise` as one kernel for GPUs, which torch's own calls keep waiting: 120 of them for a member."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from stsr_core.ensemble.noise import LANES, MULTIPLIERS, ROUNDS, WEYL

BLOCK = 1024  # counters that a program of four warps takes
FIRST, SECOND, STEP, OTHER_STEP = (tl.constexpr(word) for word in (*MULTIPLIERS, *WEYL))
TURN = tl.constexpr(2 * math.pi / 2**32)


@triton.jit
def _normal(a, b):
    radius = tl.sqrt(-2 * tl.log((a.to(tl.float32) + 0.5) / 4294967296.0))
    angle = b.to(tl.float32) * TURN
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit(do_not_specialize=["key", "other_key", "member", "t0", "y0", "x0", "Y", "X", "number"])
def _noise_kernel(out, key, other_key, member, t0, y0, x0, Y, X, number, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b, c = (i % X + x0).to(tl.uint32), (i // X % Y + y0).to(tl.uint32), (i // X // Y + t0).to(tl.uint32)
    d = (tl.zeros((BLOCK,), tl.int32) + member).to(tl.uint32)
    k, m = (tl.zeros((BLOCK,), tl.int32) + key).to(tl.uint32), (tl.zeros((BLOCK,), tl.int32) + other_key).to(tl.uint32)
    first = tl.full((BLOCK,), FIRST, tl.uint32)
    second = tl.full((BLOCK,), SECOND, tl.uint32)
    for _ in tl.static_range(ROUNDS):
        a, b, c, d = tl.umulhi(second, c) ^ b ^ k, second * c, tl.umulhi(first, a) ^ d ^ m, first * a
        k += tl.full((BLOCK,), STEP, tl.uint32)
        m += tl.full((BLOCK,), OTHER_STEP, tl.uint32)
    n0, n1 = _normal(a, b)
    n2, n3 = _normal(c, d)
    values = tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
    place = tl.program_id(0).to(tl.int64) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(out + place, values, mask=place < 4 * number.to(tl.int64))


def noise(
    key: tuple[int, int], member: int, start: tuple[int, int, int], shape: tuple[int, int, int], device: torch.device
) -> Tensor:
    """Standard normal noise for a box of counters, see `noise.lattice_noise`.

    Args:
        key: two words of 32 bits.
        member: last word of the counters.
        start: first step, row and group of LANES columns; the other words.
        shape: their number, (T, Y, G).
        device: where to make it.

    Returns:
        (T, Y, G, LANES), float32.
    """
    out = torch.empty((*shape, LANES), device=device)
    signed = [word - (word >> 31 << 32) for word in key]  # or the kernel was translated anew for large ones
    number = out.numel() // LANES
    _noise_kernel[-(-number // BLOCK),](out, *signed, member, *start, *shape[1:], number, BLOCK=BLOCK, ROUNDS=ROUNDS)
    return out
