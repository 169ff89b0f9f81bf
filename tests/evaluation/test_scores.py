import numpy as np
import pytest

from stsr_core.evaluation.evaluate import even_baseline, linear_baseline
from stsr_core.evaluation.scores import fair_crps, hourly_change, scores, spectrum_db, spread_skill
from stsr_core.factors import Factor
from stsr_core.grids import coarsen


def test_fair_crps_by_hand():
    # Members 0 and 2, truth 1: mean |x - y| = 1, fair spread term |0 - 2| / 2 = 1, so 1 - 1 = 0.
    ensemble = np.array([[[[0.0]]], [[[2.0]]]], np.float32)
    assert fair_crps(ensemble, np.array([[[1.0]]], np.float32)) == pytest.approx(0.0)
    assert fair_crps(ensemble, np.array([[[5.0]]], np.float32)) == pytest.approx(3.0)
    assert fair_crps(ensemble[:1], np.array([[[5.0]]], np.float32)) == 5.0


def test_fair_crps_does_not_depend_on_the_number_of_members():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(20, 50, 50)).astype(np.float32)
    few, many = (fair_crps(rng.normal(size=(m, 20, 50, 50)).astype(np.float32), truth) for m in (3, 20))
    assert few == pytest.approx(many, rel=0.02)
    # Closed form for a standard normal forecast of a standard normal truth: 1 / sqrt(pi).
    assert many == pytest.approx(1 / np.sqrt(np.pi), rel=0.02)


def test_a_reliable_ensemble_has_spread_equal_to_skill():
    rng = np.random.default_rng(0)
    ensemble = rng.normal(size=(8, 20, 50, 50)).astype(np.float32)
    truth = rng.normal(size=(20, 50, 50)).astype(np.float32)
    assert spread_skill(ensemble, truth) == pytest.approx(1.0, abs=0.02)
    assert spread_skill(0.5 * ensemble, truth) < 0.6


def test_scores_of_the_truth_itself_are_perfect():
    truth = np.random.default_rng(0).gamma(0.3, 3, (6, 40, 40)).astype(np.float32)
    found = scores(truth[None], truth, 8)
    assert found["crps"] == 0
    assert found["spectrum_db"] == 0
    assert all(found[k] == 1 for k in found if k.endswith("_ratio") or k.startswith("quantile"))


def test_spectrum_finds_missing_small_scales():
    truth = np.random.default_rng(0).normal(size=(4, 64, 64)).astype(np.float32)
    assert spectrum_db(0.1 * truth[None], truth, 8) == pytest.approx(20.0, abs=0.01)
    assert hourly_change(truth) > 0


def test_baselines_conserve_or_interpolate():
    factor = Factor(space=4, time=2)
    coarse = np.random.default_rng(0).gamma(0.5, 2, (3, 5, 6)).astype(np.float32)
    np.testing.assert_allclose(coarsen(even_baseline(coarse, factor)[0], factor), coarse, rtol=1e-5)
    even = np.full((3, 5, 6), 2.0, np.float32)
    np.testing.assert_allclose(linear_baseline(even, factor), 1.0, rtol=1e-5)
