"""The denoiser of the residual diffusion model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stsr_core.networks.layers import VideoUNet
from stsr_core.networks.mean import CONDITION_CHANNELS, factor_context

if TYPE_CHECKING:
    from stsr_core.factors import Factor
    from stsr_core.networks.layers import Cells

NOISE_FREQUENCIES = 4


class Denoiser(nn.Module):
    """Predicts the residual from the noised residual, see `diffusion`.

    The U-Net returns an estimate and a gate for every cell: residual = estimate + (1 - gate) * cos(angle) * noised.
    Noise differs from cell to cell, more than the U-Net can carry at half resolution; the gate lets it pass or
    stops it at full resolution. Where no rain can be, the gate closes and cells come out exactly alike.
    """

    def __init__(self, channels: tuple[int, ...], *, attention: bool = True, statics: int = 0) -> None:
        super().__init__()
        self.unet = VideoUNet(
            CONDITION_CHANNELS + statics + 2, 2, channels, 2 + 2 * NOISE_FREQUENCIES, attention=attention
        )

    def forward(
        self,
        noisy: Tensor,
        angle: Tensor,
        mean: Tensor,
        condition: Tensor,
        factor: Factor,
        spacing_km: float = 1.0,
        cut: Cells = (0, 0),
    ) -> Tensor:
        """Predict the residual.

        Args:
            noisy: noised residual of unit variance, (B, T, 1, H, W).
            angle: noise level as an angle in 0..pi/2, (B,).
            mean: transformed conditional mean, (B, T, 1, H, W).
            condition: (B, T, CONDITION_CHANNELS + statics, H, W).
            factor: (s, t).
            spacing_km: of the fine grid.
            cut: see `VideoUNet`.

        Returns:
            Expected residual, (B, T, 1, H, W).
        """
        octaves = angle[:, None] * 2.0 ** torch.arange(NOISE_FREQUENCIES, device=angle.device)
        context = torch.cat((octaves.sin(), octaves.cos(), factor_context(factor, len(angle), angle.device)), dim=1)
        frames = torch.cat((noisy, mean, condition), dim=2)
        estimate, gate = self.unet(frames, context, spacing_km, cut).chunk(2, dim=2)
        return estimate + (1 - gate) * angle.cos()[:, None, None, None, None] * noisy
