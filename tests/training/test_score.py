import numpy as np
import pytest
import scoringrules
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stsr_core.checkpoint import Served
from stsr_core.conservation import block_sums, conserve
from stsr_core.diffusion import correlated, residual_of_step, sample, sampling_angles
from stsr_core.factors import ConservationFunction, Factor, FactorConfiguration, recipe
from stsr_core.training.score import LEAST_TRANSFORMED, _amounts, conserved, fair_crps, score_loss, scores

CONFIGURATION = recipe(Factor(space=4, time=2))
SCALE_MM = 0.2
WIDTH = 0.4  # of the truth's residual


def showers(seed: int, shape: tuple[int, ...], share: float = 0.4) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.where(rng.random(shape) < share, rng.gamma(0.7, 4.0, shape), 0.0).astype(np.float32))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from([(4, 2), (1, 3), (5, 1)]), st.floats(0.1, 1.0))
def test_what_training_conserves_is_what_members_are(seed, factor, share):
    space, time = factor
    configuration = recipe(Factor(space=space, time=time))
    fine = showers(seed, (2, 3 * time, 3 * space, 4 * space), share)
    coarse = showers(seed + 1, (2, 3, 3, 4), share)
    wanted = conserve(fine, coarse, configuration.factor, configuration.conservation)
    torch.testing.assert_close(conserved(fine, coarse, configuration), wanted, rtol=1e-4, atol=1e-4)


def test_gradients_know_that_the_amount_of_a_block_stays():
    fine, coarse = showers(3, (1, 4, 8, 8), 1.0).requires_grad_(), showers(4, (1, 2, 2, 2), 1.0)
    factor = CONFIGURATION.factor
    result = conserved(fine, coarse, CONFIGURATION)
    (of_cell,) = torch.autograd.grad(result[0, 0, 0, 0], fine, retain_graph=True)
    (of_block,) = torch.autograd.grad(block_sums(result, factor)[0, 0, 0, 0], fine)
    assert of_cell.abs().max() > 0.05
    assert of_block.abs().max() < 1e-4


def test_dry_cells_have_a_gradient_too():
    fine = torch.zeros(1, 2, 4, 4)
    fine[0, 0, :2] = 5.0
    fine.requires_grad_()
    result = conserved(fine, torch.full((1, 1, 1, 1), 0.5), CONFIGURATION)
    (found,) = torch.autograd.grad(result[0, 1, 3, 3], fine)
    assert (result > 0).sum() == 8
    assert found[0, 1, 3, 3] > 0.01


def test_the_score_of_two_members_is_the_fair_crps():
    fields = [showers(seed, (3, 4, 5)) for seed in range(3)]
    expected = scoringrules.crps_ensemble(
        fields[2].numpy(), np.stack([f.numpy() for f in fields[:2]]), m_axis=0, estimator="fair", backend="numpy"
    )
    np.testing.assert_allclose(fair_crps(*fields).numpy(), expected, atol=1e-5)


def rough_and_smooth(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rain that is alike in neighbouring cells, and the same amounts cell by cell without any neighbourhood."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((n, 4, 40, 40), generator=generator)
    smooth = torch.nn.functional.avg_pool2d(noise, 9, stride=1, padding=4, count_include_pad=False)
    smooth = (3.0 * smooth / smooth.std()).clamp(min=0)
    order = torch.randperm(n * 4, generator=generator)
    rough = torch.stack([f[:, torch.randperm(40, generator=generator)] for f in smooth.flatten(0, 1).transpose(-1, -2)])
    rough = torch.stack([f[:, torch.randperm(40, generator=generator)] for f in rough.transpose(-1, -2)])
    return smooth, rough[order].reshape_as(smooth)


WRONG = {
    "wetter": lambda f: 1.3 * f,
    "drier": lambda f: 0.6 * f,
    "narrow": lambda f: f.mean() + 0.5 * (f - f.mean()),
    "drizzle": lambda f: f.clamp(min=0.1),
}


@pytest.mark.parametrize("wrong", ["rough", *WRONG])
def test_members_like_the_truth_score_best(wrong):
    smooth, rough = rough_and_smooth(120)
    truth, *members = smooth.split(40)
    others = rough[40:].split(40) if wrong == "rough" else [WRONG[wrong](f) for f in members]
    assert scores(*others, truth) > 1.01 * scores(*members, truth)


class Mean(nn.Module):
    def forward(self, conditions, factor, spacing_km):
        return torch.ones_like(conditions[:, :, :1])


class Student(nn.Module):
    """Leads from noise to residuals of a width that is learned."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = nn.Parameter(torch.tensor(width))

    def forward(self, noised, levels, mean, conditions, factor, spacing_km):
        angles = sampling_angles(CONFIGURATION.beta, 2)
        if float(levels[0]) > angles[1] + 1e-6:
            return residual_of_step(noised, noised, angles[0], angles[1])
        return residual_of_step(noised, self.width * noised, angles[1], angles[2])


UNCUT = CONFIGURATION.model_copy(update={"conservation": ConservationFunction(threshold_mm=0.0, excess=4.0)})


def score_of(student: Student, seed: int, configuration: FactorConfiguration = UNCUT) -> torch.Tensor:
    """Of members whose residuals are as wide as those of the truth if the student's width is 1."""
    served = Served(configuration=configuration, residual_scale=WIDTH, evaluations=2)
    generator = torch.Generator().manual_seed(seed)
    fine = 1 + WIDTH * torch.randn((4, 6, 1, 16, 16), generator=generator)
    loss = score_loss(Mean(), {configuration.factor: served}, SCALE_MM)
    return loss(student, fine, torch.zeros(4, 6, 5, 16, 16), configuration, generator)


@pytest.mark.parametrize("begun", [0.3, 2.0])
def test_training_by_scores_finds_the_spread_of_the_truth(begun):
    student = Student(begun)
    optimiser = torch.optim.Adam(student.parameters(), lr=0.05)
    for step in range(60):
        optimiser.zero_grad()
        score_of(student, step).backward()
        optimiser.step()
    assert student.width.item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("width", [0.5, 0.8, 1.3])
@pytest.mark.parametrize("configuration", [CONFIGURATION, UNCUT])
def test_gradients_say_how_the_score_changes(width, configuration):
    student, near = Student(width), 0.05
    score_of(student, 0, configuration).backward()
    with torch.no_grad():
        above, below = (score_of(Student(width + d), 0, configuration) for d in (near, -near))
    assert student.width.grad.item() == pytest.approx((above - below).item() / (2 * near), abs=0.02)


class Level(nn.Module):
    """Leads from noise to one residual everywhere, which is learned."""

    def __init__(self, residual: float) -> None:
        super().__init__()
        self.residual = nn.Parameter(torch.tensor(residual))

    def forward(self, noised, levels, mean, conditions, factor, spacing_km):
        return self.residual * torch.ones_like(noised)


@pytest.mark.parametrize("rain", [0.0, 0.02])
def test_members_that_are_far_drier_than_dry_come_back(rain):
    network = Level(-20.0)
    optimiser = torch.optim.Adam(network.parameters(), lr=0.3)
    served = Served(configuration=CONFIGURATION, residual_scale=WIDTH, evaluations=2)
    loss = score_loss(Mean(), {CONFIGURATION.factor: served}, SCALE_MM)
    dry = rain * (showers(0, (1, 6, 1, 8, 8)) > 0)
    for step in range(100):
        optimiser.zero_grad()
        generator = torch.Generator().manual_seed(step)
        loss(network, dry, torch.zeros(1, 6, 5, 8, 8), CONFIGURATION, generator).backward()
        optimiser.step()
    assert 1 + WIDTH * network.residual.item() > LEAST_TRANSFORMED - 0.3


def test_members_without_rain_are_driven_to_more_but_not_to_less():
    dry = torch.full((3,), -1.0, requires_grad=True)
    (found,) = torch.autograd.grad((_amounts(dry, SCALE_MM) * torch.tensor([-1.0, 0.0, 1.0])).sum(), dry)
    assert found[0] < 0
    assert found[1] == found[2] == 0


@pytest.mark.parametrize("spacing", [1, 4])
def test_members_in_training_are_those_of_the_sampler(monkeypatch, spacing):
    from stsr_core.training import score

    seen = []
    monkeypatch.setattr(score, "scores", lambda first, second, truth: seen.append((first, second)) or first.mean())
    served = Served(configuration=CONFIGURATION, residual_scale=WIDTH, spread=1.2, evaluations=2)
    student, fine = Student(1.3), 1 + showers(5, (2, 6, 1, 8, 8))
    loss = score_loss(Mean(), {CONFIGURATION.factor: served}, SCALE_MM)
    conditions, told = torch.zeros(2, 6, 5, 8, 8), CONFIGURATION.told(spacing)
    with torch.no_grad():
        loss(student, fine, conditions, told, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    truth = torch.expm1(fine[:, :, 0]) * SCALE_MM
    coarse = block_sums(truth, CONFIGURATION.factor) / CONFIGURATION.factor.space**2
    for member in seen[0]:
        noise = torch.randn((2, 8, 10, 10) if spacing > 1 else (2, 6, 8, 8), generator=generator)
        noise = (correlated(noise, told.correlation) if spacing > 1 else noise)[:, :, None]

        def denoise(noised, angle):
            return student(noised, torch.full((len(noised),), angle), None, conditions, CONFIGURATION.factor, spacing)

        with torch.no_grad():
            residual = sample(denoise, noise, sampling_angles(CONFIGURATION.beta, 2), order=1)
        raw = torch.expm1(1 + 1.2 * WIDTH * residual)[:, :, 0] * SCALE_MM
        expected = conserve(raw, coarse, CONFIGURATION.factor, CONFIGURATION.conservation)
        torch.testing.assert_close(member, expected, rtol=1e-3, atol=1e-3)
