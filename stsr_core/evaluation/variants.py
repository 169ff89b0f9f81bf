"""Ablations: one part of a checkpoint or of its recipe switched off or changed when it is run.

The networks stay those trained with the full recipe; no variant is trained anew, which would be better at its task.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from stsr_core.factors import ConservationFunction
from stsr_core.networks.layers import Level

if TYPE_CHECKING:
    from stsr_core.checkpoint import Served
    from stsr_core.downscaler import Downscaler

HOW = "Parts switched off or changed when networks run that were trained with the full recipe; none was trained anew."
NOT_DISTILLED = "not distilled"  # what variants of the sampler vary
MEAN_ONLY, UNCONSERVED, NO_ATTENTION = "mean only", "without conservation", "without attention over time"


def variants(served: Served) -> dict[str, Served]:
    """Variants of windows and conservation, by name."""
    c = served.configuration
    exact = ConservationFunction(threshold_mm=c.conservation.threshold_mm)
    uncut = ConservationFunction(threshold_mm=0.0, excess=c.conservation.excess)

    def with_f(f: ConservationFunction) -> Served:
        return served.model_copy(update={"configuration": c.model_copy(update={"conservation": f})})

    def with_length(length: int) -> Served:
        return served.model_copy(update={"configuration": c.model_copy(update={"context_length": length})})

    return {
        MEAN_ONLY: served.model_copy(update={"residual_scale": 0.0, "evaluations": 1}),
        "f exact": with_f(exact),
        "f without threshold": with_f(uncut),
        "half of L": with_length(max(1, c.context_length // 2)),
        "twice L": with_length(2 * c.context_length),
    }


def sampler_variants(served: Served) -> dict[str, Served]:
    """Variants of the sampler, by name, of a denoiser that was not distilled: any steps serve it."""
    c = served.configuration

    def with_beta(beta: float) -> Served:
        return served.model_copy(update={"configuration": c.model_copy(update={"beta": beta})})

    return {
        "half the evaluations": served.model_copy(update={"evaluations": max(1, served.evaluations // 2)}),
        "twice the evaluations": served.model_copy(update={"evaluations": 2 * served.evaluations}),
        "half of beta": with_beta(c.beta / 2),
        "twice beta": with_beta(c.beta * 2),
    }


def without_attention(downscaler: Downscaler) -> Downscaler:
    """The same networks with attention over time switched off."""
    networks = {}
    for name in ("mean_network", "denoiser"):
        networks[name] = copy.deepcopy(getattr(downscaler, name))
        for module in networks[name].modules():
            if isinstance(module, Level):
                module.attention = None
    return replace(downscaler, **networks)
