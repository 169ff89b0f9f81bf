"""The shipped checkpoints on the shipped real forecast, for every factor they serve."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from stsr_core.checkpoint import Library
from stsr_core.downscaler import Downscaler, choose_device
from stsr_core.ensemble.downscale import ensemble_quanta, prepared
from stsr_core.ensemble.plan import Plan, Recipe
from stsr_core.factors import Factor
from stsr_core.grids import Axis, Grid
from stsr_core.sources.cube import Cube
from stsr_core.sources.harmonise import read_cube
from stsr_core.sources.open import open_dataset
from stsr_core.store.layout import QUANTUM_MM

LIBRARY = Library.open()


@pytest.fixture(scope="module")
def forecast() -> Cube:
    """Three rainy hours of 5 x 6 cells."""
    with open_dataset("package:samples/arpege_fc1h_20180501_SE.nc") as data:
        whole = read_cube(data, "precipitation")
    part = (slice(15, 18), slice(24, 29), slice(60, 66))
    grid = type(whole.grid)(whole.grid.y.isel(24, 29), whole.grid.x.isel(60, 66), whole.grid.crs_wkt)
    return Cube(whole.amount[part], whole.times.isel(15, 18), grid, whole.attributes)


@pytest.mark.parametrize("factor", LIBRARY.family.factors, ids=str)
def test_stored_totals_of_the_real_file_equal_the_inputs_within_the_quantum(forecast: Cube, factor: Factor):
    checkpoint = LIBRARY.serving(factor)
    recipe = Recipe.of(checkpoint, checkpoint.card.serving(factor), seed=5, members=2, conserve=True)
    downscaler = Downscaler.load(checkpoint, factor, choose_device("cpu"))
    quanta = ensemble_quanta(Plan((forecast,), recipe), downscaler)
    s, t = factor.space, factor.time
    blocks = quanta.reshape(2, 3, t, 5, s, 6, s)
    total = blocks.sum(axis=(2, 4, 6), dtype=np.int64) / s**2 * QUANTUM_MM
    np.testing.assert_allclose(total, np.broadcast_to(forecast.amount, total.shape), atol=QUANTUM_MM / 2 / s**2 + 1e-5)
    wet = np.broadcast_to(forecast.amount > 0.5, total.shape)
    variety = blocks.std(axis=(2, 4, 6))
    assert (variety[wet] > 0).mean() > 0.8  # of 63 quanta, three steps may get 21 each
    assert (quanta[0] != quanta[1]).any()


def test_networks_are_told_the_spacing_of_the_fine_grid(forecast: Cube):
    grid = forecast.grid  # of 0.1 degrees; four times as wide, fine cells of (10,1) are of 4 km
    wide = Grid(*(Axis(a.first, 4 * a.step, a.size) for a in (grid.y, grid.x)), grid.crs_wkt)
    made = []
    for cube, told in ((forecast, 1), (replace(forecast, grid=wide), 4)):
        plan, downscaler = prepared(
            (cube,), space=10, time=1, members=1, seed=1, nearest=False, conserve=True, device="cpu", checkpoints=None
        )
        assert plan.recipe.served == downscaler.served
        assert plan.recipe.served.configuration.spacing_km == told
        window = torch.rand(1, 10, 5, 20, 20, generator=torch.Generator().manual_seed(0))
        made.append(downscaler.mean(window))
    assert not torch.equal(*made)
