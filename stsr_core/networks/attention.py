"""Attention over the frames of a window, each pixel by itself."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stsr_core.networks.between import by_kernels, kernels, tokens

HALF = 16  # half of the channels of a head, which are rotated in pairs
SLOWEST = 64.0  # the fastest pair turns by 1 from frame to frame, the slowest by 1 / SLOWEST ** (15 / 16)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention; in single precision on CPUs, where the backward pass in half precision takes ten times as long."""
    if q.device.type != "cpu":
        return _by_products(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(v.dtype)


def _by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as products of matrices: a GPU's kernels are made for longer sequences and take four times as long."""
    return ((q / math.sqrt(q.shape[-1])) @ k.mT).softmax(-1).to(v.dtype) @ v


def _mixed(projected: Tensor) -> Tensor:
    """Attend over time.

    Args:
        projected: queries, keys, values, and queries and keys a quarter turn on, (B, T, P, 5 * C).

    Returns:
        (B, T, P, C).
    """
    b, frames, p, c = projected.shape
    c //= 5
    straight, values, turned = projected.split((2 * c, c, 2 * c), dim=-1)
    position, pair = (torch.arange(n, device=projected.device, dtype=torch.float32) for n in (frames, HALF))
    angle = (position[:, None] * SLOWEST ** (-pair / HALF)).repeat(1, 2 * c // HALF)[:, None]
    cos, sin = angle.cos().to(straight.dtype), angle.sin().to(straight.dtype)
    rotated = torch.addcmul(straight * cos, turned, sin)

    def sequences(x: Tensor) -> Tensor:  # one for every pixel and head, (B * P, heads, T, 2 * HALF)
        return x.unflatten(-1, (-1, 2 * HALF)).permute(0, 2, 3, 1, 4).flatten(0, 1)

    queries, keys = sequences(rotated).chunk(2, dim=1)
    found = _attend(queries, keys, sequences(values))
    return found.transpose(1, 2).reshape(b, p, frames, c).transpose(1, 2)


def _turned(both: Tensor) -> Tensor:
    """Rows of weights or biases that make queries and keys a quarter turn on: pairs, swapped and one negated."""
    pairs = both[: 2 * len(both) // 3].unflatten(0, (-1, 2, HALF))
    return torch.stack((-pairs[:, 1], pairs[:, 0]), dim=1).flatten(0, 2)


class TemporalAttention(nn.Module):
    """Self-attention over the frames of a window, each pixel by itself, with rotary positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        nn.init.normal_(self.out.weight, std=1e-2 / math.sqrt(channels))
        nn.init.zeros_(self.out.bias)

    def _with_turned(self) -> tuple[Tensor, Tensor]:
        """Weights (5 * C, C) and bias of queries, keys and values, and of queries and keys a quarter turn on.

        Rotated by an angle, a query is cos of it and sin of it turned. All channels side by side, that takes two thirds
        of the time of turning pairs of them afterwards.
        """
        weight, bias = (torch.cat((p, _turned(p))) for p in (self.qkv.weight, self.qkv.bias))
        return weight, bias

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """Attend over time in (B * T, C, H, W), T = `frames`."""
        n, c, h, w = x.shape
        sequences = tokens(x).reshape(n // frames, frames, h * w, c)
        if by_kernels(x):
            mixed = kernels().mixed(self.qkv(sequences), HALF, SLOWEST)
        else:
            mixed = _mixed(F.linear(sequences, *self._with_turned()))
        return x + self.out(mixed).reshape(n, h, w, c).permute(0, 3, 1, 2)
