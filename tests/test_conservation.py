import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stsr_core import conservation
from stsr_core.conservation import CEILING_MM, LIFTED_SHARE, LIGHT_MM, conserve, quantise, threshold
from stsr_core.errors import ClosureError, ShapeError
from stsr_core.evaluation.scores import seam_ratio
from stsr_core.factors import ConservationFunction, Factor
from stsr_core.grids import coarsen

EXACT = ConservationFunction(threshold_mm=0.05)
TAPERED = ConservationFunction(threshold_mm=0.05, excess=1.0)


@st.composite
def fields(draw: st.DrawFn) -> tuple[Factor, torch.Tensor, torch.Tensor]:
    factor = Factor(space=draw(st.integers(1, 6)), time=draw(st.integers(1, 4)))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    fine_shape = (2 * factor.time, 3 * factor.space, 2 * factor.space)
    fine = rng.gamma(0.2, 3.0, fine_shape) * (rng.random(fine_shape) < draw(st.floats(0, 1)))
    coarse = rng.gamma(0.3, 5.0, (2, 3, 2)) * (rng.random((2, 3, 2)) < 0.7)
    return factor, torch.from_numpy(fine.astype(np.float32)), torch.from_numpy(coarse.astype(np.float32))


@settings(max_examples=200, deadline=None)
@given(fields(), st.sampled_from([EXACT, TAPERED]))
def test_closure_below_1e_5_relative_and_dry_cells_stay_dry(case, function):
    factor, fine, coarse = case
    out = conserve(fine, coarse, factor, function)
    assert (out >= 0).all()
    np.testing.assert_allclose(coarsen(out.numpy(), factor), coarse.numpy(), rtol=1e-5, atol=1e-7)
    dry = (coarse == 0).repeat_interleave(factor.time, 0)
    dry = dry.repeat_interleave(factor.space, 1).repeat_interleave(factor.space, 2)
    assert (out[dry] == 0).all()


@settings(max_examples=50, deadline=None)
@given(fields())
def test_what_is_closed_already_stays_as_it_is(case):
    factor, fine, coarse = case
    uncut = ConservationFunction(threshold_mm=0.0)
    once = conserve(fine, coarse, factor, uncut)
    assume(once.max() < CEILING_MM)
    torch.testing.assert_close(conserve(once, coarse, factor, uncut), once, rtol=1e-4, atol=1e-5)


def test_f_takes_its_threshold_off():
    fine = torch.tensor([[[0.1, 0.3], [0.5, 1.1]]])
    out = conserve(fine, torch.ones(1, 1, 1), Factor(space=2, time=1), ConservationFunction(threshold_mm=0.1))
    np.testing.assert_allclose(out[0], np.array([[0.0, 0.2], [0.4, 1.0]]) * 4 / 1.6, rtol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.99))
def test_half_of_a_light_rain_is_distributed_as_the_whole(seed, share):
    rng = np.random.default_rng(seed)
    factor = Factor(space=5, time=2)
    fine = torch.from_numpy(rng.gamma(0.3, 1.0, (4, 15, 10)).astype(np.float32))
    coarse = torch.from_numpy(rng.uniform(0.1, 1.0, (2, 3, 2)).astype(np.float32)) * (2 * LIGHT_MM)
    whole, part = (conserve(fine * x, coarse * x, factor, EXACT) for x in (1.0, share))
    torch.testing.assert_close(part, whole * share, rtol=1e-3, atol=1e-5)
    assert (whole == 0).any()  # f takes something off


def test_coarse_cells_do_not_show_as_squares():
    rng = np.random.default_rng(0)
    factor = Factor(space=8, time=2)
    fine = torch.from_numpy(rng.gamma(4.0, 0.25, (2, 6, 64, 64)).astype(np.float32))
    # Block totals that the field does not have, correlated as rain is.
    noise = torch.from_numpy(rng.normal(size=(1, 3, 8, 8)).astype(np.float32))
    smooth = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(noise, (1, 1, 1, 1), mode="replicate"), 3, 1)
    coarse = 2 * torch.exp(1.5 * smooth)
    gain = (conserve(fine, coarse, factor, ConservationFunction(threshold_mm=0.0)) / fine).log().numpy()
    assert seam_ratio(gain, 8) < 2
    even = np.log(coarse.numpy() / coarsen(fine[0].numpy(), factor)).repeat(2, 1).repeat(8, 2).repeat(8, 3)
    assert np.isnan(seam_ratio(even, 8))  # one gain per block steps at its borders only


@settings(max_examples=100, deadline=None)
@given(fields())
def test_tapered_f_holds_no_cell_beyond_its_bound(case):
    factor, fine, coarse = case
    out = conserve(fine, coarse, factor, TAPERED)
    around = torch.nn.functional.max_pool3d(coarse[None], 3, stride=1, padding=1)[0]
    most = around + TAPERED.excess * around.sqrt()
    for axis, parts in enumerate((factor.time, factor.space, factor.space)):
        most = most.repeat_interleave(parts, axis)
    assert (out <= most * (1 + 1e-4) + 1e-6).all()


def test_what_a_cell_may_not_hold_goes_to_the_others_in_proportion():
    fine = torch.full((1, 4, 4), 0.1)
    fine[0, 0, 0], fine[0, 3, 3] = 100.0, 0.2
    function = ConservationFunction(threshold_mm=0.0, excess=3.0)
    out = conserve(fine, torch.ones(1, 1, 1), Factor(space=4, time=1), function)[0]
    assert out[0, 0] == pytest.approx(4.0, rel=1e-4)
    assert out[3, 3] == pytest.approx(2 * float(out[1, 1]), rel=1e-4)
    assert out.sum() == pytest.approx(16.0, rel=1e-5)


@pytest.mark.parametrize("beside", [(1, 0, 0), (1, 2, 1), (0, 1, 2), (2, 1, 1)])
def test_the_most_that_a_cell_may_hold_is_that_of_the_wettest_neighbour_in_space_and_time(beside):
    fine = torch.full((3, 30, 30), 0.1)
    fine[1, 15, 15] = 1000.0
    coarse = torch.ones(3, 3, 3)
    function = ConservationFunction(threshold_mm=0.0, excess=3.0)
    alone = conserve(fine, coarse, Factor(space=10, time=1), function)
    coarse[beside] = 4.0
    out = conserve(fine, coarse, Factor(space=10, time=1), function)
    assert alone[1, 15, 15] == pytest.approx(1 + 3 * 1, rel=1e-3)
    assert out[1, 15, 15] == pytest.approx(4 + 3 * 2, rel=1e-3)


def test_what_is_unknown_of_the_gain_is_the_mean_of_what_is_known_around_it():
    known = torch.zeros(1, 1, 3, 5, dtype=torch.bool)
    known[0, 0, 1, 1] = known[0, 0, 1, 3] = True
    found = conservation._filled(torch.where(known, torch.tensor([0.0, 2.0, 0.0, 6.0, 0.0]), 99.0), known)
    torch.testing.assert_close(found[0, 0], torch.tensor([2.0, 2.0, 4.0, 6.0, 6.0]).expand(3, 5))


def test_a_gain_is_bounded_where_fields_have_nothing_of_their_totals():
    blocks, factor = torch.full((1, 1, 1, 2, 4, 2, 4), 1e-30), Factor(space=4, time=1)
    gain = conservation._smooth_gain(blocks, torch.ones(1, 1, 2, 2), factor)
    assert gain.max() == conservation.LARGEST_LOG_GAIN


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3]), st.sampled_from([EXACT, TAPERED]))
def test_steps_are_conserved_alike_few_at_a_time_or_all_at_once(seed, time, function):
    rng = np.random.default_rng(seed)
    factor = Factor(space=4, time=time)
    fine = torch.from_numpy(rng.gamma(0.3, 3.0, (2, 5 * time, 12, 8)).astype(np.float32))
    coarse = torch.from_numpy(rng.gamma(0.3, 5.0, (5, 3, 2)).astype(np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conservation, "SLAB_CELLS", 2 * time * 12 * 8)
        assert len(conservation.slabs(coarse, factor)) == 3
        few = conserve(fine, coarse, factor, function)
    torch.testing.assert_close(few, conserve(fine, coarse, factor, function), rtol=1e-5, atol=1e-6)
    whole = threshold(coarse[None], factor, function)
    torch.testing.assert_close(threshold(coarse[None], factor, function, slice(1, 3)), whole[:, time : 3 * time])


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-37, 38))
def test_no_field_however_far_from_its_totals_breaks_conservation(seed, exponent):
    rng = np.random.default_rng(seed)
    fine = 10.0**exponent * rng.gamma(0.05, 1.0, (2, 32, 32)) * (rng.random((2, 32, 32)) < 0.2)
    fine = fine.clip(max=np.finfo(np.float32).max)
    coarse = (rng.gamma(0.1, 30.0, (1, 4, 4)) * (rng.random((1, 4, 4)) < 0.5)).astype(np.float32)
    factor = Factor(space=8, time=2)
    for function in (EXACT, TAPERED):
        out = conserve(torch.from_numpy(fine.astype(np.float32)), torch.from_numpy(coarse), factor, function).numpy()
        np.testing.assert_allclose(coarsen(out, factor), coarse, rtol=1e-5, atol=1e-7)


def test_a_tapered_f_knows_the_ceiling_too():
    fine = torch.full((1, 20, 20), 0.2)
    fine[0, 3, 4] = 4000.0
    function = ConservationFunction(threshold_mm=0.0, excess=10.0)
    out = conserve(fine, torch.full((1, 2, 2), 200.0), Factor(space=10, time=1), function)
    assert out.max() == pytest.approx(CEILING_MM, rel=5e-3)


@pytest.mark.parametrize("function", [EXACT, TAPERED])
def test_no_cell_holds_more_than_the_ceiling_and_its_even_share(function):
    fine = torch.full((1, 20, 20), 0.2)
    fine[0, 3, 4] = 400.0
    out = conserve(fine, torch.full((1, 2, 2), 20.0), Factor(space=10, time=1), function)
    assert out.max() <= CEILING_MM + 20
    np.testing.assert_allclose(coarsen(out.numpy(), Factor(space=10, time=1)), 20.0, rtol=1e-5)


def test_a_block_that_is_dry_without_differences_is_filled_evenly():
    out = conserve(torch.zeros(2, 4, 4), torch.full((1, 2, 2), 3.0), Factor(space=2, time=2), EXACT)
    np.testing.assert_allclose(out, 1.5)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([0.02, 0.3, 2.0]))
def test_a_dry_block_rains_where_it_was_nearest_to_rain(seed, time, wanted):
    rng = np.random.default_rng(seed)
    levels = rng.permutation(np.linspace(-0.2, 0.0, 2 * time * 100))  # no two alike
    dry = torch.from_numpy(levels.reshape(2 * time, 10, 10).astype(np.float32))
    coarse = torch.tensor([wanted, 0.0]).reshape(2, 1, 1)
    out = conserve(dry, coarse, Factor(space=10, time=time), EXACT)
    assert (out[time:] == 0).all()
    assert out[:time].sum() == pytest.approx(100 * wanted, rel=1e-5)
    wet = out[:time] > 0
    assert wet.sum() == round(LIFTED_SHARE * 100)
    assert dry[:time][wet].min() > dry[:time][~wet].max()
    assert torch.equal(out[:time][wet].argsort(), dry[:time][wet].argsort())


def test_a_missing_coarse_cell_gives_a_missing_block_and_leaves_its_neighbours_alone():
    fine = torch.rand(1, 4, 4) + 0.1
    coarse = torch.tensor([[[1.0, float("nan")], [2.0, 3.0]]])
    factor = Factor(space=2, time=1)
    out = conserve(fine, coarse, factor, EXACT)
    assert torch.isnan(out[0, :2, 2:]).all()
    closed = coarsen(out.numpy(), factor)
    np.testing.assert_allclose(closed[0, [0, 1, 1], [0, 0, 1]], [1.0, 2.0, 3.0], rtol=1e-5)


def test_shapes_that_do_not_belong_together_are_refused():
    with pytest.raises(ShapeError, match=r"is not coarse .* refined by \(3,1\)"):
        conserve(torch.zeros(1, 4, 4), torch.zeros(1, 2, 2), Factor(space=3, time=1), EXACT)


@pytest.mark.parametrize("damaged", [float("nan"), float("inf")])
def test_amounts_that_are_not_finite_are_refused(damaged):
    with pytest.raises(ClosureError, match="not finite"):
        conserve(torch.full((1, 2, 2), damaged), torch.ones(1, 1, 1), Factor(space=2, time=1), EXACT)


@settings(max_examples=200, deadline=None)
@given(fields())
def test_stored_quanta_sum_exactly_to_the_rounded_coarse_total(case):
    factor, fine, coarse = case
    conserved = conserve(fine, coarse, factor, EXACT)
    quanta, conserved = quantise(conserved, coarse, factor, 0.01).numpy(), conserved.numpy()
    s, t = factor.space, factor.time
    sums = quanta.reshape(2, t, 3, s, 2, s).sum(axis=(1, 3, 5))
    np.testing.assert_array_equal(sums, np.rint(s * s * coarse.numpy().astype(np.float64) / 0.01))
    assert (quanta >= 0).all()
    assert np.abs(quanta * 0.01 - conserved).max() < 0.015 + 1e-5 * conserved.max()
    assert (quanta[conserved == 0] == 0).all()


def test_a_drizzle_of_parts_of_a_quantum_keeps_its_amount():
    rng = np.random.default_rng(0)
    factor = Factor(space=25, time=6)
    fine = torch.from_numpy(rng.gamma(1.0, 1e-4, (6, 25, 25)).astype(np.float32))
    coarse = fine.double().mean(dim=(1, 2)).sum().float().reshape(1, 1, 1)
    quanta = quantise(fine, coarse, factor, 0.01)
    assert quanta.sum() == round(float(fine.double().sum()) / 0.01)
    assert quanta.max() == 1


def test_quantise_marks_missing_blocks():
    fine = torch.ones(1, 2, 4)
    fine[0, 0, 0] = torch.nan
    quanta = quantise(fine, torch.tensor([[[torch.nan, 1.0]]]), Factor(space=2, time=1), 0.01)
    np.testing.assert_array_equal(quanta, [[[-1, -1, 100, 100], [-1, -1, 100, 100]]])
