"""Closure of ensembles: how far the coarse amounts of members are from the input, before storage and after it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from stsr_core.conservation import block_sums, quantise, wanted_quanta
from stsr_core.downscaler import Downscaler
from stsr_core.grids import coarsen
from stsr_core.store.layout import QUANTUM_MM

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from stsr_core.checkpoint import Served
    from stsr_core.factors import Factor


def closure_mm(fine: NDArray[np.float32], coarse: NDArray[np.float32], factor: Factor) -> float:
    """Largest difference between fine amounts (..., T*t, Y*s, X*s), coarsened, and coarse ones [mm per coarse step]."""
    return float(np.nan_to_num(np.abs(coarsen(fine, factor) - coarse)).max())


def closures(ensemble: NDArray[np.float32], coarse: NDArray[np.float32], factor: Factor) -> dict[str, float]:
    """Closure of members (M, P, T*t, Y*s, X*s) as they are, and as they would be stored, blocks towards own totals."""
    quanta = 0
    for place, wanted in zip(torch.from_numpy(ensemble).unbind(dim=1), torch.from_numpy(coarse), strict=True):
        for member in place:
            kept = block_sums(quantise(member, None, factor, QUANTUM_MM).clamp(min=0), factor)
            quanta = max(quanta, int((kept - wanted_quanta(wanted, factor, QUANTUM_MM)).abs().max()))
    return {"closure_mm": closure_mm(ensemble, coarse, factor), "closure_quanta": quanta}


@dataclass(frozen=True)
class Watched(Downscaler):
    """A downscaler that notes in `off_mm` the closure of all members that it conserves, before they are stored."""

    off_mm: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, downscaler: Downscaler, served: Served) -> Self:
        """Watch a downscaler that serves otherwise."""
        return cls(**{f.name: getattr(downscaler, f.name) for f in fields(downscaler)} | {"served": served})

    def conserve(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Conserve, and note the closure."""
        found = super().conserve(fine, coarse)
        self.off_mm.append(closure_mm(found.cpu().numpy(), coarse.cpu().numpy(), self.factor))
        return found
