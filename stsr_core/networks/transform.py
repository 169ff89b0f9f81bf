"""What the networks see: the transform of amounts, and the conditioning frames made from coarse amounts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from stsr_core.factors import Factor

HALO = 1  # coarse cells and steps on every side that `condition` needs for its interpolation


def to_transformed(amount: Tensor, scale_mm: float) -> Tensor:
    """Transform amounts [mm per fine step] to log1p(amount / scale)."""
    return torch.log1p(amount / scale_mm)


def to_amount(transformed: Tensor, scale_mm: float) -> Tensor:
    """Return amounts [mm per fine step] >= 0; inverse of `to_transformed`, values below 0 give 0."""
    return torch.expm1(transformed.clamp(min=0.0)) * scale_mm


def linear_interpolation(coarse: Tensor, factor: Factor) -> Tensor:
    """Interpolate coarse amounts linearly in t, y and x.

    Args:
        coarse: amount [mm per coarse step] with a halo of one, (B, T+2, Y+2, X+2).
        factor: (s, t).

    Returns:
        Amount [mm per fine step], (B, T*t, Y*s, X*s).
    """
    s, t = factor.space, factor.time
    zoom = (float(t), float(s), float(s))
    fine = F.interpolate(coarse[:, None] / t, scale_factor=zoom, mode="trilinear", align_corners=False)[:, 0]
    return fine[:, t:-t, s:-s, s:-s]


def _phase(parts: int, cells: int, device: torch.device) -> Tensor:
    """Position inside the coarse cell, -1..1, for each of cells * parts fine cells; 0 where parts is 1."""
    inside = (torch.arange(parts, device=device, dtype=torch.float32) + 0.5) / parts * 2 - 1
    return inside.repeat(cells)


def condition(coarse: Tensor, factor: Factor, scale_mm: float, statics: Tensor | None = None) -> Tensor:
    """Make the conditioning frames of a window.

    Args:
        coarse: amount [mm per coarse step] with a halo of HALO, (B, T+2, Y+2, X+2), no NaN.
        factor: (s, t).
        scale_mm: constant of the transform.
        statics: static fields as the networks see them, (B, S, Y*s, X*s).

    Returns:
        (B, T*t, 5 + S, Y*s, X*s): transformed nearest and linear interpolation, the phase inside the coarse
        cell along y, x and t, and the static fields.
    """
    s, t = factor.space, factor.time
    inner = coarse[:, HALO:-HALO, HALO:-HALO, HALO:-HALO] / t
    b, nt, ny, nx = inner.shape
    nearest = inner.repeat_interleave(t, 1).repeat_interleave(s, 2).repeat_interleave(s, 3)
    linear = linear_interpolation(coarse, factor)
    whole = (b, nt * t, ny * s, nx * s)
    phases = (
        _phase(s, ny, coarse.device)[None, None, :, None].expand(whole),
        _phase(s, nx, coarse.device)[None, None, None, :].expand(whole),
        _phase(t, nt, coarse.device)[None, :, None, None].expand(whole),
    )
    frames = torch.stack((to_transformed(nearest, scale_mm), to_transformed(linear, scale_mm), *phases), dim=2)
    if statics is None:
        return frames
    return torch.cat((frames, statics[:, None].expand(-1, nt * t, -1, -1, -1)), dim=2)
