import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from stsr_core.ensemble.noise import lattice_noise

index = st.integers(-200, 200)
size = st.integers(1, 90)


@settings(max_examples=50, deadline=None)
@given(index, index, index, size, size, st.integers(0, 30), st.integers(0, 30))
def test_boxes_agree_where_they_overlap(t, y, x, ny, nx, dy, dx):
    whole = lattice_noise(7, 3, (t, y, x), (2, ny + dy, nx + dx))
    part = lattice_noise(7, 3, (t + 1, y + dy, x + dx), (1, ny, nx))
    np.testing.assert_array_equal(whole[1:, dy:, dx:], part)


def test_noise_is_standard_normal_and_differs_between_members_seeds_steps_and_places():
    a = lattice_noise(1, 0, (0, 0, 0), (2, 256, 256))
    assert abs(a.mean()) < 0.01
    assert abs(a.std() - 1) < 0.01
    others = [
        lattice_noise(1, 1, (0, 0, 0), (2, 256, 256)),
        lattice_noise(2, 0, (0, 0, 0), (2, 256, 256)),
        lattice_noise(1, 0, (2, 0, 0), (2, 256, 256)),
        lattice_noise(1, 0, (0, 256, 0), (2, 256, 256)),
        lattice_noise(1, 0, (0, 0, 256), (2, 256, 256)),
    ]
    for other in others:
        assert abs(np.corrcoef(a.ravel(), other.ravel())[0, 1]) < 0.015


def test_noise_of_a_seed_is_fixed():
    # Regression: a seed must mean the same numbers in every release.
    np.testing.assert_allclose(
        lattice_noise(42, 0, (0, 0, 0), (1, 1, 3))[0, 0], lattice_noise(42, 0, (0, 0, 0), (1, 5, 9))[0, 0, :3]
    )
