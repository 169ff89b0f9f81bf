"""Residual diffusion: noise schedule and few-step sampler.

The residual has unit variance. At noise level `angle` in [0, pi/2]

    noised = cos(angle) * residual + sin(angle) * noise,

the variance-preserving process on the circle (Lu and Song, arXiv 2410.11081). The denoiser returns the expected
residual; its squared error is weighted by 1 / sin(angle)^2, which makes it the loss of v-prediction (Salimans and
Ho, arXiv 2202.00512; Karras et al., arXiv 2206.00364). All functions are pure.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from stsr_core.factors import NoiseCorrelation

BETA_START = 1e-4  # first value of the linear schedule; last one is beta (arXiv 2604.21903)
SCHEDULE_STEPS = 1000  # steps that beta refers to
SAMPLING_POWER = 2.0
SMALLEST_SINE = 0.1  # bounds the weight of the loss; the sampler's smallest noise level is larger


def noise_angle(u: Tensor, beta: float) -> Tensor:
    """Noise level at position u of the schedule.

    Continuous form of the linear schedule from BETA_START to `beta` over SCHEDULE_STEPS steps:
    cos(angle)^2 = exp(-SCHEDULE_STEPS * (BETA_START * u + (beta - BETA_START) * u^2 / 2)).

    Args:
        u: position in 0..1, any shape.
        beta: noise amplitude.

    Returns:
        Angle in [0, pi/2), strictly increasing in u and beta, shaped like `u`.
    """
    exponent = SCHEDULE_STEPS * (BETA_START * u + 0.5 * (beta - BETA_START) * u.square())
    return torch.arccos(torch.exp(-0.5 * exponent).clamp(max=1.0))


def add_noise(residual: Tensor, noise: Tensor, angle: Tensor) -> Tensor:
    """Return the residual noised at `angle` (broadcast against `residual`)."""
    return angle.cos() * residual + angle.sin() * noise


def correlated(noise: Tensor, correlation: NoiseCorrelation) -> Tensor:
    """Noise of unit variance that neighbouring cells and steps have in common, a moving average of white noise.

    Args:
        noise: white noise, with a cell more on every side and two steps more in front, (..., T + 2, Y + 2, X + 2).
        correlation: weights of that average.

    Returns:
        (..., T, Y, X).
    """
    beside, before = correlation.beside, correlation.before
    for axis, weights in ((-3, (before**2, before, 1.0)), (-2, (beside, 1.0, beside)), (-1, (beside, 1.0, beside))):
        n = noise.shape[axis] - 2
        first, second, third = (noise.narrow(axis, start, n) for start in range(3))
        averaged = first * weights[0]
        averaged.add_(second, alpha=weights[1]).add_(third, alpha=weights[2])
        noise = averaged.div_(math.hypot(*weights))
    return noise


def drawn_noise(
    shape: Sequence[int], correlation: NoiseCorrelation, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Draw noise of unit variance for patches (B, T, 1, H, W)."""
    b, t, _, h, w = shape
    if correlation.white:
        return torch.randn((b, t, 1, h, w), generator=generator, device=device)
    white = torch.randn((b, t + 2, h + 2, w + 2), generator=generator, device=device)
    return correlated(white, correlation)[:, :, None]


def loss_weight(angle: Tensor) -> Tensor:
    """Weight of the residual's squared error at a noise level: that of v-prediction, bounded where noise vanishes."""
    return 1.0 / (angle.sin().square() + SMALLEST_SINE**2)


def largest_angle(beta: float) -> float:
    """Noise level at the end of the schedule of `beta`, where sampling starts and training ends."""
    return float(noise_angle(torch.tensor(1.0, dtype=torch.float64), beta))


def sampling_angle(u: Tensor, beta: float) -> Tensor:
    """Noise level at a fraction `u` of the sampler's way, 0 at the end of the schedule and 1 at no noise.

    angle = end * (1 - u^SAMPLING_POWER): steps grow from the end of the schedule on. What a member looks like at
    large is decided where there is almost only noise; with equal steps, 8 evaluations lose half of the spread
    there. The power was chosen on MRMS validation windows at (8,3) and (25,6).

    Args:
        u: in 0..1, any shape.
        beta: noise amplitude.

    Returns:
        Angle in [0, pi/2), decreasing in u, shaped like `u`.
    """
    return largest_angle(beta) * (1 - u**SAMPLING_POWER)


def sampling_angles(beta: float, evaluations: int, *, first: float = 0.0, last: float = 1.0) -> list[float]:
    """Noise levels of the sampler between two fractions of its way, decreasing, `evaluations` + 1 of them."""
    way = torch.linspace(first, last, evaluations + 1, dtype=torch.float64)
    return [float(angle) for angle in sampling_angle(way, beta)]


def sample(
    denoise: Callable[[Tensor, float], Tensor], noise: Tensor, angles: list[float], *, order: Literal[1, 2] = 2
) -> Tensor:
    """Draw residuals by the second-order multistep solver (DPM-Solver++ 2M, arXiv 2211.01095, on the circle).

    One evaluation per step; the first step and one to no noise are of first order. Deterministic given `noise`.

    Args:
        denoise: maps (noised residual, angle) to the expected residual, a new tensor shaped like `noise`.
        noise: standard normal; becomes the residual, for the fields of a shard are too large for copies.
        angles: decreasing, see `sampling_angles`.
        order: 1 takes all steps of first order, as denoisers need that were distilled, see `training.distil`.

    Returns:
        What `noise` at the first angle becomes at the last one; where that is 0, residuals, shaped like `noise`.
    """
    x, last, width = noise, None, 0.0
    for angle, following in itertools.pairwise(angles):
        step = angle - following
        expected = denoise(x, angle)
        ahead = step / (2 * width) if order == 2 and last is not None and following > 0 else 0.0
        middle = expected if last is None else last.lerp_(expected, 1 + ahead)
        x.mul_(math.sin(following) / math.sin(angle)).add_(middle, alpha=math.sin(step) / math.sin(angle))
        last, width = (expected, step) if order == 2 else (None, 0.0)
        del expected, middle  # else the next evaluation has one field more in memory
    return x


def reached_by_step(noised: Tensor, expected: Tensor, angle: float, following: float) -> Tensor:
    """Where one step of first order leads from `noised` at `angle`; `sample` does it in place, this for gradients."""
    return noised * (math.sin(following) / math.sin(angle)) + expected * (math.sin(angle - following) / math.sin(angle))


def residual_of_step(noised: Tensor, reached: Tensor, angle: float, following: float) -> Tensor:
    """Residual that a denoiser must expect at `angle` for one step of first order to lead from noised to reached."""
    kept = math.sin(following) / math.sin(angle)
    return (reached - kept * noised) * (math.sin(angle) / math.sin(angle - following))


def ancestral_sample(
    denoise: Callable[[Tensor, float], Tensor], noise: Callable[[], Tensor], beta: float, steps: int = SCHEDULE_STEPS
) -> Tensor:
    """Draw residuals by ancestral sampling over the whole schedule (Ho et al., arXiv 2006.11239), as the authors do.

    One evaluation per step. Only the reference in evaluation uses it; `sample` needs a hundredth of the evaluations.

    Args:
        denoise: maps (noised residual, angle) to the expected residual.
        noise: draws standard normal noise of one shape.
        beta: noise amplitude, the last value of the linear schedule.
        steps: steps of the schedule; fewer than SCHEDULE_STEPS skip evenly.

    Returns:
        Residual, shaped like the noise.
    """
    betas = torch.linspace(BETA_START, beta, SCHEDULE_STEPS, dtype=torch.float64)
    kept = torch.cumprod(1 - betas, 0)[torch.linspace(0, SCHEDULE_STEPS - 1, steps).round().long()].tolist()
    x = noise()
    for i in reversed(range(steps)):
        now, before = kept[i], kept[i - 1] if i else 1.0
        step = now / before  # alpha of this step
        expected = denoise(x, math.acos(math.sqrt(now)))
        x = (math.sqrt(before) * (1 - step) * expected + math.sqrt(step) * (1 - before) * x) / (1 - now)
        if i:
            x = x + math.sqrt((1 - step) * (1 - before) / (1 - now)) * noise()
    return x
