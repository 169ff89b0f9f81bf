import math

import numpy as np
import pytest
import torch

from stsr_core.diffusion import (
    add_noise,
    ancestral_sample,
    correlated,
    largest_angle,
    loss_weight,
    noise_angle,
    residual_of_step,
    sample,
    sampling_angles,
)
from stsr_core.factors import NoiseCorrelation


@pytest.mark.parametrize(("beside", "before"), [(0.0, 0.0), (0.06, 0.6), (0.3, 0.9)])
def test_correlated_noise_has_unit_variance_and_the_correlations_of_a_moving_average(beside, before):
    white = torch.randn(60, 203, 203, generator=torch.Generator().manual_seed(0))
    noise = correlated(white, NoiseCorrelation(beside=beside, before=before))
    assert noise.shape == (58, 201, 201)
    assert noise.square().mean().item() == pytest.approx(1.0, abs=0.01)
    of_cells = 2 * beside / (1 + 2 * beside**2)
    of_steps = (before + before**3) / (1 + before**2 + before**4)
    for axis, expected in enumerate((of_steps, of_cells, of_cells)):
        n = noise.shape[axis] - 1
        found = (noise.narrow(axis, 0, n) * noise.narrow(axis, 1, n)).mean().item()
        assert found == pytest.approx(expected, abs=0.01)


def test_noise_grows_along_the_schedule_and_with_beta():
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    small, large = noise_angle(u, 0.01), noise_angle(u, 0.035)
    assert small[0] == 0
    assert (small.diff() > 0).all()
    assert (large[1:] > small[1:]).all()
    assert large[-1] < math.pi / 2


@pytest.mark.parametrize("beta", [0.01, 0.02, 0.035])
def test_schedule_is_the_limit_of_the_discrete_one(beta):
    # Product of (1 - beta_i) over the linear schedule of the paper's 1000 steps.
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, beta, 1000))
    u = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)
    discrete = np.arccos(np.sqrt(alpha_bar[[249, 499, 999]]))
    np.testing.assert_allclose(noise_angle(u, beta), discrete, rtol=0.01)


def test_noising_keeps_the_variance_and_the_loss_weight_is_that_of_v_prediction():
    residual, noise = torch.randn(2, 100_000)
    angle = torch.tensor(0.7)
    noisy = add_noise(residual, noise, angle)
    assert float(noisy.var()) == pytest.approx(1.0, rel=0.02)
    # An error e of the residual is an error e / sin(angle) of the velocity (cos * noisy - residual) / sin.
    guess = residual + 0.3
    velocity, guessed = ((angle.cos() * noisy - r) / angle.sin() for r in (residual, guess))
    error = (guessed - velocity).square().mean()
    assert float(loss_weight(angle) * 0.09) == pytest.approx(float(error), rel=0.03)
    assert float(loss_weight(torch.tensor(0.0))) == pytest.approx(100.0)


def gaussian_denoiser(covariance: torch.Tensor):
    """Exact E[residual | noised residual] for residual ~ N(0, covariance): a linear filter."""

    def denoise(noisy: torch.Tensor, angle: float) -> torch.Tensor:
        cos, sin = math.cos(angle), math.sin(angle)
        gain = cos * covariance @ torch.linalg.inv(cos**2 * covariance + sin**2 * torch.eye(len(covariance)))
        return noisy @ gain.T

    return denoise


@pytest.mark.parametrize(("beta", "evaluations", "tolerance"), [(0.02, 8, 0.06), (0.02, 32, 0.02), (0.035, 8, 0.06)])
def test_sampler_draws_the_covariance_of_an_analytic_gaussian(beta, evaluations, tolerance):
    torch.manual_seed(0)
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    noise = torch.randn(100_000, 2)
    drawn = sample(gaussian_denoiser(covariance), noise, sampling_angles(beta, evaluations))
    assert drawn.mean(dim=0).abs().max() < 0.02
    np.testing.assert_allclose(drawn.T.cov(), covariance, atol=tolerance)


def test_ancestral_sampling_draws_the_covariance_of_an_analytic_gaussian():
    torch.manual_seed(0)
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    drawn = ancestral_sample(gaussian_denoiser(covariance), lambda: torch.randn(50_000, 2), 0.02)
    np.testing.assert_allclose(drawn.T.cov(), covariance, atol=0.03)


def test_ancestral_sampling_keeps_to_the_noise_levels_of_its_schedule():
    torch.manual_seed(0)
    off = []

    def denoise(noisy: torch.Tensor, angle: float) -> torch.Tensor:
        off.append(float(noisy.std()) / math.sin(angle))
        return torch.zeros_like(noisy)  # all there is to draw

    drawn = ancestral_sample(denoise, lambda: torch.randn(50_000), 0.02, steps=12)
    assert len(off) == 12
    np.testing.assert_allclose(off, 1.0, atol=0.02)
    assert drawn.std() < 0.02


def test_smaller_noise_amplitude_gives_less_spread():
    # The end of a short schedule still holds signal that pure noise does not have: members agree more.
    denoise = gaussian_denoiser(torch.eye(2))
    noise = torch.randn(10_000, 2)
    spread = [
        float(sample(lambda x, a: 0.5 * denoise(x, a), noise.clone(), sampling_angles(b, 16)).std())
        for b in (0.002, 0.02)
    ]
    assert spread[0] < 0.95 * spread[1]


def test_sampling_angles_fall_from_the_end_of_the_schedule_to_zero_in_growing_steps():
    angles = sampling_angles(0.02, 8)
    assert len(angles) == 9
    assert angles[0] == pytest.approx(largest_angle(0.02))
    assert angles[-1] == 0.0
    steps = -np.diff(angles)
    assert (np.diff(steps) > 0).all()


@pytest.mark.parametrize(("angle", "following"), [(1.5, 1.2), (0.7, 0.1), (0.4, 0.0)])
def test_a_step_of_first_order_leads_where_its_residual_says(angle, following):
    noised, reached = torch.randn(2, 5, 7)
    wanted = residual_of_step(noised, reached, angle, following)
    found = sample(lambda x, a: wanted.clone(), noised.clone(), [angle, following], order=1)
    torch.testing.assert_close(found, reached)


def test_the_second_order_needs_fewer_steps_than_the_first():
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    noise = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(0))
    off = [
        float((sample(gaussian_denoiser(covariance), noise.clone(), sampling_angles(0.02, 8), order=order).T.cov()
               - covariance).abs().max())
        for order in (1, 2)
    ]  # fmt: skip
    assert off[1] < 0.5 * off[0]
