"""The train flow: fit a checkpoint; the same parameters again resume it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from pydantic import Field

from flows import artifacts
from flows.log import event
from flows.parameters import HomePath, Place
from flows.stages import patient
from stsr_core.checkpoint import Checkpoint
from stsr_core.configuration import choose_catalog
from stsr_core.factors import Factor
from stsr_core.settings import Settings
from stsr_core.training.command import Data, train_checkpoint
from stsr_core.training.presets import PresetName, RecipeName

Factors = Annotated[list[Factor], Field(min_length=1)]
Steps = Annotated[int | None, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]


@flow(name="train", flow_run_name="train {name}", validate_parameters=True)
def train(
    factors: Factors,
    folder: HomePath,
    archive: str | None = None,
    train_on: list[Place] | None = None,
    validate_on: list[Place] | None = None,
    name: Name = "stsr",
    preset: PresetName = PresetName.small,
    recipe: RecipeName = RecipeName.stsr,
    mean_steps: Steps = None,
    denoiser_steps: Steps = None,
    distil_steps: Steps = None,
    score_steps: Steps = None,
    learning_rate: Annotated[float | None, Field(gt=0, le=1)] = None,
    cells_per_step: Annotated[int | None, Field(ge=1)] = None,
    calibration_patches: Annotated[int | None, Field(ge=1)] = None,
    start: HomePath | None = None,
    start_share: Annotated[float, Field(ge=0, le=1)] = 0.0,
    only_spacing: bool = False,
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0,
    statics: list[str] | None = None,
) -> str:
    """Train one checkpoint for all factors. Kill it at any time: the same parameters go on from the last save.

    Args:
        factors: factors that the checkpoint serves.
        folder: folder of the training and, in the end, of the checkpoint.
        archive: archive of catalog.yaml to train on.
        train_on: without an archive, fine files, folders of them, globs or URLs to fit on.
        validate_on: likewise, to choose on: the weights of the least loss are kept.
        name: name of the checkpoint.
        preset: size of the networks.
        recipe: beta and L of stsr, or of the authors as the reference.
        mean_steps: steps of the mean network; without it by preset, 0 keeps that of `start`.
        denoiser_steps: steps of the denoiser; without it by preset, 0 keeps that of `start`.
        distil_steps: steps in which it learns to make a member in 2 evaluations; 0 keeps that of `start` or leaves 8.
        score_steps: steps in which that is trained on towards the least CRPS of whole members; 0 leaves it as it is.
        learning_rate: largest learning rate; without it by preset.
        cells_per_step: fine cells and hours that one step learns from; without it by preset.
        calibration_patches: patches, per factor, on which the members' spread is chosen; without it by preset. One is
            enough to try a training out.
        start: card (.json) of a checkpoint to start from, as one that is tuned to a radar of one's own.
        start_share: share of the weights of `start` in the result; 0.5 generalises better where data are few.
        only_spacing: train only what tells the networks of `start` the spacing of the fine grid.
        seed: seed of weights and patches.
        statics: static fields that the networks see, by their names in catalog.yaml, or as NAME=FILE.

    Returns:
        Path of the checkpoint's card.
    """
    chosen = patient(fit, f"fit {name} ({preset.value})", hours=30 * 24)
    settings = Settings()
    catalog_file = choose_catalog(settings.catalog_file)
    data = Data.of(
        archive, train_on or [], validate_on or [], catalog_file, statics or [], settings.source_options
    )  # fmt: skip
    sizes = {
        "mean_steps": mean_steps, "denoiser_steps": denoiser_steps, "distil_steps": distil_steps,
        "score_steps": score_steps, "learning_rate": learning_rate, "cells_per_step": cells_per_step,
        "calibration_patches": calibration_patches,
    }  # fmt: skip
    checkpoint = chosen(
        data, factors, sizes, folder=folder, name=name, preset=preset, recipe=recipe, start=start,
        start_share=start_share, only_spacing=only_spacing, seed=seed,
    )  # fmt: skip
    card = checkpoint.weights_path.with_suffix(".json")
    values: dict[str, str | int | float] = {
        "card": str(card),
        "digest": checkpoint.digest,
        "factors": ", ".join(str(s.factor) for s in checkpoint.card.served),
        **{key: str(value) for key, value in checkpoint.card.training.items()},
    }
    artifacts.facts(artifacts.key_of("checkpoint", name), values, f"Checkpoint {name}")
    return str(card)


@task(name="fit", cache_policy=NO_CACHE)
def fit(
    data: Data,
    factors: list[Factor],
    sizes: dict[str, float | None],
    *,
    folder: Path,
    name: str,
    preset: PresetName,
    recipe: RecipeName,
    start: Path | None,
    start_share: float,
    only_spacing: bool,
    seed: int,
) -> Checkpoint:
    """Fit; a retry resumes from the last save."""
    show = artifacts.live_table(artifacts.key_of("losses", name), f"Losses of {name}, stage by stage")
    return train_checkpoint(
        data, factors, folder=folder, name=name, preset=preset, recipe_name=recipe, sizes=sizes, start=start,
        start_share=start_share, only_spacing=only_spacing, device=Settings().device, seed=seed,
        report=lambda said: event("fit", checkpoint=name, said=said),
        watch=lambda progress: show(progress.stage, progress._asdict()),
    )  # fmt: skip
