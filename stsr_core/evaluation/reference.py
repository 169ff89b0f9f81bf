"""The authors' setting, run with our networks: what our sampler, windows and conservation are measured against.

Their public research code downscales tiles of 100 x 100 km by ancestral sampling with 1000 network evaluations, only
the last of L coarse frames at a time, and scales each tile, not each coarse cell, to its total (arXiv 2604.21903).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stsr_core.diffusion import SCHEDULE_STEPS, ancestral_sample
from stsr_core.factors import authors_recipe

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stsr_core.downscaler import Downscaler

TILE_KM = 100  # fine cells along a tile, before rounding to whole coarse cells
SCALE_MM = 100.0  # amount per fine step that their f sees as 1


@dataclass(frozen=True)
class TileFunction:
    """The f of the authors: max(x - threshold, 0), or max(sqrt(x) - threshold, 0), of amounts over SCALE_MM."""

    root: bool
    threshold: float

    def __call__(self, amount: Tensor) -> Tensor:
        """Apply f to amounts [mm per fine step]."""
        scaled = amount / SCALE_MM
        return ((scaled.sqrt() if self.root else scaled) - self.threshold).clamp(min=0.0)


TILE_FUNCTIONS = {
    (1, 3): TileFunction(root=True, threshold=0.01),
    (10, 1): TileFunction(root=True, threshold=0.01),
    (10, 3): TileFunction(root=False, threshold=0.02),
    (25, 6): TileFunction(root=False, threshold=0.04),
}


def reference_ensemble(
    downscaler: Downscaler,
    coarse: NDArray[np.float32],
    members: int,
    seed: int,
    *,
    statics: NDArray[np.float32] | None = None,
    evaluations: int = SCHEDULE_STEPS,
    progress: Callable[[str], None] = lambda _: None,
) -> NDArray[np.float32]:
    """Downscale as the authors do, tile by tile and frame by frame.

    Args:
        downscaler: networks.
        coarse: amount [mm per coarse step], (T, Y, X); missing cells count as dry.
        members: number of members.
        seed: of the noise.
        statics: static fields as the networks see them, (S, Y*s, X*s).
        evaluations: network evaluations of a member.
        progress: called with a line for every wet step of a tile.

    Returns:
        Amount [mm per fine step], (M, T*t, Y*s, X*s), float32.

    Raises:
        FactorError: a factor that the authors give no setting for.
    """
    factor = downscaler.factor
    setting = authors_recipe(factor)
    function = TILE_FUNCTIONS[factor.space, factor.time]
    s, t, n = factor.space, factor.time, round(TILE_KM / factor.space)
    first = setting.context_length - 1
    # Steps before the first are taken to be like it; one cell around every tile serves the interpolation.
    padded = np.pad(np.nan_to_num(coarse), ((first + 1, 1), (1, 1), (1, 1)), mode="edge")
    out = np.zeros((members, *(m * f for m, f in zip(coarse.shape, (t, s, s), strict=True))), np.float32)
    generator = torch.Generator().manual_seed(seed)
    for y in range(0, coarse.shape[1], n):
        for x in range(0, coarse.shape[2], n):
            for step in range(coarse.shape[0]):
                window = padded[step : step + first + 3, y : y + n + 2, x : x + n + 2]
                if not window[-2, 1:-1, 1:-1].any():
                    continue
                place = np.s_[:, y * s : (y + n) * s, x * s : (x + n) * s]
                below = None if statics is None else torch.from_numpy(statics[place])[None]
                conditions = downscaler.condition(torch.from_numpy(window)[None], below)
                wanted = float(window[-2, 1:-1, 1:-1].sum()) * s * s
                tile = _tile(downscaler, setting.beta, function, conditions, wanted, members, generator, evaluations)
                out[:, step * t : (step + 1) * t][:, *place] = tile.cpu().numpy()
                progress(f"reference: tile at row {y} and column {x}, step {step + 1} of {coarse.shape[0]} done")
    return out


def _tile(
    downscaler: Downscaler,
    beta: float,
    function: TileFunction,
    conditions: Tensor,
    wanted: float,
    members: int,
    generator: torch.Generator,
    evaluations: int,
) -> Tensor:
    """Members of the last coarse frame of a window, (M, t, Y*s, X*s), scaled to the sum `wanted` of each."""
    mean = downscaler.mean(conditions)
    several = conditions.expand(members, *conditions.shape[1:])
    means = mean.expand(members, *mean.shape[1:])
    residual = ancestral_sample(
        lambda noisy, angle: downscaler.expected_residual(noisy, angle, means, several),
        lambda: torch.randn(means.shape, generator=generator).to(mean.device),
        beta,
        evaluations,
    )
    amount = downscaler.amounts(means, residual)[:, -downscaler.factor.time :, 0].clamp(min=0.0)
    shape = function(amount)
    total = shape.sum(dim=(1, 2, 3), keepdim=True)
    return torch.where(total > 0, shape * (wanted / total.clamp(min=1e-12)), wanted / math.prod(shape.shape[1:]))
