import numpy as np
import pytest
import torch
from torch import nn

from stsr_core.diffusion import residual_of_step, sampling_angles
from stsr_core.factors import Factor, recipe
from stsr_core.training.distil import DISTILLED_EVALUATIONS, distillation_loss

CONFIGURATION = recipe(Factor(space=4, time=2))
VARIANCE = 0.3
FINE, CONDITIONS = torch.zeros(2, 6, 1, 8, 8), torch.zeros(2, 6, 5, 8, 8)


def deviation(angle: float) -> float:
    """Of a noised residual that is normal with VARIANCE."""
    return float(np.sqrt(np.cos(angle) ** 2 * VARIANCE + np.sin(angle) ** 2))


class Mean(nn.Module):
    def forward(self, conditions, factor, spacing_km):
        return torch.zeros_like(conditions[:, :, :1])


class Teacher(nn.Module):
    """Expects exactly what residuals of VARIANCE make likely."""

    def forward(self, noised, levels, mean, conditions, factor, spacing_km):
        angle = float(levels[0])
        return noised * np.cos(angle) * VARIANCE / deviation(angle) ** 2


class Student(nn.Module):
    """Goes where the noised residual's deviation, which the teacher leaves as it is on its way, leads in one step."""

    def forward(self, noised, levels, mean, conditions, factor, spacing_km):
        angles = sampling_angles(CONFIGURATION.beta, DISTILLED_EVALUATIONS)
        number = int(np.argmin(np.abs(np.array(angles) - float(levels[0]))))
        angle, following = angles[number : number + 2]
        return residual_of_step(noised, noised * deviation(following) / deviation(angle), angle, following)


def loss_of(network: nn.Module, seed: int) -> float:
    loss = distillation_loss(Mean(), Teacher(), {CONFIGURATION.factor: 1.0})
    return float(loss(network, FINE, CONDITIONS, CONFIGURATION, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("seed", range(6))
def test_the_best_student_goes_where_many_small_steps_of_its_teacher_lead(seed):
    assert loss_of(Student(), seed) < 0.06 * loss_of(Teacher(), seed)


def test_every_step_of_the_sampler_is_taught():
    asked = set()

    class Noted(Teacher):
        def forward(self, noised, levels, *others):
            asked.add(round(float(levels[0]), 5))
            return super().forward(noised, levels, *others)

    for seed in range(30):
        loss_of(Noted(), seed)
    assert asked == {round(a, 5) for a in sampling_angles(CONFIGURATION.beta, DISTILLED_EVALUATIONS)[:-1]}
