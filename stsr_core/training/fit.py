"""Fitting: the mean network, the residual denoiser around it, what that one is distilled to, and that by its scores."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stsr_core.checkpoint import Checkpoint, Served, Teacher, write_checkpoint
from stsr_core.downscaler import Network, build_networks, load_networks
from stsr_core.errors import ConfigurationError
from stsr_core.networks.denoiser import Denoiser
from stsr_core.networks.mean import MeanNetwork
from stsr_core.training.distil import DISTILLED_EVALUATIONS, RATE_SHARE, distillation_loss
from stsr_core.training.losses import Loss, denoiser_loss, mean_loss
from stsr_core.training.patches import DRAWN_BY
from stsr_core.training.score import RATE_SHARE as SCORE_RATE_SHARE
from stsr_core.training.score import START_SHARE as SCORE_START_SHARE
from stsr_core.training.score import score_loss
from stsr_core.training.stage import EMA_DECAY, Stage
from stsr_core.training.training import Training
from stsr_core.version import code_version


@dataclass
class _Result:
    """The checkpoint as far as it is fitted.

    Attributes:
        training: that fits it.
        name: of the checkpoint.
        provenance: what the card says of the data and the recipe.
        weights: by network.
        steps: done by each stage, that at which the weights were kept that count, and their validation loss.
    """

    training: Training
    name: str
    provenance: Mapping[str, object]
    weights: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)

    def fit(self, network: str, stage: Stage[Network], loss: Loss, served: Sequence[Served] = ()) -> Network:
        """Train a stage to its end; what serves something is written whenever the stage is saved."""

        def saved() -> None:
            self.take(network, stage)
            if served:
                self.write(served)

        stage.builds_on = {name: int(step) for name, step in self.steps.items() if name.endswith("_kept")}
        fitted = self.training.advance(stage, loss, saved)
        self.take(network, stage)
        return fitted

    def take(self, network: str, stage: Stage[Any]) -> None:
        """Take the weights of a network that count, and their steps."""
        self.weights[network] = stage.weights()
        self.steps |= {f"{stage.name}_steps": stage.step, f"{stage.name}_kept": stage.kept}
        if stage.step:
            self.steps[f"{stage.name}_least"] = stage.least

    def write(self, served: Sequence[Served]) -> None:
        """Write card and weights into the training's folder."""
        card = _card(self.training, self.name, self.provenance, served, self.steps)
        # Half precision halves what git and workers carry; networks run in single precision after loading.
        half = {f"{name}.{k}": v.half() for name, part in self.weights.items() for k, v in part.items()}
        write_checkpoint(self.training.folder / "checkpoint", card, half)


def fit(training: Training, name: str, provenance: Mapping[str, object]) -> Checkpoint:
    """Train the networks and write the checkpoint into the training's folder.

    Args:
        training: what to train, on what; interrupted trainings go on from its folder.
        name: name of the checkpoint.
        provenance: what the card says of the data and the recipe.

    Returns:
        The written checkpoint; a rank other than 0 waits for it and reads it.

    Raises:
        ConfigurationError: a network that is to keep the weights of a start, and there is none; scores to train on
            without a distilled denoiser; a folder that holds another training.
        SourceError: an archive that is too small for a factor.
    """
    preset, rate, share = training.preset, training.preset.learning_rate, training.start_share
    begun_mean, begun_denoiser = _networks(training)
    training.claim()
    training.rehearse()
    result = _Result(training, name, provenance)
    if training.only_spacing:
        return _finished(result, _told_spacing(result, begun_mean, begun_denoiser))
    mean = result.fit("mean", Stage("mean", 1, begun_mean, preset.mean_steps, rate, share), mean_loss)
    scales = training.residual_scales(mean)
    served = [Served(configuration=c, residual_scale=scales[c.factor]) for c in training.configurations]
    stage = Stage("denoiser", 2, begun_denoiser, preset.denoiser_steps, rate, share)
    denoiser = result.fit("denoiser", stage, denoiser_loss(mean, scales), served)
    if training.distilled:
        served = _distilled(result, served, mean, denoiser)
    else:
        served = training.spreads(served, mean, denoiser, {f: s.spread for f, s in training.unchanged.items()})
    return _finished(result, served)


def _finished(result: _Result, served: Sequence[Served]) -> Checkpoint:
    """Write the checkpoint; ranks other than 0 wait for it."""
    run, folder = result.training.run, result.training.folder
    if run.rank == 0:
        result.write(served)
    if run.world > 1:
        dist.barrier()
    return Checkpoint.read(folder / "checkpoint" / f"{result.name}.json")


def _told_spacing(result: _Result, mean: MeanNetwork, teacher: Denoiser) -> list[Served]:
    """Train what tells networks the fine spacing; all else, and what is served at 1 km, stays as it is."""
    training, preset, rate = result.training, result.training.preset, result.training.preset.learning_rate
    assert training.start is not None
    served = [training.start.card.serving(c.factor) for c in training.configurations]
    scales = {s.factor: s.residual_scale for s in served}
    mean_stage = Stage("mean_spacing", 1, _only_spacing(mean), preset.mean_steps, rate)
    mean = result.fit("mean", mean_stage, mean_loss)
    stage = Stage("denoiser_spacing", 2, _only_spacing(teacher), preset.denoiser_steps, rate)
    denoiser = result.fit("denoiser", stage, denoiser_loss(mean, scales))
    if not training.distilled:
        return served
    student = _only_spacing(_student(result, served, mean, denoiser))
    loss = score_loss(mean, {s.factor: s for s in served}, training.transform.scale_mm)
    result.fit("denoiser", Stage("scored_spacing", 4, student, preset.score_steps, rate, SCORE_START_SHARE), loss)
    return served


def _only_spacing(network: Network) -> Network:
    """A network of which only the parameters that tell it the fine spacing are trained."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.endswith("by_spacing"))
    return network


def _distilled(result: _Result, served: Sequence[Served], mean: MeanNetwork, teacher: Denoiser) -> list[Served]:
    """Distil a denoiser, then train on what came of it by its scores; what is served then, with calibrated spreads."""
    training, preset = result.training, result.training.preset
    student = _student(result, served, mean, teacher)
    start = training.unchanged
    taught = training.spreads(served, mean, teacher, {f: s.taught.spread for f, s in start.items()})
    known = {} if preset.distil_steps else {f: s.spread for f, s in start.items()}
    served = training.spreads(_of_student(taught), mean, student, known)
    if not preset.score_steps:
        return served
    loss = score_loss(mean, {s.factor: s for s in served}, training.transform.scale_mm)
    rate = SCORE_RATE_SHARE * preset.learning_rate
    stage = Stage("scored", 4, student, preset.score_steps, rate, SCORE_START_SHARE)
    scored = result.fit("denoiser", stage, loss, served)
    return training.spreads(served, mean, scored, {})


def _student(result: _Result, served: Sequence[Served], mean: MeanNetwork, teacher: Denoiser) -> Denoiser:
    """What a denoiser is distilled to, or without any steps for that what training starts from."""
    training, preset = result.training, result.training.preset
    result.weights["teacher"] = teacher.state_dict()
    if not preset.distil_steps:
        assert training.start is not None
        _, begun = load_networks(training.start)
        result.weights["denoiser"] = begun.state_dict()
        return begun.to(training.run.device)
    stage = Stage("student", 3, copy.deepcopy(teacher), preset.distil_steps, RATE_SHARE * preset.learning_rate)
    scales = {s.factor: s.residual_scale for s in served}
    return result.fit("denoiser", stage, distillation_loss(mean, teacher, scales), _of_student(served))


def _of_student(taught: Sequence[Served]) -> list[Served]:
    """How a student is served of what its teacher serves."""
    changes = [{"evaluations": DISTILLED_EVALUATIONS, "teacher": Teacher(spread=s.spread)} for s in taught]
    return [s.model_copy(update=change) for s, change in zip(taught, changes, strict=True)]


def _networks(training: Training) -> tuple[MeanNetwork, Denoiser]:
    """The networks as training begins with them, on its device.

    Raises:
        ConfigurationError: the checkpoint to start from has other networks than are asked for, or is needed.
    """
    a = training.preset.architecture
    if training.only_spacing and (training.start is None or training.preset.distil_steps or training.start_share):
        raise ConfigurationError(
            "Only what tells networks the fine spacing is to be trained. Name the checkpoint that all else comes from "
            "with --start, and give --distil-steps 0 and no --start-share."
        )
    if training.preset.score_steps and not training.distilled:
        raise ConfigurationError(
            f"{training.preset.score_steps} steps towards the least CRPS are asked for, which only a distilled "
            "denoiser can take. Give --distil-steps too, or --start with a checkpoint that is distilled."
        )
    if training.start is None:
        if not (training.preset.mean_steps and training.preset.denoiser_steps):
            raise ConfigurationError("A network of 0 steps keeps the weights it starts with. Name them with --start.")
        torch.manual_seed(training.seed)
        return _on(training.run.device, *build_networks(a, len(training.statics)))
    card = training.start.card
    if (card.architecture, card.statics) != (a, training.statics):
        raise ConfigurationError(
            f"Checkpoint {card.name} has networks of {card.architecture} with static fields {card.statics}; asked for "
            f"are {a} with {training.statics}. Choose the preset and the fields it was trained with."
        )
    return _on(training.run.device, *load_networks(training.start, teacher=True))


def _on(device: torch.device, mean: MeanNetwork, denoiser: Denoiser) -> tuple[MeanNetwork, Denoiser]:
    return mean.to(device), denoiser.to(device)


def _card(
    training: Training,
    name: str,
    provenance: Mapping[str, object],
    served: Sequence[Served],
    steps: Mapping[str, float],
) -> dict[str, object]:
    preset, run = training.preset, training.run
    how = {
        **steps,
        "cells_per_step": preset.cells_per_step * run.world,
        "learning_rate": preset.learning_rate,
        "calibration_patches": preset.calibration_patches,
        "save_every": preset.save_every,
        "ema_decay": EMA_DECAY,
        **DRAWN_BY,
        "seed": training.seed,
        "processes": run.world,  # each draws patches of its own
        "device": torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "cpu",
        "precision": str(run.precision).removeprefix("torch."),
        "torch": torch.__version__,
        "stsr": code_version(),
        **({"start": training.start.digest, "start_share": training.start_share} if training.start else {}),
    }
    if training.start is not None and training.only_spacing:  # the rest is trained as it was
        told = {name if "spacing" in name else f"spacing_{name}": value for name, value in how.items()}
        trained = {**training.start.card.training, **told}
    else:
        trained = {**provenance, **how}
    return {
        "name": name,
        "architecture": preset.architecture,
        "transform": training.transform,
        "fine_step_h": training.train[0].step_h,
        "statics": training.statics,
        "served": served,
        "spacings_km": training.spacings_km,
        "training": trained,
    }
