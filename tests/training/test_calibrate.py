import math
from dataclasses import replace

import pytest
import torch

from stsr_core.checkpoint import Served
from stsr_core.downscaler import Downscaler
from stsr_core.factors import Factor, recipe
from stsr_core.grids import HALO
from stsr_core.networks.denoiser import Denoiser
from stsr_core.networks.mean import MeanNetwork
from stsr_core.training import calibrate
from stsr_core.training.calibrate import Example, _drawn, calibrated_spread

CONFIGURATION = recipe(Factor(space=4, time=2))


@pytest.fixture(scope="module")
def downscaler() -> Downscaler:
    """Untrained networks: the mean is linear interpolation, residuals are white noise."""
    served = Served(configuration=CONFIGURATION, residual_scale=0.4)
    return Downscaler(served, 0.2, MeanNetwork((8,)), Denoiser((8,)), torch.device("cpu"))


@torch.inference_mode()
def example(downscaler: Downscaler, spread: float, seed: int) -> Example:
    """Truth that is one more member of an ensemble of the given spread."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 4 * torch.rand(1, 8, 8, 8, generator=generator) + 1
    conditions = downscaler.condition(coarse)
    served = downscaler.served.model_copy(update={"spread": spread})
    true = Downscaler(served, 0.2, downscaler.mean_network, downscaler.denoiser, torch.device("cpu"))
    inner = coarse[0, HALO:-HALO, HALO:-HALO, HALO:-HALO]
    found = Example(inner, inner, conditions)
    _, mean, residuals = _drawn(downscaler, found, generator)
    return replace(found, truth=true.conserve(true.amounts(mean, residuals[:1]), inner)[0])


@pytest.mark.parametrize("spread", [0.9, 1.2, 1.75])
def test_the_spread_of_the_truth_is_found(downscaler, spread):
    examples = [example(downscaler, spread, seed) for seed in range(3)]
    assert math.isclose(calibrated_spread(downscaler, examples, seed=9), spread)


def test_of_spreads_as_good_as_the_least_crps_the_one_nearest_to_the_skill_is_taken(downscaler, monkeypatch):
    examples = [example(downscaler, 1.2, seed) for seed in range(3)]
    monkeypatch.setattr(calibrate, "TOLERANCE", 1.0)  # all are good
    assert math.isclose(calibrated_spread(downscaler, examples, seed=9), 1.2)


def test_spreads_beyond_those_that_make_members_worse_are_not_tried(downscaler, monkeypatch):
    examples, tried = [example(downscaler, 0.9, seed) for seed in range(3)], []
    monkeypatch.setattr(Downscaler, "conserve", lambda self, *a, _all=Downscaler.conserve: (
        tried.append(self.served.spread), _all(self, *a))[1])  # fmt: skip
    assert calibrated_spread(downscaler, examples, seed=9) == 0.9
    assert list(dict.fromkeys(tried)) == [1.0, 1.1, 0.9, 0.8]
