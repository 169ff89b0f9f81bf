"""The conditional mean network: E[fine | coarse] in transformed space."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stsr_core.networks.layers import VideoUNet

if TYPE_CHECKING:
    from stsr_core.factors import Factor
    from stsr_core.networks.layers import Cells

CONDITION_CHANNELS = 5  # pycnophylactic and linear interpolation, phase in y, x and t
LINEAR_CHANNEL = 1  # the linear interpolation among them


@lru_cache
def _seen(space: int, time: int, device: torch.device) -> Tensor:
    """log2 of a factor, scaled to about 0..1; copied once, as a GPU would stop for it at every call of a network."""
    with torch.inference_mode(mode=False):  # training uses it too
        return (torch.tensor([float(space), float(time)]).log2() / 4.0).to(device)


def factor_context(factor: Factor, batch: int, device: torch.device) -> Tensor:
    """Return the factor as the networks see it, (B, 2): log2 of space and time, scaled to about 0..1."""
    return _seen(factor.space, factor.time, device).expand(batch, 2)


class MeanNetwork(nn.Module):
    """Predicts the transformed conditional mean as a correction to linear interpolation."""

    def __init__(self, channels: tuple[int, ...], *, attention: bool = True, statics: int = 0) -> None:
        super().__init__()
        self.unet = VideoUNet(CONDITION_CHANNELS + statics, 1, channels, 2, attention=attention)

    def forward(self, condition: Tensor, factor: Factor, spacing_km: float = 1.0, cut: Cells = (0, 0)) -> Tensor:
        """Predict the mean.

        Args:
            condition: (B, T, CONDITION_CHANNELS + statics, H, W), see `networks.transform.condition`.
            factor: (s, t).
            spacing_km: of the fine grid.
            cut: see `VideoUNet`.

        Returns:
            Transformed amount, (B, T, 1, H, W).
        """
        correction = self.unet(condition, factor_context(factor, len(condition), condition.device), spacing_km, cut)
        return condition[:, :, LINEAR_CHANNEL : LINEAR_CHANNEL + 1] + correction
