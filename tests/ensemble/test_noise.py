import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stsr_core.ensemble.noise import WORD, lattice_noise, philox

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
        assert abs(np.corrcoef(a.flatten(), other.flatten())[0, 1]) < 0.015


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_generator_gives_the_known_answers_of_its_authors(counter, key, words):
    assert tuple(int(w) for w in philox(tuple(torch.tensor(c) for c in counter), key)) == words


def test_noise_of_a_seed_is_fixed():
    # Regression: a seed must mean the same numbers in every release.
    found = lattice_noise(42, 3, (-5, 7, 1), (2, 1, 3), stream=6)
    torch.testing.assert_close(
        found, torch.tensor([[[-0.422308, 0.106376, -1.132745]], [[0.665947, -0.140199, 0.135757]]]), atol=1e-6, rtol=0
    )
