"""Presets of training: how large the networks are, and how long each is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from stsr_core.checkpoint import Architecture


class PresetName(StrEnum):
    """Size of the networks."""

    small = "small"
    base = "base"
    large = "large"


class RecipeName(StrEnum):
    """Whose beta and L a training takes."""

    stsr = "stsr"
    authors = "authors"


@dataclass(frozen=True)
class Preset:
    """Size of the networks and length of their training."""

    architecture: Architecture
    mean_steps: int
    denoiser_steps: int
    distil_steps: int
    score_steps: int
    cells_per_step: int  # fine cell-steps per step and rank
    learning_rate: float = 1e-3
    save_every: int = 100
    calibration_patches: int = 16  # per factor, that the spread of members is chosen on


PRESETS: Mapping[PresetName, Preset] = {
    PresetName.small: Preset(
        Architecture(mean_channels=(32, 64, 96, 96), denoiser_channels=(32, 64, 96, 128)),
        1600, 4000, 2500, 1500, 300_000,
    ),
    PresetName.base: Preset(
        Architecture(mean_channels=(64, 128, 192, 256), denoiser_channels=(96, 192, 256, 384)),
        40_000,
        100_000,
        30_000,
        20_000,
        4_000_000,
    ),
    PresetName.large: Preset(
        Architecture(mean_channels=(96, 192, 256, 384), denoiser_channels=(160, 320, 384, 512)),
        60_000, 200_000, 50_000, 30_000, 8_000_000,
    ),
}  # fmt: skip
