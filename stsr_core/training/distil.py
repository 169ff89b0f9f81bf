"""Distillation: a denoiser that goes several steps of its sampler at once.

A denoiser expects the mean of all residuals that a noised one may have been, and only small steps along such means lead
to one of them. Yet where its sampler ends up from a noise level, at one far below, is a function of the noised
residual, and can be learned (progressive distillation, Salimans and Ho, arXiv 2202.00512): the student of a denoiser
makes a member in DISTILLED_EVALUATIONS steps of first order.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from stsr_core.diffusion import add_noise, loss_weight, residual_of_step, sample, sampling_angles
from stsr_core.factors import Factor
from stsr_core.training.losses import Loss, Residuals, residual_loss

DISTILLED_EVALUATIONS = 2  # CRPS is that of 8 of the teacher, within 0.3 %, on validation windows at (8,3) and (25,6)
TEACHER_STEPS = 4  # that the teacher takes for one of the student, as in its own sampler
RATE_SHARE = 0.4  # of the learning rate of the denoiser, near which the student begins


def distillation_loss(mean: nn.Module, teacher: nn.Module, scales: Mapping[Factor, float]) -> Loss:
    """Squared error of where one step leads, against where TEACHER_STEPS of the teacher lead.

    Weighted as the teacher's loss was. One step of the sampler for all patches of a batch, by the generator's seed.
    """
    return residual_loss(mean, scales, partial(_one_step, teacher))


def _one_step(teacher: nn.Module, student: nn.Module, residuals: Residuals, generator: torch.Generator) -> Tensor:
    number = generator.initial_seed() % DISTILLED_EVALUATIONS  # a draw from it would wait for the device
    first, last = (n / DISTILLED_EVALUATIONS for n in (number, number + 1))
    # The teacher's last step, to no noise, is of first order; it takes one more there.
    angles = sampling_angles(residuals.configuration.beta, TEACHER_STEPS + (last == 1), first=first, last=last)

    def denoise(network: nn.Module, noised: Tensor, angle: float) -> Tensor:
        return residuals.denoised(network, noised, torch.full((len(noised),), angle, device=noised.device))

    with torch.no_grad():
        noised = add_noise(residuals.values, residuals.noise(generator), torch.tensor(angles[0]))
        reached = sample(partial(denoise, teacher), noised.clone(), angles)
    wanted = residual_of_step(noised, reached, angles[0], angles[-1])
    found = denoise(student, noised, angles[0])
    return loss_weight(torch.tensor(angles[0])) * (found - wanted).square().mean()
