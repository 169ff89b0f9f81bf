"""What the stages of a training minimise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stsr_core.diffusion import add_noise, drawn_noise, loss_weight, sampling_angle
from stsr_core.factors import Factor, FactorConfiguration

Loss = Callable[[nn.Module, Tensor, Tensor, FactorConfiguration, torch.Generator], Tensor]


def mean_loss(
    network: nn.Module, fine: Tensor, conditions: Tensor, configuration: FactorConfiguration, _: torch.Generator
) -> Tensor:
    """Mean squared error in transformed space; its minimum is the conditional mean."""
    return (network(conditions, configuration.factor, configuration.spacing_km).float() - fine).square().mean()


@dataclass(frozen=True)
class Residuals:
    """Residuals of patches around a trained mean network, of unit variance, and what denoisers see beside them.

    Attributes:
        values: (B, T, 1, H, W).
        expected: transformed conditional mean, shaped like `values`.
        conditions: conditioning frames, (B, T, C, H, W).
        configuration: of the factor.
    """

    values: Tensor
    expected: Tensor
    conditions: Tensor
    configuration: FactorConfiguration

    def denoised(self, network: nn.Module, noised: Tensor, angle: Tensor) -> Tensor:
        """Residuals that a denoiser expects at noise levels (B,), shaped like `noised`."""
        told = self.configuration.factor, self.configuration.spacing_km
        return network(noised, angle, self.expected, self.conditions, *told).float()

    def noise(self, generator: torch.Generator) -> Tensor:
        """Draw standard normal noise shaped like them, correlated as members' noise is."""
        return drawn_noise(self.values.shape, self.configuration.correlation, generator, self.values.device)


def residual_loss(
    mean: nn.Module, scales: Mapping[Factor, float], loss: Callable[[nn.Module, Residuals, torch.Generator], Tensor]
) -> Loss:
    """Return the loss of a denoiser around a trained mean network, of one of the residuals' scales by factor."""

    def whole(
        network: nn.Module,
        fine: Tensor,
        conditions: Tensor,
        configuration: FactorConfiguration,
        generator: torch.Generator,
    ) -> Tensor:
        factor = configuration.factor
        with torch.no_grad():
            expected = mean(conditions, factor, configuration.spacing_km).float()
        values = (fine - expected) / scales[factor]
        return loss(network, Residuals(values, expected, conditions, configuration), generator)

    return whole


def denoiser_loss(mean: nn.Module, scales: Mapping[Factor, float]) -> Loss:
    """Return the denoising loss around a trained mean network.

    Noise levels are drawn as densely as the sampler visits them, up to the end of the schedule of beta.
    """
    return residual_loss(mean, scales, _denoising)


def _denoising(network: nn.Module, residuals: Residuals, generator: torch.Generator) -> Tensor:
    # One stratified draw per patch covers the schedule evenly even in small batches.
    n, device = len(residuals.values), residuals.values.device
    u = (torch.arange(n, device=device) + torch.rand(n, generator=generator, device=device)) / n
    angle = sampling_angle(u, residuals.configuration.beta)
    levels = angle[:, None, None, None, None]
    noised = add_noise(residuals.values, residuals.noise(generator), levels)
    found = residuals.denoised(network, noised, angle)
    return (loss_weight(levels) * (found - residuals.values).square()).mean()
