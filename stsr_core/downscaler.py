"""The two networks of a checkpoint at work on windows: coarse window in, ensemble window out.

No files but the checkpoint, no Dask, no Prefect.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stsr_core.checkpoint import Checkpoint, Served
from stsr_core.conservation import conserve
from stsr_core.diffusion import sampling_angles
from stsr_core.errors import CheckpointError, ConfigurationError
from stsr_core.factors import Factor
from stsr_core.networks.denoiser import Denoiser
from stsr_core.networks.mean import MeanNetwork
from stsr_core.networks.transform import condition, linear_interpolation, to_amount


def choose_device(wanted: str) -> torch.device:
    """Return the device for "auto", "cpu" or "cuda".

    Raises:
        ConfigurationError: "cuda" where torch sees no GPU.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            "Device cuda is asked for, but torch sees no GPU here. Use --device auto or cpu, or mend the driver."
        )
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def load_networks(checkpoint: Checkpoint) -> tuple[MeanNetwork, Denoiser]:
    """Build the two networks of a checkpoint, on the CPU.

    Raises:
        CheckpointError: weights damaged, or of other shapes than the card says.
    """
    card, weights = checkpoint.card, checkpoint.weights()
    a = card.architecture
    networks = (
        MeanNetwork(a.mean_channels, attention=a.attention, statics=len(card.statics)),
        Denoiser(a.denoiser_channels, attention=a.attention, statics=len(card.statics)),
    )
    for name, network in zip(("mean", "denoiser"), networks, strict=True):
        part = {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")}
        try:
            network.load_state_dict(part)
        except RuntimeError as e:
            raise CheckpointError(
                f"The weights of checkpoint {card.name} do not fit the architecture on its card ({name} network): "
                f"{e}. Restore card and weights from one release."
            ) from e
    return networks


@dataclass(frozen=True)
class Downscaler:
    """Networks of one checkpoint, ready for one factor on one device."""

    served: Served
    scale_mm: float
    mean_network: nn.Module
    denoiser: nn.Module
    device: torch.device

    @classmethod
    def load(cls, checkpoint: Checkpoint, factor: Factor, device: torch.device) -> Downscaler:
        """Load the weights.

        Raises:
            CheckpointError: weights damaged, of other shapes than the card says, or factor not served.
        """
        networks = load_networks(checkpoint)
        for network in networks:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            network.to(device).eval().requires_grad_(False)
        card = checkpoint.card
        return cls(card.serving(factor), card.transform.scale_mm, *networks, device)

    @property
    def factor(self) -> Factor:
        """The factor it serves."""
        return self.served.configuration.factor

    def angles(self, evaluations: int | None = None) -> list[float]:
        """Noise levels of the sampler; `evaluations` overrides the checkpoint's number of network evaluations."""
        return sampling_angles(self.served.configuration.beta, evaluations or self.served.evaluations)

    @contextmanager
    def _precision(self) -> Iterator[None]:
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            yield

    def condition(self, coarse: Tensor, statics: Tensor | None = None) -> Tensor:
        """Conditioning frames of a coarse block with halo, see `networks.transform.condition`."""
        fields = None if statics is None else statics.to(self.device)
        return condition(coarse.to(self.device), self.factor, self.scale_mm, fields)

    def linear(self, coarse: Tensor) -> Tensor:
        """Linear interpolation of a coarse block with halo [mm per fine step], the plainest baseline."""
        return linear_interpolation(coarse.to(self.device), self.factor)

    def mean(self, conditions: Tensor) -> Tensor:
        """Transformed conditional mean of windows, (B, T, 5 + S, H, W) to (B, T, 1, H, W), float32."""
        with self._precision():
            return self.mean_network(conditions, self.factor).float()

    def expected_residual(self, noisy: Tensor, angle: float, mean: Tensor, conditions: Tensor) -> Tensor:
        """Residual that the denoiser expects in windows at one noise level, unit variance, (B, T, 1, H, W)."""
        with self._precision():
            angles = torch.full((len(noisy),), angle, device=self.device)
            return self.denoiser(noisy, angles, mean, conditions, self.factor).float()

    def amounts(self, mean: Tensor, residual: Tensor) -> Tensor:
        """Amounts [mm per fine step] of a transformed mean and a residual of unit variance, >= 0."""
        return to_amount(mean + self.served.residual_scale * residual, self.scale_mm)

    def conserve(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Scale fine amounts to their coarse totals by the configuration's f, see `conservation.conserve`."""
        return conserve(fine, coarse, self.factor, self.served.configuration.conservation)
