import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stsr_core.evaluation.bootstrap import LEAST_BLOCKS, SMALL, Block, Day, block_of, ratio_interval, sums_by_block
from stsr_core.evaluation.scores import (
    autocorrelation,
    characteristics,
    crps_field,
    daily_indices,
    fractions_skill,
    hourly_change,
    mean_spell,
    power_spectrum,
    rank_histogram,
    rmse,
    scores,
    seam_ratio,
    spectrum_db,
    spread_skill,
)
from stsr_core.factors import Factor


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_fair_crps_by_hand():
    # Members 0 and 2, truth 1: mean |x - y| = 1, fair spread term |0 - 2| / 2 = 1, so 1 - 1 = 0.
    ensemble = np.array([0.0, 2.0], np.float32).reshape(2, 1, 1, 1, 1)
    truth = np.ones((1, 1, 1, 1), np.float32)
    assert crps_field(ensemble, truth).item() == pytest.approx(0.0)
    assert crps_field(ensemble, 5 * truth).item() == pytest.approx(3.0)
    assert crps_field(ensemble[:1], 5 * truth).item() == 5.0
    assert np.isnan(crps_field(ensemble, np.nan * truth)).all()


def test_fair_crps_does_not_depend_on_the_number_of_members():
    truth = normal(2, 10, 50, 50)
    few, many = (crps_field(normal(m, 2, 10, 50, 50, seed=m), truth).mean() for m in (3, 20))
    assert few == pytest.approx(many, rel=0.02)
    # Closed form for a standard normal forecast of a standard normal truth: 1 / sqrt(pi).
    assert many == pytest.approx(1 / np.sqrt(np.pi), rel=0.02)


def test_a_reliable_ensemble_has_spread_equal_to_skill_and_flat_ranks():
    ensemble, truth = normal(8, 1, 20, 50, 50, seed=1), normal(1, 20, 50, 50)
    assert spread_skill(ensemble, truth) == pytest.approx(1.0, abs=0.02)
    assert spread_skill(0.5 * ensemble, truth) < 0.6
    np.testing.assert_allclose(rank_histogram(ensemble, truth), 1 / 9, atol=0.015)
    assert rank_histogram(ensemble - 9, truth)[-1] > 0.9
    assert rmse(truth[None] + 2, truth) == pytest.approx(2.0, rel=1e-5)


def test_scores_of_the_truth_itself_are_perfect():
    truth = np.random.default_rng(0).gamma(0.3, 3, (2, 24, 40, 40)).astype(np.float32)
    found = scores(truth[None], truth, Factor(space=8, time=1))
    assert found["rmse"] == 0
    assert found["spectrum_db"] == 0
    assert found["autocorrelation_difference"] == 0
    assert found["fss_1mm_9cells"] == pytest.approx(1.0)
    ratios = {k: v for k, v in found.items() if "_ratio" in k and not k.startswith("seam_ratio")}
    assert len(ratios) >= 10
    assert all(v == pytest.approx(1.0) for v in ratios.values()), ratios


def test_missing_truth_is_left_out():
    truth = np.random.default_rng(0).gamma(0.3, 3, (1, 4, 32, 32)).astype(np.float32)
    ensemble = np.stack([truth, truth + 1])
    holed, holed_ensemble = truth.copy(), ensemble.copy()
    holed[..., :8] = np.nan
    holed_ensemble[..., :8] = np.nan
    holed[:, 1, :8], holed_ensemble[:, :, 1, :8] = np.nan, np.nan  # as when one radar fails for an hour
    found = scores(holed_ensemble, holed, Factor(space=8, time=1))
    assert found["rmse"] == pytest.approx(0.5, rel=1e-5)
    assert all(np.isfinite(v) for v in found.values()), found


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 8, 8), (2, 5, 9)])
def test_small_samples_have_scores_that_are_undefined_not_warnings(shape):
    truth = np.random.default_rng(0).gamma(0.3, 3, (1, *shape)).astype(np.float32)
    for members in (1, 2):
        found = scores(np.stack([truth] * members), truth, Factor(space=4, time=1))
        assert np.isnan(found["hourly_change_ratio"]) == (shape[0] == 1)
        assert found["wet_fraction_ratio"] == 1


def test_spectrum_finds_missing_small_scales():
    truth = normal(1, 4, 64, 64)
    assert spectrum_db(0.1 * truth[None], truth, 8) == pytest.approx(20.0, abs=0.01)
    assert np.isnan(spectrum_db(truth[None], truth, 1))


def test_the_power_of_white_noise_is_the_same_at_every_wavenumber_for_any_number_of_frames():
    for frames in (40, 160):
        power = power_spectrum(normal(frames, 32, 40))
        np.testing.assert_allclose(power[3:17] / 32**2, 1.0, atol=0.1)


@pytest.mark.parametrize(("wavenumber", "counts"), [(3, False), (4, True), (20, True)])
def test_the_spectrum_is_compared_at_wavelengths_up_to_two_coarse_cells(wavenumber, counts):
    truth, x = normal(1, 4, 64, 64), np.arange(64) / 64
    wave = 3.0 * np.cos(2 * np.pi * wavenumber * x).astype(np.float32)
    assert (spectrum_db((truth + wave)[None], truth, 8) > 1.0) is counts  # 64 / (2 * 8) = 4


def test_ties_of_the_rank_are_broken_by_lot():
    ensemble, truth = np.zeros((3, 1, 1, 100, 100), np.float32), np.zeros((1, 1, 100, 100), np.float32)
    ensemble[1] = 1.0
    np.testing.assert_allclose(rank_histogram(ensemble, truth), [1 / 3, 1 / 3, 1 / 3, 0], atol=0.02)


def test_the_spectrum_is_that_of_pysteps():
    rapsd = pytest.importorskip("pysteps.utils.spectral").rapsd
    for n in (32, 33):
        frames = np.random.default_rng(n).gamma(0.3, 3, (3, n, n)).astype(np.float32)
        expected = np.mean([rapsd(frame, fft_method=np.fft) for frame in frames], axis=0)
        np.testing.assert_allclose(power_spectrum(frames)[: len(expected)] / n**2, expected, rtol=1e-5)


def test_the_rank_histogram_is_that_of_pysteps():
    """Of amounts without ties, which are broken by lot, and where it rains, for quanta below are what it is not of."""
    rankhist = pytest.importorskip("pysteps.verification.ensscores").rankhist
    amounts = 0.01 * np.random.default_rng(0).permutation(np.arange(1, 9 * 600 + 1)).reshape(9, 1, 1, 20, 30)
    members, truth = amounts[:8].astype(np.float32), amounts[8].astype(np.float32)
    expected = rankhist(members, truth, X_min=0.105)
    np.testing.assert_allclose(rank_histogram(members, truth), expected, atol=1e-12)


def test_seams_are_steps_at_the_borders_of_coarse_cells():
    smooth = np.broadcast_to(np.arange(24, dtype=np.float32), (1, 24, 24))
    assert seam_ratio(smooth + smooth.swapaxes(-1, -2), 8) == pytest.approx(1.0)
    squares = normal(1, 3, 3).repeat(8, 1).repeat(8, 2)
    assert seam_ratio(squares + 1e-3 * normal(1, 24, 24), 8) > 100


def test_spells_and_daily_indices_by_hand():
    series = np.array([0, 2, 2, 0, 0, 0, 3, 0], np.float32).reshape(8, 1, 1)
    hours = characteristics(series[None], steps_per_day=8)
    assert (hours["wet_spell"], hours["dry_spell"]) == (1.5, pytest.approx(5 / 3))
    # Days of 4 and 3 mm are one spell of two days; that of a single day says nothing.
    assert daily_indices(series, steps_per_day=4) == {
        "rx1day": 4.0, "sdii": 3.5, "wet_spell_days": 2.0, "dry_spell_days": 0.0
    }  # fmt: skip
    assert daily_indices(series, steps_per_day=8) == {"rx1day": 7.0, "sdii": 7.0}
    assert daily_indices(series, steps_per_day=9) == {}
    assert mean_spell(np.zeros((3, 1, 1), bool)) == 0.0
    assert hourly_change(series) == pytest.approx((2 + 0 + 2 + 0 + 0 + 3 + 3) / 7)


def test_spells_of_days_are_of_totals_of_1_mm_and_end_at_missing_days():
    # Wet for 1 and 1 days; dry for 2 before the missing day, for 1 and 2 after it.
    totals = np.array([1.0, 0.8, 0.8, np.nan, 0.0, 2.0, 0.5, 0.5], np.float32)
    found = daily_indices((totals / 2).repeat(2).reshape(16, 1, 1), steps_per_day=2)
    assert (found["wet_spell_days"], found["dry_spell_days"]) == (1.0, pytest.approx(5 / 3))
    assert found["rx1day"] == 2.0
    assert daily_indices(np.full((4, 1, 1), np.nan, np.float32), steps_per_day=2) == {}


def test_autocorrelation_of_slow_and_fast_fields():
    noise = np.abs(normal(50, 20, 20))
    slow = noise[:1].repeat(50, 0) + 0.01 * noise
    assert autocorrelation(slow) > 0.99
    assert abs(autocorrelation(noise)) < 0.1
    assert np.isnan(autocorrelation(np.ones((3, 2, 2), np.float32)))
    assert np.isnan(autocorrelation(np.zeros((3, 2, 2), np.float32)))


def test_fractions_skill_forgives_small_displacements_only():
    truth = np.zeros((1, 1, 60, 60), np.float32)
    truth[..., 20:30, 20:30] = 5
    near, far = np.roll(truth, 2, axis=-1)[None], np.roll(truth, 30, axis=-1)[None]
    assert fractions_skill(near, truth, 1.0, 9) > 0.9
    assert fractions_skill(far, truth, 1.0, 9) < 0.05


def test_fractions_skill_of_one_member_is_that_of_pysteps():
    fss = pytest.importorskip("pysteps.verification.spatialscores").fss
    ensemble, truth = (np.random.default_rng(k).gamma(0.3, 3, (1, 1, 50, 70)).astype(np.float32) for k in (0, 1))
    for threshold, scale in ((1.0, 9), (2.0, 4), (5.0, 33)):
        assert fractions_skill(ensemble[None], truth, threshold, scale) == pytest.approx(
            fss(ensemble[0, 0], truth[0, 0], threshold, scale), rel=1e-5
        )
    assert np.isnan(fractions_skill(ensemble[None], truth, 1e3, 9))


def test_fractions_skill_rewards_members_that_are_as_uncertain_as_the_truth():
    truth, *members = (np.random.default_rng(k).gamma(0.3, 3, (1, 2, 60, 60)).astype(np.float32) for k in range(17))
    together = fractions_skill(np.stack(members), truth, 1.0, 9)
    assert together > 1.01 * max(fractions_skill(member[None], truth, 1.0, 9) for member in members)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.2, 3.0), st.integers(0, 99))
def test_the_interval_of_a_ratio_holds_the_ratio(scale, seed):
    blocks = np.random.default_rng(seed).gamma(1.0, 1.0, 200)
    low, high = ratio_interval(scale * blocks, blocks)
    assert low == pytest.approx(scale)
    assert high == pytest.approx(scale)
    other = np.random.default_rng(seed + 1).gamma(1.0, 1.0, 200)
    low, high = ratio_interval(other, blocks)
    assert low < other.mean() / blocks.mean() < high


def test_the_interval_of_a_mean_over_many_blocks_is_that_of_a_normal_distribution():
    blocks = np.random.default_rng(0).gamma(2.0, 1.0, 400)
    low, high = ratio_interval(blocks, np.ones(400))
    assert (high - low) / 2 == pytest.approx(1.96 * blocks.std() / np.sqrt(400), rel=0.08)


def test_the_largest_amounts_are_those_of_each_member():
    truth = np.zeros((1, 2, 8, 8), np.float32)
    truth[0, 0, 0, 0] = 3.0
    found = scores(np.stack([truth, truth / 3, truth * 2]), truth, Factor(space=4, time=1))
    assert found["maximum_ratio"] == pytest.approx((3 + 1 + 6) / 3 / 3)


def test_ranks_of_amounts_that_are_the_same_in_quanta_are_ties():
    quanta = 10 * np.random.default_rng(0).integers(6, 8, (9, 1, 50, 40, 40))  # 0.6 or 0.7 mm, as a radar has them
    members, truth = quanta[:8].astype(np.float32) * np.float32(0.01), (quanta[8] / 100).astype(np.float32)
    assert (members != truth).mean() > 0.6  # two thirds of float32 numbers differ in the last digit, or in amount
    np.testing.assert_allclose(rank_histogram(members, truth), 1 / 9, atol=0.005)


def test_days_of_1_mm_are_wet():
    days = np.array([0.9, 1.1, 3.1], np.float32).reshape(3, 1, 1)
    assert daily_indices(days, steps_per_day=1)["sdii"] == pytest.approx(2.1)


def test_blocks_leave_missing_cells_out():
    crps = np.ones((1, 7, 130, 10), np.float32)
    crps[:, :6, :128] = np.nan
    assert sums_by_block(crps, SMALL).tolist() == [6 * 2 * 10, 128 * 10, 2 * 10]


def test_whole_days_of_places_are_resampled_where_there_are_enough():
    truth = np.ones((2, 72, 200, 160), np.float32)
    assert block_of(truth, steps_per_day=24) == Day(steps=24, cells=200)
    assert sums_by_block(truth, block_of(truth, 24)).tolist() == [24 * 200 * 160] * 6
    truth[1, 48:] = np.nan  # a day less
    assert block_of(truth, steps_per_day=24) == SMALL == Block(steps=6, cells=128)


def test_intervals_of_whole_days_are_wider_where_hours_of_a_day_are_alike():
    rng = np.random.default_rng(0)
    days = rng.gamma(2.0, 1.0, (4, 10, 1)).repeat(24, axis=2).reshape(4, 240, 1, 1).astype(np.float32)
    (low, high), (near, far) = (
        ratio_interval(sums_by_block(days, block), sums_by_block(np.ones_like(days), block))
        for block in (block_of(days, 24), SMALL)
    )
    assert high - low > 1.5 * (far - near)


def test_the_interval_is_that_of_the_ratio_of_means_where_blocks_are_not_alike():
    rng = np.random.default_rng(0)
    first, second = rng.gamma(2.0, 1.0, (2, 1, 600, 200, 10)).astype(np.float32)
    first[..., 128:, :] *= 3  # the edge, which has smaller blocks
    low, high = ratio_interval(sums_by_block(first, SMALL), sums_by_block(second, SMALL))
    assert low < first.mean() / second.mean() < high
    assert low + high == pytest.approx(2 * first.mean() / second.mean(), rel=0.03)


def test_few_blocks_have_no_interval():
    blocks = np.random.default_rng(0).gamma(2.0, 1.0, LEAST_BLOCKS)
    low, high = ratio_interval(blocks, np.ones(LEAST_BLOCKS))
    assert blocks.min() <= low < blocks.mean() < high <= blocks.max()
    for number in range(1, LEAST_BLOCKS):
        assert np.isnan(ratio_interval(blocks[:number], np.ones(number))).all()


def test_an_interval_leaves_resamples_without_rain_out():
    blocks = np.zeros(10)
    blocks[0] = 1.0  # a third of the resamples have none of it
    assert ratio_interval(2 * blocks, blocks) == (2.0, 2.0)
    assert ratio_interval(blocks, 0 * blocks) == (np.inf, np.inf)
    assert np.isnan(ratio_interval(0 * blocks, 0 * blocks)).all()
