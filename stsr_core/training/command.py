"""From the arguments of `stsr train` to a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from stsr_core.checkpoint import Checkpoint
from stsr_core.downscaler import choose_device
from stsr_core.errors import SourceError
from stsr_core.factors import Factor, recipe
from stsr_core.training.fit import PRESETS, Run, Training, fit
from stsr_core.training.patches import load_archive


def netcdf_files(paths: Sequence[Path]) -> list[Path]:
    """Expand folders to the NetCDF files in them.

    Raises:
        SourceError: a path that is not there, or a folder without NetCDF files.
    """
    files = []
    for path in paths:
        found = sorted(path.glob("*.nc")) if path.is_dir() else [path] if path.is_file() else []
        if not found:
            raise SourceError(f"{path} is no NetCDF file and no folder of them. Name existing files.")
        files += found
    return files


def train_checkpoint(
    train: Sequence[Path],
    validation: Sequence[Path],
    factors: Sequence[tuple[int, int]],
    *,
    folder: Path,
    name: str,
    preset: str,
    mean_steps: int | None,
    denoiser_steps: int | None,
    device: str,
    seed: int,
    report: Callable[[str], None],
) -> Checkpoint:
    """Train, or go on training, one checkpoint for all `factors`."""
    joined = Run.join(choose_device(device))
    if joined.device.type == "cpu" and joined.world > 1:
        torch.set_num_threads(1)
    fitted, watched = load_archive(netcdf_files(train)), load_archive(netcdf_files(validation))
    chosen = PRESETS[preset]
    chosen = replace(
        chosen,
        mean_steps=mean_steps or chosen.mean_steps,
        denoiser_steps=denoiser_steps or chosen.denoiser_steps,
    )
    training = Training(
        train=fitted,
        validation=watched,
        configurations=[recipe(Factor(space=s, time=t)) for s, t in factors],
        preset=chosen,
        folder=folder,
        run=joined,
        seed=seed,
        report=report,
    )
    provenance = {"train": [r.name for r in fitted], "validation": [r.name for r in watched], "preset": preset}
    return fit(training, name, provenance)
