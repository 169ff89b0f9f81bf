"""The video U-Net on the fine grid that both networks are made of.

2-D convolutions shared over time, attention over time at the lower levels. Frames travel as
(batch * time, channel, y, x) in channels-last memory, the fastest layout on CPU and GPU alike. Norms act
on single pixels, so that what a window computes does not depend on how large the window is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cached_property
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 2  # fine cells per network cell along y and x
STEM_CHANNELS = 8  # channels at full resolution before the last convolution
MOST_SEQUENCES = 2**16  # that a GPU attends over at once; a batch of windows can have more pixels


class MirroredConvolution(nn.Conv2d):
    """3 x 3 convolution of (N, C, H, W), H and W two at least, mirrored at its borders by one cell.

    With zeros there instead, steps between the outermost cells of a domain were up to 2.5 times those inside.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve to (N, C', H / stride, W / stride), rounded up."""
        return self.of_grown(x) if x.device.type == "cpu" else self.with_sides(x)

    def of_grown(self, x: Tensor) -> Tensor:
        """Copy the input into a larger field first."""
        with torch.autocast(
            x.device.type, enabled=False
        ):  # it only moves numbers; CPUs would do so in single precision
            grown = F.pad(x, (1, 1, 1, 1), mode="reflect").contiguous(memory_format=torch.channels_last)
        return F.conv2d(grown, self.weight, self.bias, self.stride)

    def with_sides(self, x: Tensor) -> Tensor:
        """Add what zeros lack along the sides; copies took half of a GPU's time, but these calls more of a CPU's."""
        y, (step, _) = super().forward(x), self.stride
        weight = self.weight.to(y.dtype)  # once for the four sides
        for axis in (-2, -1):
            n, last = x.shape[axis], y.shape[axis] - 1
            sides = [(0, 1, 0)] + [(last, n - 2, 2)] * (
                last * step == n - 1
            )  # output, mirrored input, row of the kernel
            for into, source, row in sides:
                line = x.narrow(axis, source, 1)
                if axis == -2:  # the corners belong to the rows
                    line = torch.cat((line[..., 1:2], line, line[..., -2:-1]), dim=-1)
                padding = (0, 0) if axis == -2 else (1, 0)
                y.narrow(axis, into, 1).add_(F.conv2d(line, weight.narrow(axis, row, 1), None, step, padding))
        return y


def _normalised(x: Tensor) -> Tensor:
    """Normalise the channels of every pixel of (N, C, H, W) to zero mean and unit variance."""
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=1e-4).permute(0, 3, 1, 2).to(x.dtype)


def _normed(x: Tensor) -> Tensor:
    """What comes before the first convolution of a block."""
    return F.silu(_normalised(x))


def _modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """What comes before the second convolution of a block; scale and shift (N, C)."""
    modulated = torch.addcmul(shift[:, :, None, None], _normalised(x), 1 + scale[:, :, None, None])
    return F.silu(modulated.to(x.dtype))


class _Fused:
    """A function between two convolutions; at inference on a GPU torch.compile makes one or two kernels of it.

    Whole networks would take it minutes to translate for windows of any size, at every start of a worker.
    """

    def __init__(self, plain: Callable[..., Tensor]) -> None:
        self.plain = plain

    @cached_property
    def fused(self) -> Callable[..., Tensor]:
        """The function, translated when first called; torch.compile alone takes seconds to import."""
        return torch.compile(self.plain, dynamic=True)

    def __call__(self, *tensors: Tensor) -> Tensor:
        fused = tensors[0].is_cuda and HAS_TRITON and torch.is_inference_mode_enabled()
        return self.fused(*tensors) if fused else self.plain(*tensors)


HAS_TRITON = find_spec("triton") is not None
normalised, normed, modulated = _Fused(_normalised), _Fused(_normed), _Fused(_modulated)


class ResidualBlock(nn.Module):
    """Two convolutions around a skip, modulated by the embedding of noise level and factor."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.first = MirroredConvolution(channels, channels)
        self.modulation = nn.Linear(embedding, 2 * channels)
        self.second = MirroredConvolution(channels, channels)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        nn.init.normal_(self.second.weight, std=1e-2 / math.sqrt(9 * channels))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Transform (N, C, H, W) with an embedding (N, E)."""
        scale, shift = self.modulation(embedding).chunk(2, dim=1)
        return x + self.second(modulated(self.first(normed(x)), scale, shift))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention; in single precision on CPUs, where the backward pass in half precision takes ten times as long."""
    if q.device.type != "cpu":
        return _by_products(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(v.dtype)


def _by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as products of matrices: a GPU's kernels are made for longer sequences and take four times as long."""
    parts = zip(*(x.split(MOST_SEQUENCES) for x in (q / math.sqrt(q.shape[-1]), k, v)), strict=True)
    return torch.cat([(a @ b.mT).softmax(-1).to(c.dtype) @ c for a, b, c in parts])


class TemporalAttention(nn.Module):
    """Self-attention over the frames of a window, each pixel by itself, with rotary positions."""

    def __init__(self, channels: int, head_channels: int = 32) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        nn.init.normal_(self.out.weight, std=1e-2 / math.sqrt(channels))
        nn.init.zeros_(self.out.bias)
        frequency = 64.0 ** (-torch.arange(head_channels // 2) / (head_channels // 2))
        self.register_buffer("frequency", frequency, persistent=False)

    def _with_turned(self) -> tuple[Tensor, Tensor]:
        """Weights (5 * C, C) and bias of queries, keys and values, and of queries and keys a quarter turn on.

        Rotated by an angle, a query is cos of it and sin of it turned. All channels side by side, that takes two thirds
        of the time of turning pairs of them afterwards.
        """
        pairs = (2 * self.heads, 2, len(self.frequency))  # type: ignore[arg-type]
        both = (self.qkv.weight, self.qkv.bias)
        turned = (p[: 2 * p.shape[0] // 3].unflatten(0, pairs).flip(1) for p in both)
        weight, bias = (torch.stack((-t[:, 0], t[:, 1]), dim=1).flatten(0, 2) for t in turned)
        return torch.cat((both[0], weight)), torch.cat((both[1], bias))

    def _rotated(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, rotated by their position in time, (B, T, P, 2 * C), and values, (B, T, P, C)."""
        c = tokens.shape[-1]
        straight, values, turned = F.linear(tokens, *self._with_turned()).split((2 * c, c, 2 * c), dim=-1)
        position = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)
        angle = (position[:, None] * self.frequency.float()).repeat(1, 4 * self.heads)[:, None]  # type: ignore[operator]
        cos, sin = angle.cos().to(straight.dtype), angle.sin().to(straight.dtype)
        return torch.addcmul(straight * cos, turned, sin), values

    def _sequences(self, tokens: Tensor, c: int) -> Tensor:
        """Tokens (B, T, P, C) as one sequence for every pixel and head, (B * P, heads, T, D)."""
        return tokens.unflatten(-1, (-1, c // self.heads)).permute(0, 2, 3, 1, 4).flatten(0, 1)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """Attend over time in (B * T, C, H, W), T = `frames`."""
        n, c, h, w = x.shape
        tokens = normalised(x).permute(0, 2, 3, 1).reshape(n // frames, frames, h * w, c)
        rotated, values = self._rotated(tokens)
        queries, keys = self._sequences(rotated, c).chunk(2, dim=1)
        mixed = _attend(queries, keys, self._sequences(values, c))
        mixed = mixed.transpose(1, 2).reshape(n // frames, h * w, frames, c).transpose(1, 2)
        return x + self.out(mixed).reshape(n, h, w, c).permute(0, 3, 1, 2)


def _mirrored(x: Tensor, stride: int) -> Tensor:
    """Grow (N, C, H, W) to multiples of `stride`, two at least, by mirroring it at its lower and right edges.

    Repeating the edge instead would draw noise out into streaks, which look like rain to a denoiser.
    """
    for axis in (-2, -1):
        n = x.shape[axis]
        wanted = max(2, -(-n // stride)) * stride
        while n < wanted:  # more than once where there is less than is lacking
            added = min(n, wanted - n)
            x = torch.cat((x, x.narrow(axis, n - added, added).flip(axis)), dim=axis)
            n += added
    return x


def _enlarged(x: Tensor, like: Tensor) -> Tensor:
    """Repeat the cells of (N, C, H, W) up to the size of another field."""
    with torch.autocast(x.device.type, enabled=False):  # it only moves numbers; GPUs would do so in single precision
        return F.interpolate(x, size=like.shape[-2:], mode="nearest")


class Level(nn.Module):
    """One level of the U-Net on its way down or up: a residual block, then attention over time if asked."""

    def __init__(self, channels: int, embedding: int, attention: bool) -> None:
        super().__init__()
        self.block = ResidualBlock(channels, embedding)
        self.attention = TemporalAttention(channels) if attention else None

    def forward(self, x: Tensor, embedding: Tensor, frames: int) -> Tensor:
        """Transform (B * T, C, H, W)."""
        x = self.block(x, embedding)
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
        self.embed = nn.Sequential(nn.Linear(context, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.stem = MirroredConvolution(inputs * PATCH**2, channels[0])
        below = [attention and i > 0 for i in range(len(channels))]
        self.down = nn.ModuleList(Level(c, width, a) for c, a in zip(channels, below, strict=True))
        self.reduce = nn.ModuleList(MirroredConvolution(a, b, stride=2) for a, b in itertools.pairwise(channels))
        self.up = nn.ModuleList(Level(c, width, a) for c, a in zip(channels, below, strict=True))
        self.expand = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in itertools.pairwise(channels))
        self.head = MirroredConvolution(channels[0], STEM_CHANNELS * PATCH**2)
        self.last = MirroredConvolution(STEM_CHANNELS, outputs)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, frames: Tensor, context: Tensor) -> Tensor:
        """Transform frames.

        Args:
            frames: (B, T, C, H, W).
            context: (B, K).

        Returns:
            (B, T, outputs, H, W).
        """
        b, t, c, h, w = frames.shape
        x = _mirrored(frames.reshape(b * t, c, h, w), self.stride)
        embedding = self.embed(context).repeat_interleave(t, dim=0)
        x = self.stem(F.pixel_unshuffle(x, PATCH).contiguous(memory_format=torch.channels_last))
        skips = []
        for i, level in enumerate(self.down):
            x = level(x if i == 0 else self.reduce[i - 1](x), embedding, t)
            skips.append(x)
        for i in reversed(range(len(self.up))):
            if i < len(self.up) - 1:
                x = skips[i] + _enlarged(self.expand[i](x), skips[i])
            x = self.up[i](x, embedding, t)
        x = F.silu(F.pixel_shuffle(self.head(F.silu(x)), PATCH))
        return self.last(x)[..., :h, :w].reshape(b, t, self.outputs, h, w)
