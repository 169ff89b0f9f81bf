"""A network in training: steps of its optimiser, the moving average of its weights, and its state on disk."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stsr_core.downscaler import Network
from stsr_core.errors import CheckpointError, ConfigurationError
from stsr_core.files import whole
from stsr_core.training.run import Run

BEFORE = "-before"  # suffix of a state that is put aside
EMA_DECAY = 0.998
GRADIENT_LIMIT = 1.0
WARMUP_STEPS = 100


@dataclass
class Stage(Generic[Network]):
    """A network in training: its weights, their moving average, its optimiser, and the steps done.

    `start_share` is the share that the weights it began with have in those that count, see `weights`; `least` is the
    least validation loss yet and `kept` the step at which it was found, see `judge`. `builds_on` says at which steps
    the weights of the stages before it were found.
    """

    name: str
    number: int
    network: Network
    steps: int
    learning_rate: float
    start_share: float = 0.0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    least: float = math.inf
    kept: int = 0
    builds_on: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True
        )
        self.average = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        self.start = {k: v.clone() for k, v in self.average.items()}
        self.best = self.start

    def candidate(self) -> dict[str, Tensor]:
        """What would count if training ended now: the moving average, drawn towards the weights it began with.

        What is tuned to a finite archive fits it better than other weather; half way back it serves both (WiSE-FT,
        Wortsman et al., arXiv 2109.01903).
        """
        return self._drawn(self.average)

    def weights(self) -> dict[str, Tensor]:
        """The weights that count: the candidate of the least validation loss."""
        return self._drawn(self.best)

    def _drawn(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.lerp(self.start[k], self.start_share) for k, v in weights.items()}

    def judge(self, validation_loss: float) -> None:
        """Let the candidate count if it has the least validation loss yet.

        A small archive is learned by heart before training ends, and other weather is served worse from then on.
        """
        if validation_loss < self.least:
            self.least, self.kept = validation_loss, self.step
            self.best = {k: v.clone() for k, v in self.average.items()}

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
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        for i, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{i}.{k}": v for k, v in state.items()}
        tensors = {k: v.cpu().contiguous().clone() for k, v in tensors.items()}
        meta = {name: json.dumps(getattr(self, name)) for name in ("step", "least", "kept", "builds_on")}
        meta["losses"] = json.dumps(self.losses[-2000:])
        path = self.path(folder)
        if path.is_file() and not self._goes_on(_read(path)[0]):
            path.replace(self.path(folder, BEFORE))
        with whole(path) as part:
            save_file(tensors, part, metadata={**meta, "sha256": _digest(meta, tensors)})

    def path(self, folder: Path, suffix: str = "") -> Path:
        """File of its state."""
        return folder / f"{self.name}{suffix}.safetensors"

    def _goes_on(self, meta: Mapping[str, str]) -> bool:
        """Whether a saved state builds on the same weights of earlier stages."""
        return bool(json.loads(meta["builds_on"]) == self.builds_on)

    def resume(self, folder: Path) -> bool:
        """Go on from the saved state, if there is one; False if it builds on other weights and is of no use.

        Raises:
            CheckpointError: the state is damaged.
            ConfigurationError: it is one of other networks.
        """
        path = self.path(folder)
        if not path.is_file():
            return True
        meta, tensors = _read(path)
        if not self._goes_on(meta):
            return False
        device = next(self.network.parameters()).device
        tensors = {k: v.to(device) for k, v in tensors.items()}
        try:
            self.network.load_state_dict(_part(tensors, "network."))
        except RuntimeError as e:
            raise ConfigurationError(
                f"{path} was trained with other networks than the preset asks for. Use another --folder."
            ) from e
        self.average, self.best = _part(tensors, "average."), _part(tensors, "best.")
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in _part(tensors, "optimiser.").items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
        self.step, self.least, self.kept, self.losses = (
            json.loads(meta[name]) for name in ("step", "least", "kept", "losses")
        )
        return True


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What is said of a saved state, and its tensors on the CPU; raises CheckpointError where it is damaged."""
    try:
        with safe_open(path, "pt") as opened:
            meta, tensors = opened.metadata() or {}, {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
        found = "" if meta.pop("sha256", "") == _digest(meta, tensors) else "its content is not what was saved"
    except SafetensorError as e:
        found = str(e)
    if found:
        raise CheckpointError(
            f"{path} is damaged ({found}). Delete it, and the stage begins anew; or restore it, and training goes on."
        )
    return meta, tensors


def _digest(meta: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name, values in sorted(tensors.items()):
        found.update(name.encode())
        found.update(values.numpy().tobytes())
    return found.hexdigest()


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
