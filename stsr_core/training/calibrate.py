"""Calibration: how far members spread, chosen per factor on validation data once both networks are trained.

Training normalises the residual by its standard deviation on training patches. A denoiser learns from a finite
archive, few steps of the sampler lose some spread, and conservation takes away what residuals share over a coarse
cell. Only whole members tell what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import scoringrules
import torch

from stsr_core.diffusion import sample

if TYPE_CHECKING:
    from torch import Tensor

    from stsr_core.downscaler import Downscaler

MEMBERS = 4
SPREADS = (0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.3)  # factors on the residual scale that are tried
TOLERANCE = 0.01  # of the least CRPS, within which the spread decides


@dataclass
class _Sums:
    """Sums over cells of one spread's members: fair CRPS, variance, squared error of the ensemble mean."""

    crps: float = 0.0
    variance: float = 0.0
    error: float = 0.0

    def add(self, members: Tensor, truth: Tensor) -> None:
        """Add members (M, T, H, W) and their truth (T, H, W) [mm per fine step]."""
        found, wanted = members.double().cpu().numpy(), truth.double().cpu().numpy()
        self.crps += float(scoringrules.crps_ensemble(wanted, found, m_axis=0, estimator="fair", backend="numpy").sum())
        self.variance += float(found.var(axis=0, ddof=1).sum())
        self.error += float(((found.mean(axis=0) - wanted) ** 2).sum())

    @property
    def spread_skill(self) -> float:
        """Spread over skill, as evaluation defines it; 1 for a reliable ensemble."""
        return math.sqrt(self.variance * (1 + 1 / MEMBERS) / max(self.error, 1e-12))


@dataclass(frozen=True)
class Example:
    """A validation patch as tensors: truth (T, H, W), its coarse amounts (T', Y, X), and conditions (1, T, C, H, W)."""

    truth: Tensor
    coarse: Tensor
    conditions: Tensor


@torch.inference_mode()
def calibrated_spread(downscaler: Downscaler, examples: Iterable[Example], seed: int) -> float:
    """Factor on the residual that makes members reliable.

    Of all factors whose fair CRPS is within TOLERANCE of the least, the one whose spread/skill is nearest to 1.

    Args:
        downscaler: the trained networks.
        examples: validation patches of its factor.
        seed: of the members' noise.
    """
    sums = {spread: _Sums() for spread in SPREADS}
    generator = torch.Generator().manual_seed(seed)
    for example in examples:
        mean = downscaler.mean(example.conditions)
        residual = _residuals(downscaler, example, mean, generator)
        for spread, found in sums.items():
            wider = replace(downscaler, served=downscaler.served.model_copy(update={"spread": spread}))
            members = wider.conserve(wider.amounts(mean[:, :, 0], residual), example.coarse)
            found.add(members, example.truth)
    least = min(found.crps for found in sums.values())
    near = [spread for spread, found in sums.items() if found.crps <= (1 + TOLERANCE) * least]
    return min(near, key=lambda spread: abs(math.log(max(sums[spread].spread_skill, 1e-6))))


def _residuals(downscaler: Downscaler, example: Example, mean: Tensor, generator: torch.Generator) -> Tensor:
    """Residuals of MEMBERS members, (M, T, H, W), one after another as on CPUs they are fastest so."""

    def denoise(noisy: Tensor, angle: float) -> Tensor:
        return downscaler.expected_residual(noisy, angle, mean, example.conditions)

    noise = [torch.randn(mean.shape, generator=generator).to(mean.device) for _ in range(MEMBERS)]
    return torch.cat([sample(denoise, one, downscaler.angles())[:, :, 0] for one in noise])
