import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stsr_core.ensemble.windows import AxisLattice, WindowLattice
from stsr_core.factors import Factor, recipe

SPANS = st.tuples(st.integers(-100, 100), st.integers(1, 120)).map(lambda a: (a[0], a[0] + a[1]))


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 30), SPANS, st.data())
def test_windows_cover_a_span_and_nothing_else(length, span, data):
    lattice = AxisLattice(length, data.draw(st.integers(0, length // 2)), length)
    covered = np.zeros(span[1] - span[0], bool)
    for a, b in lattice.covering(span):
        assert span[0] <= a < b <= span[1]
        assert b - a <= length
        covered[a - span[0] : b - span[0]] = True
    assert covered.all()


def test_a_span_within_the_overlap_of_two_windows_has_the_first_alone():
    lattice = AxisLattice(20, 5, 20)  # windows from -15, 0, 15
    assert lattice.covering((16, 19)) == [(16, 19)]
    assert [w.tolist() for w in lattice.weights((16, 19), 1)] == [[1.0, 1.0, 1.0]]


@settings(max_examples=100, deadline=None)
@given(SPANS, st.integers(0, 40), st.integers(1, 40))
def test_windows_lie_on_one_lattice_whatever_span_asks_for_them(span, offset, width):
    lattice = AxisLattice(20, 3, 20)
    start = min(span[0] + offset, span[1] - 1)
    part = start, min(start + width, span[1])
    everything = lattice.covering(span)
    assert {(max(a, part[0]), min(b, part[1])) for a, b in everything} >= set(lattice.covering(part))


@settings(max_examples=100, deadline=None)
@given(SPANS, SPANS)
def test_what_was_cut_off_before_a_window_leads_back_to_its_place_on_the_lattice(rows, columns):
    lattice = WindowLattice(AxisLattice(6, 1, 6), AxisLattice(20, 3, 20))
    for window in lattice.covering(((0, 1), rows, columns)):
        for (start, stop), before in zip(window[1:], lattice.cut(window), strict=True):
            assert (start - before) % 17 == 0
            assert before == 0 or start in (rows[0], columns[0])
            assert 0 <= before < 17
            assert stop - (start - before) <= 20


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 30), SPANS, st.integers(1, 6), st.data())
def test_blending_weights_are_positive_and_add_up_to_one(length, span, parts, data):
    lattice = AxisLattice(length, data.draw(st.integers(0, length // 2)), length)
    total = np.zeros((span[1] - span[0]) * parts)
    for (a, b), weights in zip(lattice.covering(span), lattice.weights(span, parts), strict=True):
        assert len(weights) == (b - a) * parts
        assert weights.min() > 0
        total[(a - span[0]) * parts : (b - span[0]) * parts] += weights
    np.testing.assert_allclose(total, 1.0, rtol=1e-6)


@settings(max_examples=100, deadline=None)
@given(SPANS, st.integers(10, 20))
def test_a_box_reaches_as_far_as_its_windows_and_slivers_are_none_of_them(box, far):
    lattice = AxisLattice(20, 3, far)
    start, stop = lattice.reach(*box, (-1000, 1000))
    assert 6 <= box[0] - start <= far + 3  # 3 are left where the next window, which is not there, would blend in
    assert 6 <= stop - box[1] <= far + 3
    assert start % 17 == 0 or box[0] - start >= far
    assert (stop - 20) % 17 == 0 or stop - box[1] >= far
    assert min(b - a for a, b in lattice.covering((start, stop))) >= far


def test_a_box_reaches_no_further_than_the_domain():
    assert AxisLattice(20, 3, 9).reach(5, 98, (0, 100)) == (0, 100)


@pytest.mark.parametrize(("s", "t"), [(10, 1), (8, 3), (25, 6), (1, 3)])
def test_weights_fall_linearly_over_the_overlap_of_whole_windows(s, t):
    lattice = WindowLattice.of(recipe(Factor(space=s, time=t)))
    n, overlap = lattice.space.length, lattice.space.overlap
    assert lattice.space.far >= overlap  # for conservation, which sees the blend around a shard
    stride = n - overlap
    inner = lattice.space.weights((0, 4 * stride), s)[1]
    assert len(inner) == n * s
    np.testing.assert_allclose(np.diff(inner[: overlap * s]), 1 / (overlap * s), rtol=1e-3)
    np.testing.assert_allclose(inner[overlap * s : stride * s], 1.0)


def test_windows_of_a_box_and_their_weights_come_in_one_order():
    lattice = WindowLattice.of(recipe(Factor(space=10, time=1)))
    reach = lattice.reach(((0, 24), (0, 40), (5, 60)), ((0, 48), (0, 40), (0, 90)))
    windows, weights = lattice.covering(reach), lattice.weights(reach, (1, 10, 10))
    assert len(windows) > 9
    for window, axes in zip(windows, weights, strict=True):
        assert [len(a) for a in axes] == [(b - a) * n for (a, b), n in zip(window, (1, 10, 10), strict=True)]
