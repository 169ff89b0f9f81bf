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

import torch

from stsr_core.diffusion import drawn_noise
from stsr_core.evaluation.scores import crps_field

if TYPE_CHECKING:
    from torch import Tensor

    from stsr_core.downscaler import Downscaler

MEMBERS = 4
SPREADS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.3, 2.6)  # factors on the residual that are tried
TOLERANCE = 1e-3  # of the least CRPS


def _crps(members: Tensor, truth: Tensor) -> float:
    """Fair CRPS of members (M, T, H, W) against truth (T, H, W) [mm per fine step], summed over cells."""
    return float(crps_field(members[:, None].cpu().numpy(), truth[None].cpu().numpy()).sum(dtype="float64"))


@dataclass
class _Sums:
    """Sums of scores over cells: fair CRPS, variance of members, squared error of their mean."""

    crps: float = 0.0
    variance: float = 0.0
    error: float = 0.0

    def add(self, members: Tensor, truth: Tensor) -> None:
        """Add those of members (M, T, H, W) against truth (T, H, W) [mm per fine step]."""
        self.crps += _crps(members, truth)
        self.variance += float(members.var(dim=0).sum(dtype=torch.float64))
        self.error += float((members.mean(dim=0) - truth).square().sum(dtype=torch.float64))

    @property
    def spread_skill(self) -> float:
        """Spread over skill, which is 1 for members that the truth could be one of; tiny where they do not differ."""
        return math.sqrt(max(self.variance * (1 + 1 / MEMBERS) / max(self.error, 1e-12), 1e-12))


@dataclass(frozen=True)
class Example:
    """A validation patch as tensors: truth (T, H, W), its coarse amounts (T', Y, X), and conditions (1, T, C, H, W)."""

    truth: Tensor
    coarse: Tensor
    conditions: Tensor


@torch.inference_mode()
def calibrated_spread(downscaler: Downscaler, examples: Iterable[Example], seed: int) -> float:
    """Factor on the residual with which members have the least fair CRPS.

    Factors are tried up and down from 1 until members get worse, which they then do more and more. CRPS is flat where
    it is least: of all factors within TOLERANCE of the least, the one whose spread/skill is nearest to 1. The
    smallest of them, which flickers least, was once 0.79 at (25,6), for a denoiser trained longer than its archive had
    weather for; always widening to 1 would cost up to 0.5 % of CRPS and a tenth of hour-to-hour change.

    Args:
        downscaler: the trained networks.
        examples: validation patches of its factor.
        seed: of the members' noise.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [_drawn(downscaler, example, generator) for example in examples]
    found: dict[float, _Sums] = {}

    def summed(spread: float) -> _Sums:
        wider = replace(downscaler, served=downscaler.served.model_copy(update={"spread": spread}))
        sums = _Sums()
        for example, mean, residual in drawn:
            sums.add(wider.conserve(wider.amounts(mean, residual), example.coarse), example.truth)
        return sums

    least = math.inf
    for spreads in (SPREADS[SPREADS.index(1.0) :], SPREADS[: SPREADS.index(1.0)][::-1]):  # up from 1, then down
        for spread in spreads:
            found[spread] = summed(spread)
            least = min(least, found[spread].crps)
            if found[spread].crps > (1 + TOLERANCE) * least:
                break
    good = [spread for spread, sums in found.items() if sums.crps <= (1 + TOLERANCE) * least]
    return min(good, key=lambda spread: abs(math.log(found[spread].spread_skill)))


def _drawn(downscaler: Downscaler, example: Example, generator: torch.Generator) -> tuple[Example, Tensor, Tensor]:
    """An example with its mean, (1, T, H, W), and residuals of MEMBERS members, (M, T, H, W).

    The members come one after another, as on CPUs they are fastest so.
    """
    mean = downscaler.mean(example.conditions)

    def denoise(noisy: Tensor, angle: float) -> Tensor:
        return downscaler.expected_residual(noisy, angle, mean, example.conditions)

    correlation, cpu = downscaler.served.configuration.correlation, generator.device
    noise = [drawn_noise(mean.shape, correlation, generator, cpu).to(mean.device) for _ in range(MEMBERS)]
    return example, mean[:, :, 0], torch.cat([downscaler.residual(denoise, one)[:, :, 0] for one in noise])
