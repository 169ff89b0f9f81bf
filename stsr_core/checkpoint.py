"""Checkpoints: weights as safetensors, everything else as a JSON card; no pickle.

Card and digest are readable without torch. A checkpoint NAME is the pair NAME.safetensors and NAME.json.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import timedelta
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stsr_core.errors import CheckpointError
from stsr_core.factors import SPACINGS_KM, Factor, FactorConfiguration, Family, nearest_spacing
from stsr_core.files import whole

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


NEAR = 1.5  # ratio of spacings or steps up to which networks know what they were not trained at
EVALUATIONS = 8  # network evaluations of a member; 16 change CRPS by 0.2 %, 4 cost a tenth of the spread


Positive = Annotated[float, Field(gt=0)]
Evaluations = Annotated[int, Field(ge=1, le=1000)]
Channels = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
Spacings = Annotated[tuple[Annotated[int, Field(ge=SPACINGS_KM[0], le=SPACINGS_KM[-1])], ...], Field(min_length=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Architecture(_Frozen):
    """Shape of the networks: channels per level, and whether they attend over time."""

    mean_channels: Channels
    denoiser_channels: Channels
    attention: bool = True


class Transform(_Frozen):
    """Monotone transform that the networks see: log1p(amount / scale_mm)."""

    name: Literal["log1p"] = "log1p"
    scale_mm: Positive = 0.2


class StaticField(_Frozen):
    """A field of the fine grid that does not change in time; the networks see (value - offset) / scale."""

    name: str
    units: str
    offset: float
    scale: Positive


class Teacher(_Frozen):
    """How a denoiser is served that another was distilled from: its spread and evaluations, see `Served`."""

    spread: Positive
    evaluations: Evaluations = EVALUATIONS


class Measured(_Frozen):
    """What was measured of one factor on fine grids of one spacing.

    Attributes:
        scores: validation scores, by name.
        statistics: of the validation ensembles, see `store.statistics`; products must be like them.
    """

    scores: dict[str, float] = {}
    statistics: dict[str, float] = {}


class Served(_Frozen):
    """A factor configuration that a checkpoint was trained with, and what was measured for it.

    Attributes:
        configuration: factor, beta, noise, L and f.
        residual_scale: standard deviation of the transformed residual on training patches.
        spread: factor on it that makes members reliable on validation patches, see `training.calibrate`.
        evaluations: network evaluations per member.
        teacher: how the denoiser that this one was distilled from is served, see `training.distil`; None if it was not.
        measured: what was measured, by the spacing of the fine grid [km].
    """

    configuration: FactorConfiguration
    residual_scale: Positive
    spread: Positive = 1.0
    evaluations: Evaluations = EVALUATIONS
    teacher: Teacher | None = None
    measured: dict[int, Measured] = {}

    @property
    def factor(self) -> Factor:
        """The factor that is served."""
        return self.configuration.factor

    def told(self, spacing_km: int) -> Served:
        """The same on a fine grid of another spacing."""
        return self.model_copy(update={"configuration": self.configuration.told(spacing_km)})

    @property
    def measured_here(self) -> Measured:
        """What was measured on fine grids of the spacing that it is told; empty where nothing was."""
        return self.measured.get(self.configuration.spacing_km, Measured())

    @property
    def width(self) -> float:
        """Factor on a residual of unit variance."""
        return self.residual_scale * self.spread

    @property
    def taught(self) -> Served:
        """What its teacher served, itself where it has none."""
        return self if self.teacher is None else self.model_copy(update={**dict(self.teacher), "teacher": None})


class Card(_Frozen):
    """Everything about a checkpoint but its weights.

    `format` says what the networks see and what a card holds: since 2 they see the pycnophylactic interpolation, not
    the bare coarse amounts; since 3 the spacing of the fine grid; since 4 what was measured is kept by spacing.
    `spacings_km` are those that they were trained at.
    """

    format: Literal[4] = 4
    name: str
    architecture: Architecture
    transform: Transform
    statics: tuple[StaticField, ...] = ()
    served: tuple[Served, ...]
    spacings_km: Spacings = (1,)
    fine_step_h: Positive = 1.0
    training: dict[str, int | float | str | list[str]]
    weights_sha256: str

    @property
    def distilled(self) -> bool:
        """Whether its denoiser was distilled from another, which the checkpoint keeps."""
        return any(served.teacher for served in self.served)

    def serving(self, factor: Factor, spacing_km: float = 1.0) -> Served:
        """Return what serves `factor` on a fine grid, told the nearest spacing that the networks were trained at.

        Raises:
            CheckpointError: the checkpoint does not serve it.
        """
        for served in self.served:
            if served.factor == factor:
                return served.told(nearest_spacing(spacing_km, self.spacings_km))
        have = ", ".join(str(s.factor) for s in self.served)
        raise CheckpointError(f"Checkpoint {self.name} serves {have}, not {factor}. Choose one of these or train it.")

    def strange(self, spacing_km: float, step: timedelta) -> str:
        """What of a fine grid is unlike all that the networks were trained at, in a sentence; empty if nothing is."""
        step_h, least, most = step / timedelta(hours=1), min(self.spacings_km), max(self.spacings_km)
        found = []
        if not 1 / NEAR < step_h / self.fine_step_h < NEAR:
            found.append(f"steps of {step_h:g} h, not {self.fine_step_h:g} h")
        if not least / NEAR < spacing_km < most * NEAR:
            found.append(f"cells of {spacing_km:.2g} km, not {least} to {most} km")
        if not found:
            return ""
        return (
            f"Checkpoint {self.name} was not trained on such a fine grid: {'; '.join(found)}. Check what comes of it."
        )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """A card and the place of its weights; digest identifies both."""

    card: Card
    weights_path: Path
    digest: str

    @classmethod
    def read(cls, card_path: Path) -> Checkpoint:
        """Read a card; the weights stay on disk until `weights` is called.

        Raises:
            CheckpointError: no such card, not a card, or no weights beside it.
        """
        try:
            raw = card_path.read_bytes()
            card = Card.model_validate_json(raw)
        except OSError as e:
            raise CheckpointError(f"No card at {card_path} ({e.strerror}). Name a checkpoint's .json file.") from e
        except ValidationError as e:
            first = e.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise CheckpointError(
                f"{card_path} is no valid card: {where}: {first['msg']}. Restore it or train again."
            ) from e
        weights = card_path.with_suffix(".safetensors")
        if not weights.is_file():
            raise CheckpointError(f"{card_path} has no weights beside it; {weights.name} is needed. Restore it.")
        return cls(card, weights, _sha256(raw))

    def weights(self) -> dict[str, Tensor]:
        """Read the weights.

        Raises:
            CheckpointError: the bytes are not those of the card, no safetensors file, or not all of them finite.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        raw = self.weights_path.read_bytes()
        found = _sha256(raw)
        if found != self.card.weights_sha256:
            raise CheckpointError(
                f"{self.weights_path} has sha256 {found[:12]}..., its card says {self.card.weights_sha256[:12]}...: "
                "the file is damaged or belongs to another card. Restore both from one release."
            )
        try:
            weights = load(raw)
        except SafetensorError as e:
            raise CheckpointError(f"{self.weights_path} is no safetensors file: {e}. Restore it.") from e
        if broken := [name for name, values in weights.items() if not values.isfinite().all()]:
            raise CheckpointError(
                f"{self.weights_path} has weights that are not finite, in {broken[0]}. Restore it or train again."
            )
        return weights


def write_checkpoint(folder: Path, card: Mapping[str, object], weights: Mapping[str, Tensor]) -> Checkpoint:
    """Write weights, then the card that vouches for them; `card` lacks `weights_sha256` only."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    raw = save({k: v.detach().contiguous() for k, v in weights.items()})
    full = Card.model_validate({**card, "weights_sha256": _sha256(raw)})
    weights_path = folder / f"{full.name}.safetensors"
    card_path = folder / f"{full.name}.json"
    _write(weights_path, raw)
    _write(card_path, _card_bytes(full))
    return Checkpoint.read(card_path)


def _write(path: Path, data: bytes) -> None:
    with whole(path) as part:
        part.write_bytes(data)


def _card_bytes(card: Card) -> bytes:
    return (json.dumps(card.model_dump(mode="json"), indent=1) + "\n").encode()


def with_measured(checkpoint: Checkpoint, factor: Factor, spacing_km: int, measured: Measured) -> Checkpoint:
    """Rewrite the card with what was measured for one factor on fine grids of one spacing."""
    served = tuple(
        s.model_copy(update={"measured": dict(sorted({**s.measured, spacing_km: measured}.items()))})
        if s.factor == factor
        else s
        for s in checkpoint.card.served
    )
    card = checkpoint.card.model_copy(update={"served": served})
    path = checkpoint.weights_path.with_suffix(".json")
    _write(path, _card_bytes(card))
    return Checkpoint.read(path)


def shipped_checkpoints() -> Path:
    """Return the folder of checkpoints that is installed with the package."""
    return Path(str(files("stsr_core") / "checkpoints"))


@dataclass(frozen=True)
class Library:
    """The checkpoints of a folder and the family they serve together."""

    checkpoints: tuple[Checkpoint, ...]

    @classmethod
    def open(cls, folder: Path | str | None = None) -> Library:
        """Read all cards of a folder (default: the shipped ones).

        Raises:
            CheckpointError: no folder, a damaged card, or a factor served by two checkpoints.
        """
        root = shipped_checkpoints() if folder is None else Path(folder)
        if not root.is_dir():
            raise CheckpointError(f"No folder of checkpoints at {root}. Set STSR_CHECKPOINTS, or unset it.")
        library = cls(tuple(Checkpoint.read(p) for p in sorted(root.glob("*.json"))))
        factors = library.family.factors
        twice = {str(f) for f in factors if factors.count(f) > 1}
        if twice:
            raise CheckpointError(f"Factor {', '.join(sorted(twice))} has several checkpoints in {root}; keep one.")
        return library

    @property
    def family(self) -> Family:
        """All factors that the checkpoints serve."""
        return Family(tuple(s.factor for c in self.checkpoints for s in c.card.served))

    def serving(self, factor: Factor) -> Checkpoint:
        """Return the checkpoint that serves `factor`.

        Raises:
            CheckpointError: none does.
        """
        for checkpoint in self.checkpoints:
            if any(s.configuration.factor == factor for s in checkpoint.card.served):
                return checkpoint
        raise CheckpointError(f"No checkpoint serves {factor}; served are {self.family}. Train it with `stsr train`.")
