"""What the networks see: the transform of amounts, and the conditioning frames made from coarse amounts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stsr_core.conservation import LARGEST_PASS, refined
from stsr_core.factors import Factor
from stsr_core.grids import HALO

GAIN_PASSES = 6  # coarse amounts of radar fields are then returned to 1 % in the mean
SOFTENED_MM = 1e-3  # amount per coarse step below which the gain does not tell wet from dry


def to_transformed(amount: Tensor, scale_mm: float) -> Tensor:
    """Transform amounts [mm per fine step] to log1p(amount / scale)."""
    return torch.log1p(amount / scale_mm)


def to_amount(transformed: Tensor, scale_mm: float) -> Tensor:
    """Return amounts [mm per fine step] >= 0; inverse of `to_transformed`, values below 0 give 0."""
    return to_signed_amount(transformed.clamp(min=0.0), scale_mm)


def to_signed_amount(transformed: Tensor, scale_mm: float) -> Tensor:
    """Return amounts [mm per fine step], and below 0, down to -scale, how far from rain a dry cell is."""
    return torch.expm1(transformed) * scale_mm


def linear_interpolation(coarse: Tensor, factor: Factor) -> Tensor:
    """Interpolate coarse amounts linearly in t, y and x.

    Args:
        coarse: amount [mm per coarse step] with a halo of one, (B, T+2, Y+2, X+2).
        factor: (s, t).

    Returns:
        Amount [mm per fine step], (B, T*t, Y*s, X*s).
    """
    s, t = factor.space, factor.time
    return refined(coarse / t, factor)[:, t:-t, s:-s, s:-s]


def pycnophylactic_gain(coarse: Tensor, space: int) -> Tensor:
    """Logarithm of the gain, given at coarse cells, with which interpolation in space returns their amounts.

    Interpolated and applied, it makes a field that is smooth across the borders of coarse cells and keeps their
    amounts, dry ones included: what Tobler 1979 (doi 10.1080/01621459.1979.10481647) calls pycnophylactic.

    Args:
        coarse: amount [mm per coarse step] with a halo of one, (B, T+2, Y+2, X+2), no NaN.
        space: s.

    Returns:
        (B, T, Y, X).
    """
    factor = Factor(space=space, time=1)
    linear, wanted = linear_interpolation(coarse, factor), coarse[:, HALO:-HALO, HALO:-HALO, HALO:-HALO]
    log_gain = torch.zeros_like(wanted)
    for _ in range(GAIN_PASSES):
        found = F.avg_pool2d(linear * refined(log_gain, factor).exp(), space)
        log_gain += ((wanted + SOFTENED_MM) / (found + SOFTENED_MM)).log().clamp(-LARGEST_PASS, LARGEST_PASS)
    return log_gain


def _pycnophylactic(coarse: Tensor, factor: Factor, log_gain: Tensor | None) -> Tensor:
    """Pycnophylactic interpolation in space, spread evenly over the fine steps [mm per fine step]."""
    s, t = factor.space, factor.time
    flat = Factor(space=s, time=1)
    gain = refined(pycnophylactic_gain(coarse, s) if log_gain is None else log_gain, flat).exp()
    return (linear_interpolation(coarse, flat) * gain / t).repeat_interleave(t, dim=1)


def _phase(parts: int, cells: int, device: torch.device) -> Tensor:
    """Position inside the coarse cell, -1..1, for each of cells * parts fine cells; 0 where parts is 1."""
    inside = (torch.arange(parts, device=device, dtype=torch.float32) + 0.5) / parts * 2 - 1
    return inside.repeat(cells)


def condition(
    coarse: Tensor,
    factor: Factor,
    scale_mm: float,
    statics: Tensor | None = None,
    log_gain: Tensor | None = None,
) -> Tensor:
    """Make the conditioning frames of a window.

    Coarse amounts repeated over their fine cells would show the networks squares, and they drew them: at (25,6) steps
    across borders of coarse cells were 1.09 times those inside, and are 1.01 times with a field that is smooth.
    In time the amounts are repeated: smooth there too, they told the networks too little of the amount of a step.

    Args:
        coarse: amount [mm per coarse step] with a halo of HALO, (B, T+2, Y+2, X+2), no NaN.
        factor: (s, t).
        scale_mm: constant of the transform.
        statics: static fields as the networks see them, (B, S, Y*s, X*s).
        log_gain: of these amounts, see `pycnophylactic_gain`; made here if not given.

    Returns:
        (B, T*t, 5 + S, Y*s, X*s): transformed pycnophylactic and linear interpolation, the former in space only, the
        phase inside the coarse cell along y, x and t, and the static fields.
    """
    s, t = factor.space, factor.time
    b, nt, ny, nx = (n - m for n, m in zip(coarse.shape, (0, *(2 * HALO,) * 3), strict=True))
    smooth, linear = _pycnophylactic(coarse, factor, log_gain), linear_interpolation(coarse, factor)
    whole = (b, nt * t, ny * s, nx * s)
    phases = (
        _phase(s, ny, coarse.device)[None, None, :, None].expand(whole),
        _phase(s, nx, coarse.device)[None, None, None, :].expand(whole),
        _phase(t, nt, coarse.device)[None, :, None, None].expand(whole),
    )
    frames = torch.stack((to_transformed(smooth, scale_mm), to_transformed(linear, scale_mm), *phases), dim=2)
    if statics is None:
        return frames
    return torch.cat((frames, statics[:, None].expand(-1, nt * t, -1, -1, -1)), dim=2)
