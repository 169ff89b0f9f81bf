"""The two networks of a checkpoint at work on windows: coarse window in, ensemble window out.

No files but the checkpoint, no Dask, no Prefect.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from stsr_core.checkpoint import Architecture, Checkpoint, Served
from stsr_core.conservation import conserve
from stsr_core.diffusion import sample, sampling_angles
from stsr_core.errors import CheckpointError, ConfigurationError
from stsr_core.factors import Factor
from stsr_core.networks.denoiser import Denoiser
from stsr_core.networks.layers import Cells
from stsr_core.networks.mean import MeanNetwork
from stsr_core.networks.transform import condition, linear_interpolation, pycnophylactic_gain, to_signed_amount

Network = TypeVar("Network", bound=nn.Module)

BATCH_BYTES = 400  # memory that a network call takes per fine cell-step, generously: in bfloat16 it is about 150
BATCH_SHARE = 0.25  # of a GPU's memory that one call may take
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(wanted: str) -> torch.device:
    """Return the device for "auto", "cpu" or "cuda".

    Raises:
        ConfigurationError: another name, or "cuda" where torch sees no GPU.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise ConfigurationError(f"{wanted!r} is no device. Name auto, cpu or cuda.")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            "Device cuda is asked for, but torch sees no GPU here. Use --device auto or cpu, or mend the driver."
        )
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def native_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself; CPUs that do not take five times as long as in single precision."""
    return device.type != "cpu" or bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def build_networks(architecture: Architecture, statics: int = 0) -> tuple[MeanNetwork, Denoiser]:
    """Build the two networks with random weights; `statics` is the number of static fields they see."""
    a = architecture
    return (
        MeanNetwork(a.mean_channels, attention=a.attention, statics=statics),
        Denoiser(a.denoiser_channels, attention=a.attention, statics=statics),
    )


def load_networks(checkpoint: Checkpoint, *, teacher: bool = False) -> tuple[MeanNetwork, Denoiser]:
    """Build the two networks of a checkpoint, on the CPU.

    Args:
        checkpoint: card and weights.
        teacher: take the denoiser that the checkpoint's was distilled from, where it was.

    Raises:
        CheckpointError: weights damaged, or of other shapes than the card says.
    """
    card, weights = checkpoint.card, checkpoint.weights()
    networks = build_networks(card.architecture, len(card.statics))
    for name, network in zip(("mean", "teacher" if teacher and card.distilled else "denoiser"), networks, strict=True):
        part = {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")}
        try:
            network.load_state_dict(part)
        except RuntimeError as e:
            raise CheckpointError(
                f"The weights of checkpoint {card.name} do not fit the architecture on its card ({name} network): "
                f"{e}. Restore card and weights from one release."
            ) from e
    return networks


def _only_run(network: nn.Module) -> None:
    """Make a network ready to run, and only that."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.eval().requires_grad_(False)


def _put(network: Network, device: torch.device, precision: torch.dtype) -> Network:
    """Copy a network to a device, with the weights of its layers as they are multiplied there."""
    put = copy.deepcopy(network).to(device)
    for layer in put.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.to(precision)
    return put


@dataclass(frozen=True)
class Downscaler:
    """Networks of one checkpoint, ready for one factor on one device.

    Attributes:
        served: factor configuration, residual scale and network evaluations.
        scale_mm: constant of the transform.
        mean_network: conditional mean.
        denoiser: of the residual.
        device: where they are.
        precision: in which they compute.
        batch_cells: fine cell-steps that one call may hold, so that windows and members fill the device; 0 takes
            one window of one member at a time. Fixed by the kind of device, as results depend on it by rounding.
    """

    served: Served
    scale_mm: float
    mean_network: MeanNetwork
    denoiser: Denoiser
    device: torch.device
    precision: torch.dtype = torch.float32
    batch_cells: int = 0

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, factor: Factor, device: torch.device, *, precision: str = "auto"
    ) -> Downscaler:
        """Load the weights, for a fine grid of 1 km until `told`; see `on` for the precision.

        Raises:
            CheckpointError: weights damaged, of other shapes than the card says, or factor not served.
        """
        networks = load_networks(checkpoint)
        for network in networks:
            _only_run(network)
        card = checkpoint.card
        loaded = cls(card.serving(factor), card.transform.scale_mm, *networks, torch.device("cpu"))
        return loaded.on(device, precision=precision)

    def told(self, spacing_km: int) -> Downscaler:
        """The same on a fine grid of another spacing."""
        return replace(self, served=self.served.told(spacing_km))

    def on(self, device: torch.device, *, precision: str = "auto") -> Downscaler:
        """Put the networks on a device.

        Args:
            device: where they are to be.
            precision: "float32", "bfloat16", or "auto" for bfloat16 on GPUs only.
        """
        gpu = device.type == "cuda"
        chosen = PRECISIONS["bfloat16" if gpu else "float32"] if precision == "auto" else PRECISIONS[precision]
        if chosen is torch.float32:
            torch.backends.cudnn.allow_tf32 = False  # as on CPUs, to the last digits
        memory = torch.cuda.get_device_properties(device).total_memory if gpu else 0
        put = replace(
            self, mean_network=_put(self.mean_network, device, chosen), denoiser=_put(self.denoiser, device, chosen),
            device=device, precision=chosen, batch_cells=int(BATCH_SHARE * memory) // BATCH_BYTES,
        )  # fmt: skip
        if gpu:
            torch.cuda.synchronize(device)  # streams of shards do not wait for the one that copies
        return put

    def teacher(self, checkpoint: Checkpoint) -> Downscaler:
        """The same with the denoiser that this one was distilled from; itself where it was not."""
        if self.served.teacher is None:
            return self
        _, denoiser = load_networks(checkpoint, teacher=True)
        _only_run(denoiser)
        return replace(self, served=self.served.taught, denoiser=_put(denoiser, self.device, self.precision))

    @property
    def factor(self) -> Factor:
        """The factor it serves."""
        return self.served.configuration.factor

    def residual(self, denoise: Callable[[Tensor, float], Tensor], noise: Tensor) -> Tensor:
        """Draw a residual of unit variance by what `denoise` makes of `expected_residual`, see `diffusion.sample`."""
        angles = sampling_angles(self.served.configuration.beta, self.served.evaluations)
        return sample(denoise, noise, angles, order=2 if self.served.teacher is None else 1)

    @contextmanager
    def _precision(self) -> Iterator[None]:
        half = self.precision is not torch.float32
        with torch.inference_mode(), torch.autocast(self.device.type, self.precision, enabled=half):
            yield

    def condition(self, coarse: Tensor, statics: Tensor | None = None, log_gain: Tensor | None = None) -> Tensor:
        """Conditioning frames of a coarse block with halo, see `networks.transform.condition`."""
        fields = None if statics is None else statics.to(self.device)
        return condition(coarse.to(self.device), self.factor, self.scale_mm, fields, log_gain)

    def pycnophylactic_gain(self, coarse: Tensor) -> Tensor:
        """What `condition` takes longest to make of a coarse block with halo, see `networks.transform`."""
        return pycnophylactic_gain(coarse, self.factor.space)

    def linear(self, coarse: Tensor) -> Tensor:
        """Linear interpolation of a coarse block with halo [mm per fine step], the plainest baseline."""
        return linear_interpolation(coarse.to(self.device), self.factor)

    def mean(self, conditions: Tensor, cut: Cells = (0, 0)) -> Tensor:
        """Transformed conditional mean of windows, (B, T, 5 + S, H, W) to (B, T, 1, H, W), float32.

        Where the windows were cut off of larger ones, `cut` says how much before them, see `networks.layers`.
        """
        with self._precision():
            return self.mean_network(conditions, self.factor, self.served.configuration.spacing_km, cut).float()

    def expected_residual(
        self, noisy: Tensor, angle: float, mean: Tensor, conditions: Tensor, cut: Cells = (0, 0)
    ) -> Tensor:
        """Residual that the denoiser expects in windows at one noise level, unit variance, (B, T, 1, H, W)."""
        with self._precision():
            angles = torch.full((len(noisy),), angle, device=self.device)
            spacing = self.served.configuration.spacing_km
            return self.denoiser(noisy, angles, mean, conditions, self.factor, spacing, cut).float()

    def amounts(self, mean: Tensor, residual: Tensor) -> Tensor:
        """Amounts [mm per fine step] of a transformed mean and a residual of unit variance; below 0 where dry."""
        return to_signed_amount(mean + self.served.width * residual, self.scale_mm)

    def conserve(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Scale fine amounts to their coarse totals by the configuration's f, see `conservation.conserve`."""
        return conserve(fine, coarse, self.factor, self.served.configuration.conservation)
