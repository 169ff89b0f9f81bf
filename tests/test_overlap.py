import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

import stsr_core.overlap
from stsr_core.grids import Axis, Grid
from stsr_core.overlap import shares

GRID = Grid(Axis(35.0, -10.0, 4), Axis(-15.0, 10.0, 4))  # x -20 to 20, y 0 to 40


def exact(corners, grid):
    """The same by cutting polygons, one by one."""
    x, y = grid.x.edges, grid.y.edges
    cells = [(i, j) for i in range(grid.y.size) for j in range(grid.x.size)]
    squares = [
        shapely.box(min(x[j : j + 2]), min(y[i : i + 2]), max(x[j : j + 2]), max(y[i : i + 2])) for i, j in cells
    ]
    return np.array([[s.intersection(shapely.Polygon(c)).area / s.area for c in corners] for s in squares])


def star(seed, corners):
    """A polygon around a point, in general not convex, of either sense of rotation."""
    rng = np.random.default_rng(seed)
    angle, radius = np.sort(rng.uniform(0, 2 * np.pi, corners)), rng.uniform(1, 25, corners)
    ring = rng.uniform((-25, -5), (25, 45)) + np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=-1)
    return ring if seed % 2 else ring[::-1]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, 9))
def test_shares_are_those_of_polygons_that_are_cut(seed, corners):
    rings = [r for r in (star(seed + k, corners) for k in range(4)) if shapely.Polygon(r).is_valid]
    if rings:
        np.testing.assert_allclose(shares(np.stack(rings), GRID).toarray(), exact(rings, GRID), atol=1e-12)


def test_edges_on_edges_and_corners_on_corners_share_nothing_and_lose_nothing():
    # A cell of the grid itself; its neighbours share an edge or a corner with it. The last corner is repeated, as in
    # meshes of triangles and quadrangles.
    ring = np.array([[-10.0, 30], [0, 30], [0, 20], [-10, 20], [-10, 20]])
    found = shares(ring[None], GRID).toarray().reshape(4, 4)
    expected = np.zeros((4, 4))
    expected[1, 1] = 1
    assert (found == expected).all()


def test_cells_far_away_and_cells_without_a_place_share_nothing():
    away = np.array([[[100.0, 100], [110, 100], [110, 110], [100, 110]], np.zeros((4, 2))])
    assert shares(away, GRID).nnz == 0


@pytest.mark.parametrize("at_once", [1, 7, 1 << 17])
def test_shares_do_not_depend_on_how_many_are_computed_at_a_time(monkeypatch, at_once):
    monkeypatch.setattr(stsr_core.overlap, "PAIRS_AT_ONCE", at_once)
    rings = np.stack([star(seed, 6) for seed in range(20) if shapely.Polygon(star(seed, 6)).is_valid])
    np.testing.assert_allclose(shares(rings, GRID).toarray(), exact(rings, GRID), atol=1e-12)
