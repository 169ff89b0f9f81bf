"""Fitting: the mean network first, then the residual denoiser around it, then what that one is distilled to.

Every step is drawn from (seed, stage, step, rank) alone, so a killed training resumes from its last saved
state as if nothing had happened. Under torchrun every rank draws its own patches and gradients are averaged.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from stsr_core.checkpoint import Architecture, Checkpoint, Served, StaticField, Teacher, Transform, write_checkpoint
from stsr_core.downscaler import Downscaler, build_networks, load_networks
from stsr_core.errors import ConfigurationError, OperatorError
from stsr_core.factors import FactorConfiguration
from stsr_core.networks.denoiser import Denoiser
from stsr_core.networks.mean import MeanNetwork
from stsr_core.networks.transform import HALO, condition, to_transformed
from stsr_core.training.calibrate import Example, calibrated_spread
from stsr_core.training.distil import DISTILLED_EVALUATIONS, RATE_SHARE, distillation_loss
from stsr_core.training.losses import Loss, denoiser_loss, mean_loss
from stsr_core.training.patches import Patch, Region, draw_patch

EMA_DECAY = 0.998
GRADIENT_LIMIT = 1.0
WARMUP_STEPS = 100
CHECKED_EVERY = 20  # steps between looks at the loss; every look waits for the device
SCALE_PATCHES = 24  # patches that the residual scale is measured on
MOST_LOADERS = 12  # processes that draw patches for a GPU; each draws some twenty million cells a second
VALIDATION_PATCHES = 3  # patches per factor of the validation loss


class TrainingError(OperatorError):
    """Training that cannot go on; the last good state is kept."""


@dataclass(frozen=True)
class Preset:
    """Size of the networks and length of their training."""

    architecture: Architecture
    mean_steps: int
    denoiser_steps: int
    distil_steps: int
    cells_per_step: int  # fine cell-steps per step and rank
    learning_rate: float = 1e-3
    save_every: int = 100
    calibration_patches: int = 16  # per factor, that the spread of members is chosen on


PRESETS: Mapping[str, Preset] = {
    "small": Preset(
        Architecture(mean_channels=(32, 64, 96, 96), denoiser_channels=(32, 64, 96, 128)), 1600, 4000, 2500, 300_000
    ),
    "base": Preset(
        Architecture(mean_channels=(64, 128, 192, 256), denoiser_channels=(96, 192, 256, 384)),
        40_000,
        100_000,
        30_000,
        4_000_000,
    ),
    "large": Preset(
        Architecture(mean_channels=(96, 192, 256, 384), denoiser_channels=(160, 320, 384, 512)),
        60_000, 200_000, 50_000, 8_000_000,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """Where a training runs: this process among all that torchrun started, and on what device."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls, device: torch.device) -> Run:
        """Join the process group that torchrun announced in the environment, or run alone."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls(0, 1, device)
        local = int(os.environ["LOCAL_RANK"])
        if device.type == "cuda":
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        elif "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), world, device)

    @property
    def precision(self) -> torch.dtype:
        """Half where the device computes in it, single elsewhere."""
        native = self.device.type != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
        return torch.bfloat16 if native else torch.float32

    def mixed(self) -> torch.autocast:
        """Mixed precision; weights and their updates stay single."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Average tensors over all ranks, in place, in one message."""
        if self.world == 1:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        flat /= self.world
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(part.view_as(t))


@dataclass
class Stage:
    """A network in training: its weights, their moving average, its optimiser, and the steps done.

    `start_share` is the share that the weights it began with have in those that count, see `weights`.
    """

    name: str
    number: int
    network: nn.Module
    steps: int
    learning_rate: float
    start_share: float = 0.0
    step: int = 0
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True
        )
        self.average = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        self.start = {k: v.clone() for k, v in self.average.items()}

    def weights(self) -> dict[str, Tensor]:
        """The weights that count: the moving average, drawn towards those that training began with.

        What is tuned to a finite archive fits it better than other weather; half way back it serves both (WiSE-FT,
        Wortsman et al., arXiv 2109.01903).
        """
        return {k: v.lerp(self.start[k], self.start_share) for k, v in self.average.items()}

    def rate(self) -> float:
        """Learning rate: linear warm-up, then a cosine to a fiftieth."""
        done = min(1.0, self.step / self.steps)
        return self.learning_rate * min(1.0, (self.step + 1) / WARMUP_STEPS) * (0.51 + 0.49 * math.cos(math.pi * done))

    def update(self, loss: Tensor, run: Run) -> None:
        """Take one step down `loss`."""
        self.optimiser.zero_grad(set_to_none=False)
        loss.backward()
        run.average([p.grad for p in self.network.parameters() if p.grad is not None])
        nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_LIMIT)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate()
        self.optimiser.step()
        self.step += 1
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        now = self.network.state_dict()
        torch._foreach_lerp_([self.average[k] for k in now], list(now.values()), 1 - decay)

    def save(self, folder: Path) -> None:
        """Save everything needed to go on; the previous state stays until the new one is whole."""
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for i, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{i}.{k}": v for k, v in state.items()}
        path = folder / f"{self.name}.safetensors"
        part = path.with_suffix(".part")
        meta = {"step": str(self.step), "losses": json.dumps(self.losses[-2000:])}
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, part, metadata=meta)
        part.replace(path)

    def resume(self, folder: Path) -> None:
        """Go on from the saved state, if there is one."""
        path = folder / f"{self.name}.safetensors"
        if not path.is_file():
            return
        from safetensors import safe_open

        with safe_open(path, "pt") as opened:
            meta = opened.metadata()
        tensors = load_file(path, device=str(next(self.network.parameters()).device))
        try:
            self.network.load_state_dict(_part(tensors, "network."))
        except RuntimeError as e:
            raise ConfigurationError(
                f"{path} was trained with other networks than the preset asks for. Use another --folder."
            ) from e
        self.average = _part(tensors, "average.")
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in _part(tensors, "optimiser.").items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
        self.step, self.losses = int(meta["step"]), json.loads(meta["losses"])


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


class Draw(NamedTuple):
    """What a training step sees of the archive.

    Attributes:
        fine: amounts [mm per fine step], (B, L*t, Y*s, X*s).
        coarse: amounts [mm per coarse step] with halo, (B, L+2, Y+2, X+2).
        statics: static fields in their units, (B, S, Y*s, X*s).
        number: of the factor configuration.
        seed: of the noise.
    """

    fine: Tensor
    coarse: Tensor
    statics: Tensor
    number: int = 0
    seed: int = 0

    @classmethod
    def of(cls, patches: Sequence[Patch], number: int = 0, seed: int = 0) -> Draw:
        """Stack patches of one shape."""
        fine, coarse, statics = (
            torch.from_numpy(np.stack([getattr(p, name) for p in patches])) for name in ("fine", "coarse", "statics")
        )
        return cls(fine, coarse, statics, number, seed)


@dataclass(frozen=True)
class Training:
    """A training: data, factor configurations, preset, and the folder that it resumes from.

    `start` is a checkpoint whose weights it begins with, instead of random ones, and `start_share` the share that these
    have in the weights that it ends with; `statics` are the static fields that the regions hold.
    """

    train: Sequence[Region]
    validation: Sequence[Region]
    configurations: Sequence[FactorConfiguration]
    preset: Preset
    folder: Path
    run: Run
    seed: int = 0
    start: Checkpoint | None = None
    start_share: float = 0.0
    statics: tuple[StaticField, ...] = ()
    transform: Transform = field(default_factory=Transform)
    report: Callable[[str], None] = print

    def draw(self, stage: int, step: int) -> Draw:
        """Draw what one step on this rank sees."""
        shared = np.random.default_rng([self.seed, stage, step])
        # Factors with more missing detail have more to learn; the root leaves enough for those that refine time alone.
        shares = np.array([math.sqrt(max(1.0, c.factor.underdetermination)) for c in self.configurations])
        number = int(shared.choice(len(shares), p=shares / shares.sum()))
        rng = np.random.default_rng([self.seed, stage, step, self.run.rank, 1])
        first = draw_patch(self.train, self.configurations[number], rng)
        count = max(1, round(self.preset.cells_per_step / first.fine.size))
        patches = [first, *(draw_patch(self.train, self.configurations[number], rng) for _ in range(count - 1))]
        return Draw.of(patches, number, int(rng.integers(2**62)))

    def draws(self, stage: int, first: int, stop: int) -> Iterable[Draw]:
        """Draw what steps see, ahead of them in processes of their own where a GPU computes."""
        ahead = (
            0 if self.run.device.type == "cpu" else max(1, min(MOST_LOADERS, (os.cpu_count() or 1) // self.run.world))
        )
        return DataLoader(
            _Steps(self, stage, stop), batch_size=None, sampler=range(first, stop), num_workers=ahead,
            pin_memory=ahead > 0, multiprocessing_context="fork" if ahead else None,
        )  # fmt: skip

    def batch(self, drawn: Draw) -> tuple[Tensor, Tensor, FactorConfiguration, torch.Generator]:
        """What networks see of a draw: fine, conditions, configuration and noise generator, on the device."""
        configuration, device = self.configurations[drawn.number], self.run.device
        generator = torch.Generator(device).manual_seed(drawn.seed)
        return *self._tensors(drawn, configuration), configuration, generator

    def _tensors(self, drawn: Draw, configuration: FactorConfiguration) -> tuple[Tensor, Tensor]:
        scale = self.transform.scale_mm
        fine, coarse, statics = (part.to(self.run.device, non_blocking=True) for part in drawn[:3])
        fields = self._scaled(statics) if self.statics else None
        return to_transformed(fine[:, :, None], scale), condition(coarse, configuration.factor, scale, fields)

    def _scaled(self, statics: Tensor) -> Tensor:
        """Static fields as the networks see them, (B, S, Y*s, X*s)."""
        offsets, widths = (
            torch.tensor([getattr(s, n) for s in self.statics], device=statics.device)[:, None, None]
            for n in ("offset", "scale")
        )
        return (statics - offsets) / widths

    def validation_loss(self, stage: Stage, loss: Loss) -> float:
        """Loss of the weights that count on fixed validation patches, averaged over the factors."""
        network = _with_weights(stage.network, stage.weights())
        values = []
        for drawn in self._watched:
            with torch.no_grad(), self.run.mixed():
                values.append(loss(network, *self.batch(drawn)))
        return float(torch.stack(values).mean())

    @cached_property
    def _watched(self) -> list[Draw]:
        """The fixed validation patches, one at a time."""
        draws = []
        for number, configuration in enumerate(self.configurations):
            rng = np.random.default_rng([self.seed, 99])
            for i in range(VALIDATION_PATCHES):
                patch = draw_patch(self.validation, configuration, rng, augment=False)
                draws.append(Draw.of([patch], number, self.seed + i))
        return draws

    def advance(self, stage: Stage, loss: Loss, saved: Callable[[], None] = lambda: None) -> nn.Module:
        """Train a stage to its end and return the network with the weights that count; `saved` is called at each save.

        Raises:
            TrainingError: the loss is no longer finite; the last saved state is kept.
        """
        stage.resume(self.folder)
        started, first = time.monotonic(), stage.step
        unseen: list[Tensor] = []
        for drawn in self.draws(stage.number, first, stage.steps):
            with self.run.mixed():
                value = loss(stage.network, *self.batch(drawn))
            stage.update(value, self.run)
            unseen.append(value.detach())
            saving = stage.step % self.preset.save_every == 0
            if saving or stage.step == stage.steps or len(unseen) == CHECKED_EVERY:
                stage.losses += self._finite(torch.stack(unseen).tolist(), stage)
                unseen.clear()
            if saving and self.run.rank == 0:
                stage.save(self.folder)
                saved()
                rate = (time.monotonic() - started) / (stage.step - first)
                self.report(
                    f"{stage.name} step {stage.step}/{stage.steps}  loss {np.mean(stage.losses[-100:]):.4f}  "
                    f"validation {self.validation_loss(stage, loss):.4f}  {rate:.2f} s/step  "
                    f"left {rate * (stage.steps - stage.step) / 60:.0f} min"
                )
        return _with_weights(stage.network, stage.weights())

    def _finite(self, losses: list[float], stage: Stage) -> list[float]:
        """The losses up to a stage's step, which are finite, or TrainingError."""
        for ago, value in zip(range(len(losses), 0, -1), losses, strict=True):
            if not math.isfinite(value):
                raise TrainingError(
                    f"The {stage.name} loss is {value} at step {stage.step - ago}. The state of the last save is "
                    f"kept in {self.folder}; lower the learning rate and start again from it."
                )
        return losses

    def residual_scales(self, mean: nn.Module) -> dict[str, float]:
        """Scale of the transformed residual per factor: its standard deviation on patches that all ranks share.

        A denoiser that is trained on keeps the scales that it knows.
        """
        scales = (
            {}
            if self.start is None
            else {str(s.configuration.factor): s.residual_scale for s in self.start.card.served}
        )
        for configuration in self.configurations:
            if str(configuration.factor) in scales:
                continue
            rng = np.random.default_rng([self.seed, 77])
            squares = []
            for _ in range(SCALE_PATCHES):
                patch = draw_patch(self.train, configuration, rng)
                fine, conditions = self._tensors(Draw.of([patch]), configuration)
                with torch.no_grad():
                    squares.append(float((fine - mean(conditions, configuration.factor)).square().mean()))
            scales[str(configuration.factor)] = float(np.sqrt(np.mean(squares)))
        return scales

    def spreads(self, served: Sequence[Served], mean: MeanNetwork, denoiser: Denoiser) -> list[Served]:
        """What is served, with factors on the residual scales that are calibrated on validation patches."""
        found = []
        for one in served:
            configuration = one.configuration
            downscaler = Downscaler(one, self.transform.scale_mm, mean, denoiser, self.run.device, self.run.precision)
            rng = np.random.default_rng([self.seed, 55])
            examples = (self._example(configuration, rng) for _ in range(self.preset.calibration_patches))
            spread = calibrated_spread(downscaler, examples, self.seed)
            found.append(one.model_copy(update={"spread": spread}))
            self.report(f"{configuration.factor}: residuals of members are widened {spread:g} times")
        return found

    def _example(self, configuration: FactorConfiguration, rng: np.random.Generator) -> Example:
        patch = draw_patch(self.validation, configuration, rng, augment=False)
        _, conditions = self._tensors(Draw.of([patch]), configuration)
        truth, coarse = (torch.from_numpy(x).to(self.run.device) for x in (patch.fine, patch.coarse))
        return Example(truth, coarse[HALO:-HALO, HALO:-HALO, HALO:-HALO], conditions)


@dataclass(frozen=True)
class _Steps(Dataset[Draw]):
    """The draws of a stage by step; a process that draws ahead has a copy of it."""

    training: Training
    stage: int
    stop: int

    def __len__(self) -> int:
        return self.stop

    def __getitem__(self, step: int) -> Draw:
        return self.training.draw(self.stage, step)


def _with_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    other = copy.deepcopy(network)
    other.load_state_dict(dict(weights))
    return other.eval()


@dataclass
class _Result:
    """The checkpoint as far as it is fitted.

    Attributes:
        training: that fits it.
        name: of the checkpoint.
        provenance: what the card says of the data and the recipe.
        weights: by network.
        steps: by stage.
    """

    training: Training
    name: str
    provenance: Mapping[str, object]
    weights: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)

    def fit(self, network: str, stage: Stage, loss: Loss, served: Sequence[Served] = ()) -> nn.Module:
        """Train a stage to its end; what serves something is written whenever the stage is saved."""

        def saved() -> None:
            self.weights[network], self.steps[stage.name] = stage.weights(), stage.step
            if served:
                self.write(served)

        fitted = self.training.advance(stage, loss, saved)
        self.weights[network], self.steps[stage.name] = fitted.state_dict(), stage.step
        return fitted

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
        ConfigurationError: a network that is to keep the weights of a start, and there is none.
    """
    preset, run, rate, share = training.preset, training.run, training.preset.learning_rate, training.start_share
    training.folder.mkdir(parents=True, exist_ok=True)
    result = _Result(training, name, provenance)
    begun = [network.to(run.device) for network in _networks(training)]
    mean = result.fit("mean", Stage("mean", 1, begun[0], preset.mean_steps, rate, share), mean_loss)
    assert isinstance(mean, MeanNetwork)
    scales = training.residual_scales(mean)
    served = [Served(configuration=c, residual_scale=scales[str(c.factor)]) for c in training.configurations]
    stage = Stage("denoiser", 2, begun[1], preset.denoiser_steps, rate, share)
    denoiser = result.fit("denoiser", stage, denoiser_loss(mean, scales), served)
    assert isinstance(denoiser, Denoiser)
    if preset.distil_steps:
        served = _distilled(result, served, mean, denoiser)
    elif run.rank == 0:
        served = training.spreads(served, mean, denoiser)
    if run.rank == 0:
        result.write(served)
    if run.world > 1:
        dist.barrier()
    return Checkpoint.read(training.folder / "checkpoint" / f"{name}.json")


def _distilled(result: _Result, served: Sequence[Served], mean: MeanNetwork, teacher: Denoiser) -> list[Served]:
    """Distil a denoiser; what is served then, on rank 0 with calibrated spreads of both."""
    training, preset = result.training, result.training.preset

    def of_student(taught: Sequence[Served]) -> list[Served]:
        changes = [{"evaluations": DISTILLED_EVALUATIONS, "teacher": Teacher(spread=s.spread)} for s in taught]
        return [s.model_copy(update=change) for s, change in zip(taught, changes, strict=True)]

    result.weights["teacher"] = teacher.state_dict()
    stage = Stage("student", 3, copy.deepcopy(teacher), preset.distil_steps, RATE_SHARE * preset.learning_rate)
    scales = {str(s.configuration.factor): s.residual_scale for s in served}
    student = result.fit("denoiser", stage, distillation_loss(mean, teacher, scales), of_student(served))
    assert isinstance(student, Denoiser)
    if training.run.rank:
        return of_student(served)
    return training.spreads(of_student(training.spreads(served, mean, teacher)), mean, student)


def _networks(training: Training) -> tuple[nn.Module, nn.Module]:
    """The networks as training begins with them.

    Raises:
        ConfigurationError: the checkpoint to start from has other networks than are asked for, or is needed.
    """
    a = training.preset.architecture
    if training.start is None:
        if not (training.preset.mean_steps and training.preset.denoiser_steps):
            raise ConfigurationError("A network of 0 steps keeps the weights it starts with. Name them with --start.")
        torch.manual_seed(training.seed)
        return build_networks(a, len(training.statics))
    card = training.start.card
    if (card.architecture, card.statics) != (a, training.statics):
        raise ConfigurationError(
            f"Checkpoint {card.name} has networks of {card.architecture} with static fields {card.statics}; asked for "
            f"are {a} with {training.statics}. Choose the preset and the fields it was trained with."
        )
    return load_networks(training.start, teacher=True)


def _card(
    training: Training, name: str, provenance: Mapping[str, object], served: Sequence[Served], steps: Mapping[str, int]
) -> dict[str, object]:
    preset = training.preset
    return {
        "name": name,
        "architecture": preset.architecture,
        "transform": training.transform,
        "statics": training.statics,
        "served": served,
        "training": {
            **provenance,
            **{f"{stage}_steps": count for stage, count in steps.items()},
            "cells_per_step": preset.cells_per_step * training.run.world,
            "learning_rate": preset.learning_rate,
            "seed": training.seed,
            **({"start": training.start.digest, "start_share": training.start_share} if training.start else {}),
        },
    }
