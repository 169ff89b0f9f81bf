import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from stsr_core.evaluation.baselines import even_spreading, linear, rainfarm, without_rainfarm
from stsr_core.factors import Factor
from stsr_core.grids import coarsen

FACTOR = Factor(space=4, time=2)


@pytest.fixture
def coarse() -> np.ndarray:
    return np.random.default_rng(0).gamma(0.5, 2, (3, 8, 9)).astype(np.float32)


def test_even_spreading_conserves(coarse):
    np.testing.assert_allclose(coarsen(even_spreading(coarse, FACTOR)[0], FACTOR), coarse, rtol=1e-5)


def test_linear_keeps_what_is_even():
    np.testing.assert_allclose(linear(np.full((3, 5, 6), 2.0, np.float32), FACTOR), 1.0, rtol=1e-5)


def test_rainfarm_is_left_out_where_a_grid_is_too_small_for_a_spectrum():
    wet = np.random.default_rng(0).gamma(0.5, 2.0, (2, 4, 3)).astype(np.float32)
    assert without_rainfarm(wet.shape) is None
    assert np.isfinite(rainfarm(wet, FACTOR, members=1, seed=0)).all()
    for shape in ((2, 3, 3), (2, 1, 9), (2, 9, 1)):
        assert "more cells" in str(without_rainfarm(shape))


def test_rainfarm_spreads_frames_evenly_of_which_no_slope_can_be_fitted(coarse):
    coarse[0] = 2.0  # the same everywhere
    coarse[1, :4] = np.arange(1.0, 5)[:, None]  # other in every row only
    one, factor = coarse[:, :4, :8], Factor(space=4, time=1)
    found = rainfarm(one, factor, members=1, seed=3)
    np.testing.assert_allclose(found[0, :2], even_spreading(one, factor)[0, :2], rtol=1e-6)
    assert found[0, 2].reshape(4, 4, 8, 4).std(axis=(1, 3)).max() > 0.1


def test_rainfarm_that_is_smoothed_conserves_and_does_not_step_at_the_borders_of_coarse_cells():
    factor = Factor(space=8, time=1)
    coarse = gaussian_filter(np.random.default_rng(0).gamma(0.1, 2.0, (3, 12, 12)), (0, 1.5, 1.5)).astype(np.float32)

    def steps_at_borders(fields: np.ndarray) -> float:
        steps = np.abs(np.diff(fields, axis=-1)).mean(axis=(0, 1, 2))
        return float(steps[7::8].mean() / np.delete(steps, np.s_[7::8]).mean())

    plain, smooth = (rainfarm(coarse, factor, members=2, seed=3, smooth=how) for how in (False, True))
    for member in smooth:
        np.testing.assert_allclose(coarsen(member, factor), coarse, rtol=1e-4, atol=1e-5)
    assert steps_at_borders(plain) > 2
    assert 0.8 < steps_at_borders(smooth) < 1.2
    assert without_rainfarm((3, 12, 12), smooth=True) is None
    assert "squares only" in str(without_rainfarm((3, 12, 13), smooth=True))


def test_rainfarm_conserves_varies_and_repeats(coarse):
    coarse[:, :, 5:] = 0
    first = rainfarm(coarse, FACTOR, members=2, seed=3)
    assert first.shape == (2, 6, 32, 36)
    for member in first:
        np.testing.assert_allclose(coarsen(member, FACTOR), coarse, rtol=1e-4, atol=1e-5)
    assert np.abs(first[0] - first[1]).max() > 0.1
    state = np.random.get_state()[1].copy()
    np.testing.assert_array_equal(first, rainfarm(coarse, FACTOR, members=2, seed=3))
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    assert not rainfarm(0 * coarse, FACTOR, members=1, seed=3).any()
