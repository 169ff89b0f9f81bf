"""What `between` and `attention` do, as kernels for GPUs: one read and one write of memory each, at inference.

Written for Triton, by which torch comes with CUDA. Fields are (N, C, H, W) in channels-last memory; a program works on
some pixels and all of their channels, in single precision, and rounds what it stores. Nothing is translated anew for
windows of another size, only for another number of channels, in a second.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

ELEMENTS = 4096  # that a program of four warps works on
SIZES = ["H", "W", "pixels"]  # that no kernel is translated anew for


def _over(a: int, b: int) -> int:
    """Divide and round up; Triton's own takes ten times as long, eighty times for a network."""
    return -(-a // b)


def _padded(n: int) -> int:
    """The power of two that holds n."""
    return 1 << (n - 1).bit_length()


@triton.jit
def _reflected(i, n):
    """Index of what is mirrored at both ends, without repeating them."""
    i = tl.abs(i)
    return n - 1 - tl.abs(n - 1 - i)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit(do_not_specialize=SIZES)
def _pixels_kernel(
    x, out, bias, scale, shift, H, W, pixels, ROW: tl.constexpr, C: tl.constexpr, PADDED: tl.constexpr,
    MIRROR: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, MODULATE: tl.constexpr, SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows, columns = H + 2 * MIRROR, W + 2 * MIRROR
    n, row, column = pixel // (rows * columns), pixel // columns % rows, pixel % columns
    source = (n * H + _reflected(row - MIRROR, H)) * W + _reflected(column - MIRROR, W)
    c = tl.arange(0, PADDED)[None, :]
    there = (pixel < pixels)[:, None] & (c < C)
    v = tl.load(x + source.to(tl.int64)[:, None] * C + c, mask=there, other=0).to(tl.float32)
    if BIAS:
        v += tl.load(bias + c, mask=c < C, other=0).to(tl.float32)
    if NORM:
        v = tl.where(c < C, v - (tl.sum(v, 1) / C)[:, None], 0)
        v *= tl.rsqrt(tl.sum(v * v, 1) / C + 1e-4)[:, None]
    if MODULATE:
        of_frame = n[:, None] * ROW + c
        v = v * (1 + tl.load(scale + of_frame, mask=there, other=0).to(tl.float32))
        v += tl.load(shift + of_frame, mask=there, other=0).to(tl.float32)
    if SILU:
        v *= _sigmoid(v)
    tl.store(out + pixel.to(tl.int64)[:, None] * C + c, v.to(out.dtype.element_ty), mask=there)


def pixels(
    x: Tensor,
    *,
    mirror: bool,
    norm: bool,
    silu: bool,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Change pixels, one by one, and mirror the field at its borders; see `between` for what is made of this.

    Args:
        x: field, (N, C, H, W).
        mirror: grow it by one cell on every side.
        norm: normalise the channels of a pixel.
        silu: apply it, last.
        bias: added first, (C,).
        scale: multiplies what is normalised by 1 more than this, (N, C).
        shift: added to that, (N, C).

    Returns:
        (N, C, H + 2, W + 2), or without `mirror` (N, C, H, W).
    """
    n, c, h, w = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    size = (n, c, h + 2 * mirror, w + 2 * mirror)
    out = torch.empty(size, device=x.device, dtype=x.dtype, memory_format=torch.channels_last)
    number, padded = out.numel() // c, _padded(c)
    block = max(1, ELEMENTS // padded)
    none = x  # a pointer that is not followed
    _pixels_kernel[_over(number, block),](
        x, out, none if bias is None else bias, none if scale is None else scale, none if shift is None else shift,
        h, w, number, ROW=0 if scale is None else scale.stride(0), C=c, PADDED=padded, MIRROR=int(mirror),
        BIAS=bias is not None, NORM=norm, MODULATE=scale is not None, SILU=silu, BLOCK=block,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=SIZES)
def _added_kernel(
    x, bias, skipped, out, H, W, pixels, C: tl.constexpr, PADDED: tl.constexpr, TIMES: tl.constexpr, BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = pixel
    if TIMES > 1:
        source = (pixel // W // TIMES) * (W // TIMES) + pixel % W // TIMES  # H is a multiple of TIMES
    c = tl.arange(0, PADDED)[None, :]
    there = (pixel < pixels)[:, None] & (c < C)
    place = pixel.to(tl.int64)[:, None] * C + c
    v = tl.load(skipped + place, mask=there, other=0).to(tl.float32)
    v += tl.load(x + source.to(tl.int64)[:, None] * C + c, mask=there, other=0).to(tl.float32)
    if BIAS:
        v += tl.load(bias + c, mask=c < C, other=0).to(tl.float32)
    tl.store(out + place, v.to(out.dtype.element_ty), mask=there)


def added(x: Tensor, bias: Tensor | None, skipped: Tensor) -> Tensor:
    """Add a field with its bias (C,) to one of the same or twice the size, whose cells then lie in those of `x`.

    Args:
        x: (N, C, H, W).
        bias: (C,).
        skipped: (N, C, k*H, k*W) with k 1 or 2.

    Returns:
        Their sum, shaped like `skipped`.
    """
    x, skipped = (field.contiguous(memory_format=torch.channels_last) for field in (x, skipped))
    out, (_, c, h, w) = torch.empty_like(skipped), skipped.shape
    number, padded = out.numel() // c, _padded(c)
    block = max(1, ELEMENTS // padded)
    _added_kernel[_over(number, block),](
        x, x if bias is None else bias, skipped, out, h, w, number, C=c, PADDED=padded, TIMES=h // x.shape[2],
        BIAS=bias is not None, BLOCK=block,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=SIZES)
def _unshuffled_kernel(
    x, out, H, W, pixels, C: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr, PATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows, columns = H + 2, W + 2
    n, row, column = pixel // (rows * columns), pixel // columns % rows, pixel % columns
    row, column = _reflected(row - 1, H), _reflected(column - 1, W)
    k = tl.arange(0, PADDED)[None, :]
    plane, inside = k // (PATCH * PATCH), k % (PATCH * PATCH)
    here = (pixel < pixels)[:, None]
    y, z = row[:, None] * PATCH + inside // PATCH, column[:, None] * PATCH + inside % PATCH
    source = ((n.to(tl.int64)[:, None] * C + plane) * (H * PATCH) + y) * (W * PATCH) + z
    v = tl.load(x + source, mask=here & (plane < C), other=0)
    place = pixel.to(tl.int64)[:, None] * CHANNELS + k
    tl.store(out + place, v.to(out.dtype.element_ty), mask=here & (k < CHANNELS))


def unshuffled(x: Tensor, precision: torch.dtype, patch: int) -> Tensor:
    """Lay the cells of patches side by side as channels, mirrored at the borders.

    Args:
        x: (N, C, patch*H, patch*W), contiguous.
        precision: that the convolution computes in.
        patch: cells of a patch along y and x.

    Returns:
        (N, C', H + 2, W + 2) in channels-last memory; C' is C * patch^2 and zeros up to a multiple of 8, which tensor
        cores work on.
    """
    n, c, h, w = x.shape[0], x.shape[1], x.shape[2] // patch, x.shape[3] // patch
    channels = _over(c * patch**2, 8) * 8
    size = (n, channels, h + 2, w + 2)
    out = torch.empty(size, device=x.device, dtype=precision, memory_format=torch.channels_last)
    number, padded = out.numel() // channels, _padded(channels)
    block = max(1, ELEMENTS // padded)
    _unshuffled_kernel[_over(number, block),](
        x.contiguous(), out, h, w, number, C=c, CHANNELS=channels, PADDED=padded, PATCH=patch, BLOCK=block
    )
    return out


@triton.jit(do_not_specialize=SIZES)
def _last_kernel(
    x, weight, bias, out, H, W, pixels, C: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n, row, column = pixel // (H * W), pixel // W % H, pixel % W
    c, k = tl.arange(0, C), tl.arange(0, PADDED)
    there = pixel < pixels
    found = tl.zeros((BLOCK, PADDED), tl.float32)
    for tap in tl.static_range(9):
        # The outermost cells mirror in the patch of their neighbours: at half resolution that repeats the border.
        y = tl.minimum(tl.maximum(row + tap // 3 - 1, 0), H - 1)
        z = tl.minimum(tl.maximum(column + tap % 3 - 1, 0), W - 1)
        neighbour = ((n * H + y) * W + z).to(tl.int64)
        v = tl.load(x + neighbour[:, None] * C + c[None, :], mask=there[:, None], other=0)
        of_tap = tl.load(weight + tap * C * PADDED + c[:, None] * PADDED + k[None, :])
        found += tl.dot(v, of_tap, input_precision="ieee")
    found += tl.load(bias + k // 4, mask=k < 4 * K, other=0).to(tl.float32)[None, :]
    inside = (k % 4)[None, :]
    y, z = row[:, None] * 2 + inside // 2, column[:, None] * 2 + inside % 2
    place = ((n.to(tl.int64)[:, None] * K + (k // 4)[None, :]) * (2 * H) + y) * (2 * W) + z
    tl.store(out + place, found, mask=there[:, None] & (k < 4 * K)[None, :])


@lru_cache
def _selection(device: torch.device) -> Tensor:
    """Where weights of the last convolution, (9,), act: patch, cell in it, cell that is made, (9, 9 * 4 * 4)."""
    axis = torch.zeros(3, 3, 2, 2)  # row of the weight and of the patch, rows in that patch and in the one that is made
    for row in range(2):
        for under in range(3):
            patch, inside = divmod(row + under - 1, 2)
            axis[under, patch + 1, inside, row] = 1
    return torch.einsum("uaSi,vbRj->uvabSRij", axis, axis).reshape(9, -1).to(device)


def last(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Convolution of pixel_shuffle(x), mirrored at the borders, without that field at full resolution.

    Nine products at half resolution: what a patch of 2 x 2 cells sees lies in 3 x 3 patches.

    Args:
        x: channels of patches, (N, 4 * C, H, W).
        layer: the convolution, of weights (K, C, 3, 3), K up to 4.

    Returns:
        (N, K, 2 * H, 2 * W), float32.
    """
    (n, c, h, w), k = x.shape, layer.out_channels
    x = x.contiguous(memory_format=torch.channels_last)
    padded = 16
    spread = (layer.weight.float().flatten(2) @ _selection(x.device)).reshape(k, c // 4, 9, 4, 4)
    spread = spread.permute(2, 1, 3, 0, 4).reshape(9, c, 4 * k)
    spread = F.pad(spread, (0, padded - 4 * k)).to(x.dtype)
    out = torch.empty((n, k, 2 * h, 2 * w), device=x.device)
    number, block = n * h * w, 128
    _last_kernel[_over(number, block),](x, spread, layer.bias, out, h, w, number, C=c, K=k, PADDED=padded, BLOCK=block)
    return out


@triton.jit
def _rotated(at, there, cos, sin, scale, HALF: tl.constexpr):
    """The two halves of queries or keys, whose pairs are rotated by their position in time."""
    first, second = tl.load(at, mask=there, other=0), tl.load(at + HALF, mask=there, other=0)
    precision = at.dtype.element_ty
    return ((first * cos - second * sin) * scale).to(precision), ((second * cos + first * sin) * scale).to(precision)


@triton.jit(do_not_specialize=["frames", "places"])
def _mixed_kernel(x, cos, sin, out, frames, places, HEADS: tl.constexpr, FRAMES: tl.constexpr, HALF: tl.constexpr):
    program = tl.program_id(0)
    head, place = program % HEADS, program // HEADS
    C: tl.constexpr = HEADS * 2 * HALF
    t, c, pair = tl.arange(0, FRAMES)[:, None], tl.arange(0, 2 * HALF)[None, :], tl.arange(0, HALF)[None, :]
    row = ((place // places * frames + t) * places + place % places).to(tl.int64)
    there = t < frames
    turn = tl.load(cos + t * HALF + pair, mask=there, other=0), tl.load(sin + t * HALF + pair, mask=there, other=0)
    at = x + row * (3 * C) + head * 2 * HALF
    q, q_second = _rotated(at + pair, there, turn[0], turn[1], (2 * HALF) ** -0.5, HALF)
    k, k_second = _rotated(at + C + pair, there, turn[0], turn[1], 1, HALF)
    v = tl.load(at + 2 * C + c, mask=there, other=0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    scores = tl.dot(q_second, tl.trans(k_second), scores, input_precision="ieee")
    scores = tl.where(tl.arange(0, FRAMES)[None, :] < frames, scores, float("-inf"))
    shares = tl.exp(scores - tl.max(scores, 1)[:, None])
    shares = shares / tl.sum(shares, 1)[:, None]
    found = tl.dot(shares.to(v.dtype), v, input_precision="ieee")
    tl.store(out + row * C + head * 2 * HALF + c, found.to(out.dtype.element_ty), mask=there)


@lru_cache
def _rotation(frames: int, half: int, slowest: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle by which every pair of channels is rotated in every frame, (T, half) each."""
    turn = torch.arange(frames)[:, None] * slowest ** (-torch.arange(half) / half)
    return turn.cos().to(device), turn.sin().to(device)


def mixed(projected: Tensor, half: int, slowest: float) -> Tensor:
    """Attend over time, see `attention`.

    Args:
        projected: queries, keys and values, (B, T, P, 3 * C).
        half: half of the channels of a head.
        slowest: how many times slower than the first pair of channels one beyond the last would turn.

    Returns:
        (B, T, P, C).
    """
    (b, frames, places, c), projected = projected.shape, projected.contiguous()
    c //= 3
    out = torch.empty((b, frames, places, c), device=projected.device, dtype=projected.dtype)
    heads, padded = c // (2 * half), max(16, _padded(frames))
    _mixed_kernel[b * places * heads,](
        projected, *_rotation(frames, half, slowest, projected.device), out, frames, places, HEADS=heads, FRAMES=padded,
        HALF=half, num_warps=min(4, padded // 16),
    )  # fmt: skip
    return out
