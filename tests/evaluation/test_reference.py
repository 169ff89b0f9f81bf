import numpy as np
import pytest
import torch

from stsr_core.checkpoint import Library
from stsr_core.downscaler import Downscaler
from stsr_core.errors import FactorError
from stsr_core.evaluation.reference import TileFunction, reference_ensemble
from stsr_core.factors import Factor, authors_recipe


def test_tiles_keep_their_totals_but_coarse_cells_do_not(library: Library):
    factor = Factor(space=10, time=1)
    downscaler = Downscaler.load(library.serving(factor), factor, torch.device("cpu"))
    coarse = np.random.default_rng(0).gamma(0.5, 2.0, (2, 10, 12)).astype(np.float32)
    fine = reference_ensemble(downscaler, coarse, 2, seed=1, evaluations=3)
    assert fine.shape == (2, 2, 100, 120)
    blocks = fine.reshape(2, 2, 10, 10, 12, 10).mean(axis=(3, 5))
    np.testing.assert_allclose(
        blocks[..., :10].sum(axis=(2, 3)), coarse[None, :, :, :10].sum(axis=(2, 3)).repeat(2, 0), rtol=1e-4
    )
    assert np.abs(blocks - coarse).max() > 0.01
    assert (fine[0] != fine[1]).any()


def test_a_dry_tile_stays_dry(library: Library):
    factor = Factor(space=10, time=1)
    downscaler = Downscaler.load(library.serving(factor), factor, torch.device("cpu"))
    assert not reference_ensemble(downscaler, np.zeros((1, 10, 10), np.float32), 1, seed=0, evaluations=2).any()


def test_f_takes_its_threshold_off_the_root_or_the_amount():
    amount = torch.tensor([0.0, 4.0, 25.0])
    torch.testing.assert_close(TileFunction(True, 0.1)(amount), torch.tensor([0.0, 0.1, 0.4]))
    torch.testing.assert_close(TileFunction(False, 0.04)(amount), torch.tensor([0.0, 0.0, 0.21]))


def test_a_factor_that_the_authors_do_not_give_is_refused():
    with pytest.raises(FactorError, match=r"no setting for factor \(8,3\)"):
        authors_recipe(Factor(space=8, time=3))
