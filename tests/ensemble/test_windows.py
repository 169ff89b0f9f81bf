import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stsr_core.ensemble.windows import AxisLattice, WindowLattice
from stsr_core.factors import Factor, recipe


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 30), st.data())
def test_windows_cover_the_box_inside_the_domain(length, data):
    lattice = AxisLattice(length, data.draw(st.integers(0, length // 2)))
    low = data.draw(st.integers(-100, 100))
    high = low + data.draw(st.integers(1, 120))
    start = data.draw(st.integers(low, high - 1))
    stop = data.draw(st.integers(start + 1, high))
    windows = lattice.covering(start, stop, (low, high))
    covered = np.zeros(high - low, bool)
    for a, b in windows:
        assert low <= a < b <= high
        assert b - a <= length
        covered[a - low : b - low] = True
    assert covered[start - low : stop - low].all()


@settings(max_examples=100, deadline=None)
@given(st.integers(-50, 50), st.integers(1, 60), st.integers(0, 40), st.integers(1, 40))
def test_windows_do_not_depend_on_the_box_that_asks(low, size, offset, width):
    lattice, domain = AxisLattice(20, 3), (low, low + size)
    everything = lattice.covering(*domain, domain)
    start = min(low + offset, low + size - 1)
    stop = min(start + width, low + size)
    assert set(lattice.covering(start, stop, domain)) <= set(everything)


@pytest.mark.parametrize(("s", "t"), [(10, 1), (8, 3), (25, 6), (1, 3)])
def test_blending_weights_are_positive_and_neighbours_add_up_evenly(s, t):
    lattice = WindowLattice.of(recipe(Factor(space=s, time=t)))
    n = lattice.space.length
    window = ((0, lattice.time.length), (0, n), (0, n))
    taper = lattice.taper(window, (t, s, s))
    assert taper.shape == (lattice.time.length * t, n * s, n * s)
    assert taper.min() > 0
    overlap = lattice.space.overlap * s
    row = taper[taper.shape[0] // 2, n * s // 2]
    np.testing.assert_allclose(row[-overlap:] + row[:overlap], 1.0, rtol=1e-5)
