"""The video U-Net on the fine grid that both networks are made of.

2-D convolutions shared over time, attention over time at the lower levels. Frames travel as
(batch * time, channel, y, x) in channels-last memory, the fastest layout on CPU and GPU alike; see `between` for what
lies between two convolutions.
"""

from __future__ import annotations

import itertools
import math
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stsr_core.networks.attention import TemporalAttention
from stsr_core.networks.between import (
    PATCH,
    convolved,
    from_cells,
    merged,
    mirrored,
    modulated,
    normed,
    summed,
    to_cells,
)

Cells: TypeAlias = tuple[int, int]
"""Fine rows and columns."""

STEM_CHANNELS = 8  # channels at full resolution before the last convolution


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """3 x 3 convolution of a field that is mirrored at its borders already."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride)


class SpacingLinear(nn.Linear):
    """A linear layer whose bias grows with the logarithm of the fine spacing; at 1 km it is any linear layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.by_spacing = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, octaves: float = 0.0) -> Tensor:
        """Transform (N, inputs) at a fine spacing of 2^octaves km."""
        return F.linear(x, self.weight, torch.add(self.bias, self.by_spacing, alpha=octaves))


class ResidualBlock(nn.Module):
    """Two convolutions around a skip, modulated by the embedding of noise level and factor, and by the fine spacing."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.first = _convolution(channels, channels)
        self.modulation = SpacingLinear(embedding, 2 * channels)
        self.second = _convolution(channels, channels)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        nn.init.normal_(self.second.weight, std=1e-2 / math.sqrt(9 * channels))

    def forward(self, x: Tensor, bias: Tensor | None, embedding: Tensor, octaves: float = 0.0) -> Tensor:
        """Transform (N, C, H, W), a bias (C,) still to be added, with an embedding (N, E), at 2^octaves km."""
        scale, shift = self.modulation(embedding, octaves).chunk(2, dim=1)
        inner = modulated(*convolved(self.first, normed(x, bias)), scale, shift)
        return summed(*convolved(self.second, inner), x, bias)


def _grown(x: Tensor, stride: int, before: Cells = (0, 0)) -> Tensor:
    """Grow (N, C, H, W) by rows and columns `before` it and to multiples of `stride`, two at least, by mirroring it.

    Repeating the edge instead would draw noise out into streaks, which look like rain to a denoiser.
    """
    for axis, lead in zip((-2, -1), before, strict=True):
        whole = x.shape[axis] + lead
        while (lacking := whole - x.shape[axis]) > 0:  # more than once where there is less than is lacking
            x = torch.cat((x.narrow(axis, 0, min(lacking, x.shape[axis])).flip(axis), x), dim=axis)
        whole = max(2, -(-whole // stride)) * stride
        while (lacking := whole - (n := x.shape[axis])) > 0:
            added = min(lacking, n)
            x = torch.cat((x, x.narrow(axis, n - added, added).flip(axis)), dim=axis)
    return x


class Level(nn.Module):
    """One level of the U-Net on its way down or up: a residual block, then attention over time if asked."""

    def __init__(self, channels: int, embedding: int, attention: bool) -> None:
        super().__init__()
        self.block = ResidualBlock(channels, embedding)
        self.attention = TemporalAttention(channels) if attention else None

    def forward(self, x: Tensor, bias: Tensor | None, embedding: Tensor, octaves: float, frames: int) -> Tensor:
        """Transform (B * T, C, H, W), a bias (C,) still to be added to it."""
        x = self.block(x, bias, embedding, octaves)
        return x if self.attention is None else self.attention(x, frames)


class VideoUNet(nn.Module):
    """Maps a window of frames to a window of frames of the same size.

    Args:
        inputs: channels of the input frames.
        outputs: channels of the output frames.
        channels: channels per level, from half resolution down; each level halves the resolution.
        context: length of the conditioning vector (noise level, factor).
        attention: whether the levels below the first attend over time.
    """

    def __init__(
        self, inputs: int, outputs: int, channels: tuple[int, ...], context: int, *, attention: bool = True
    ) -> None:
        super().__init__()
        width = 2 * channels[0]
        self.outputs = outputs
        self.stride = PATCH * 2 ** (len(channels) - 1)
        self.embed = nn.Sequential(SpacingLinear(context, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.stem = _convolution(inputs * PATCH**2, channels[0])
        below = [attention and i > 0 for i in range(len(channels))]
        self.down = nn.ModuleList(Level(c, width, a) for c, a in zip(channels, below, strict=True))
        self.reduce = nn.ModuleList(_convolution(a, b, stride=2) for a, b in itertools.pairwise(channels))
        self.up = nn.ModuleList(Level(c, width, a) for c, a in zip(channels, below, strict=True))
        self.expand = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in itertools.pairwise(channels))
        self.head = _convolution(channels[0], STEM_CHANNELS * PATCH**2)
        self.last = _convolution(STEM_CHANNELS, outputs)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, frames: Tensor, context: Tensor, spacing_km: float = 1.0, cut: Cells = (0, 0)) -> Tensor:
        """Transform frames.

        Args:
            frames: (B, T, C, H, W).
            context: (B, K).
            spacing_km: of the fine grid.
            cut: rows and columns of a larger window that were cut off before this one. The lower levels lie where they
                did in the larger one, so that what is left changes near the cut only.

        Returns:
            (B, T, outputs, H, W).
        """
        b, t, c, h, w = frames.shape
        top, left = (n % self.stride for n in cut)
        x = _grown(frames.reshape(b * t, c, h, w), self.stride, (top, left))
        octaves = math.log2(spacing_km)
        embedding = self.embed[1:](self.embed[0](context, octaves)).repeat_interleave(t, dim=0)
        x, bias = from_cells(x, self.stem)
        skips = []
        for i, level in enumerate(self.down):
            if i:
                x, bias = convolved(self.reduce[i - 1], mirrored(x))  # type: ignore[arg-type]
            x = level(x, bias, embedding, octaves, t)
            skips.append(x)
        for i in reversed(range(len(self.up))):
            if i < len(self.up) - 1:
                x = merged(*convolved(self.expand[i], x), skips[i])  # type: ignore[arg-type]
            x = self.up[i](x, None, embedding, octaves, t)
        cells = to_cells(x, self.head, self.last)[..., top : top + h, left : left + w]
        return cells.reshape(b, t, self.outputs, h, w)
