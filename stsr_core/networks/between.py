"""What lies between two convolutions.

Fields are (N, C, H, W) in channels-last memory. Everything acts on single pixels or only moves them, so that what a
window computes does not depend on how large the window is. Convolutions take fields that are mirrored at their borders
by one cell already: with zeros there, steps between the outermost cells of a domain were up to 2.5 times those inside.
At inference on a GPU `kernels` does all this: torch's own calls took it more than twice as long, and so did what
torch.compile made of them, after a minute of translating.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stsr_core.translation import kernels_serve

PATCH = 2  # fine cells per network cell along y and x


def by_kernels(x: Tensor) -> bool:
    """Whether kernels of our own do it."""
    return kernels_serve(x.device) and torch.is_inference_mode_enabled()


def kernels() -> ModuleType:
    """The kernels, imported where they are used: Triton takes 80 MB, which workers on CPUs need not spend."""
    from stsr_core.networks import kernels

    return kernels


def convolved(layer: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Convolve, and return the bias if it is still to be added: kernels do so for nothing in what follows."""
    if not by_kernels(x):
        return layer(x), None
    return F.conv2d(x, layer.weight, None, layer.stride), layer.bias


def mirrored(x: Tensor) -> Tensor:
    """Mirror a field, two cells at least, at its borders by one cell."""
    if by_kernels(x):
        return kernels().pixels(x, mirror=True, norm=False, silu=False)
    with torch.autocast(x.device.type, enabled=False):  # it only moves numbers; CPUs would do so in single precision
        return F.pad(x, (1, 1, 1, 1), mode="reflect").contiguous(memory_format=torch.channels_last)


def from_cells(x: Tensor, stem: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """The way to half resolution: the cells of a patch become channels, and a convolution, with its bias as above."""
    if by_kernels(x):
        patches = kernels().unshuffled(x, stem.weight.dtype, PATCH)
        more = patches.shape[1] - stem.in_channels
        return F.conv2d(patches, F.pad(stem.weight, (0, 0, 0, 0, 0, more))), stem.bias
    return stem(mirrored(F.pixel_unshuffle(x, PATCH).to(stem.weight.dtype))), None


def _normalised(x: Tensor) -> Tensor:
    """Normalise the channels of every pixel, (N, C, H, W) to (N, H, W, C), to zero mean and unit variance."""
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=1e-4)


def normed(x: Tensor, bias: Tensor | None) -> Tensor:
    """What comes before the first convolution of a block."""
    if by_kernels(x):
        return kernels().pixels(x, mirror=True, norm=True, silu=True, bias=bias)
    return F.silu(_normalised(mirrored(x)).to(x.dtype)).permute(0, 3, 1, 2)


def modulated(x: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor:
    """What comes before its second convolution; scale and shift (N, C)."""
    if by_kernels(x):
        return kernels().pixels(x, mirror=True, norm=True, silu=True, bias=bias, scale=scale, shift=shift)
    changed = torch.addcmul(shift[:, None, None], _normalised(mirrored(x)), 1 + scale[:, None, None])
    return F.silu(changed.to(x.dtype)).permute(0, 3, 1, 2)


def summed(x: Tensor, bias: Tensor | None, skipped: Tensor, skipped_bias: Tensor | None) -> Tensor:
    """What comes after it, with what the block was given."""
    if not by_kernels(x):
        return skipped + x
    return kernels().added(x, bias if bias is None or skipped_bias is None else bias + skipped_bias, skipped)


def tokens(x: Tensor) -> Tensor:
    """What comes before attention, (N, H, W, C)."""
    if by_kernels(x):
        return kernels().pixels(x, mirror=False, norm=True, silu=False).permute(0, 2, 3, 1)
    return _normalised(x).to(x.dtype)


def merged(x: Tensor, bias: Tensor | None, skipped: Tensor) -> Tensor:
    """Cells repeated to twice the size, on the way up, and what skipped the lower levels."""
    if by_kernels(x):
        return kernels().added(x, bias, skipped)
    with torch.autocast(x.device.type, enabled=False):  # it only moves numbers; GPUs would do so in single precision
        return skipped + F.interpolate(x, size=skipped.shape[-2:], mode="nearest")


def to_cells(x: Tensor, head: nn.Conv2d, last: nn.Conv2d) -> Tensor:
    """The way back to full resolution: two convolutions, channels of the first one become the cells of a patch."""
    if by_kernels(x):
        patches, bias = convolved(head, kernels().pixels(x, mirror=True, norm=False, silu=True))
        patches = kernels().pixels(patches, mirror=False, norm=False, silu=True, bias=bias)
        return kernels().last(patches, last)
    return last(mirrored(F.silu(F.pixel_shuffle(head(mirrored(F.silu(x))), PATCH))))
