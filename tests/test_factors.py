import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stsr_core.errors import FactorError
from stsr_core.factors import Factor, Family, nearest_spacing, recipe

FAMILY = Family((Factor(space=10, time=1), Factor(space=8, time=3), Factor(space=25, time=6)))
any_factor = st.builds(Factor, space=st.integers(1, 25), time=st.integers(1, 6))


def test_nearest_is_by_log_distance_on_both_axes():
    match = FAMILY.nearest(9.2, 1)
    assert match.factor == Factor(space=10, time=1)
    assert match.distance == pytest.approx(math.log(10 / 9.2))
    assert FAMILY.nearest(8, 3).distance == 0


@pytest.mark.parametrize(("space", "time"), [(math.nan, 1.0), (0.0, 1.0), (10.0, math.inf), (10.0, -1.0)])
def test_what_is_no_factor_is_refused(space, time):
    with pytest.raises(FactorError, match="finite numbers above 0 are needed"):
        FAMILY.nearest(space, time)


def test_the_spacing_that_is_told_is_the_nearest_by_its_logarithm():
    assert [nearest_spacing(km) for km in (0.1, 0.93, 1.4, 1.45, 4.6, 60.0)] == [1, 1, 1, 2, 5, 5]
    assert nearest_spacing(4.6, (1, 3)) == 3
    assert recipe(Factor(space=8, time=3)).told(5).spacing_km == 5


def test_a_request_beyond_the_limit_is_refused_and_told_what_to_train():
    with pytest.raises(FactorError, match=r"nearest that is served is \(8,3\).*--space 10 --time 6"):
        FAMILY.nearest(10, 6)


def test_a_request_that_no_factor_could_serve_is_told_what_target_grid_it_needs():
    # 0.25 degrees to 500 m needs 48 = 1.92 * 25; a day to 3 h needs 8 = 1.333 * 6.
    with pytest.raises(FactorError, match=r"beyond \(25,6\), so none .* a spacing 1.92 times as wide, or the source"):
        FAMILY.nearest(48, 1)
    with pytest.raises(FactorError, match=r"needs steps 1.33 times as long, or the source must be finer"):
        FAMILY.nearest(2, 8)


def test_nobody_is_told_to_train_what_is_served_or_refines_nothing():
    with pytest.raises(FactorError, match=r"the target grid needs steps 0.5 times as long, or the source must be co"):
        FAMILY.nearest(10, 0.5)
    with pytest.raises(FactorError, match=r"needs a spacing 0.6 times as wide, or the source must be coarser"):
        FAMILY.nearest(0.6, 1)
    with pytest.raises(FactorError, match=r"needs a spacing 0.5 times as wide and steps 0.25 times as long, or"):
        FAMILY.nearest(0.5, 0.25)
    with pytest.raises(FactorError, match=r"is \(10,1\), further .* \(25,6\). Ask for another .*STSR_MATCH_LIMIT"):
        FAMILY.nearest(9.6, 1, limit=1.02)
    for refused in (lambda: FAMILY.nearest(0.8, 1.2), lambda: FAMILY.exact(1, 1)):
        with pytest.raises(FactorError, match=r"\(1,1\) refines nothing: ask for a narrower spacing or shorter steps"):
            refused()


def test_an_unsupported_factor_names_the_nearest():
    with pytest.raises(FactorError, match=r"\(9,1\) is not served.*The nearest is \(10,1\)"):
        FAMILY.exact(9, 1)
    with pytest.raises(FactorError, match=r"ask for it. No factor goes beyond \(25,6\), so none can be"):
        FAMILY.exact(30, 1)


def test_an_empty_family_says_how_to_fill_it():
    with pytest.raises(FactorError, match="Train one"):
        Family(()).nearest(10, 1)


def test_a_factor_is_one_of_the_family_or_refused():
    assert Factor.of(25, 6) == Factor(space=25, time=6)
    for space, time in ((26, 1), (0, 1), (1, 7), (1, 0)):
        with pytest.raises(FactorError, match=rf"\({space},{time}\) is asked for; it can be 1 to 25 in space"):
            Factor.of(space, time)


@given(any_factor)
def test_recipe_holds_for_the_whole_family(factor):
    configuration = recipe(factor)
    assert configuration.context_length * factor.time >= 10 or configuration.context_length == 3
    assert 0.6 * factor.space <= configuration.conservation.excess <= factor.space


@given(any_factor, any_factor)
def test_noise_has_more_in_common_the_more_is_missing_and_the_wider_cells_are(a, b):
    if a.underdetermination > b.underdetermination:
        a, b = b, a
    less, more = recipe(a).noise, recipe(b).noise
    assert less.beside <= more.beside
    assert less.before <= more.before
    wide = recipe(b).told(4).correlation
    assert recipe(b).correlation == more
    assert wide.beside > more.beside
    assert wide.before >= max(more.before, 0.5)


def test_noise_is_white_where_little_is_missing():
    assert all(recipe(Factor(space=s, time=t)).noise.white for s, t in [(1, 3), (8, 3), (10, 3), (25, 1)])
    assert not recipe(Factor(space=25, time=6)).noise.white


def test_noise_amplitude_grows_with_the_underdetermination_as_in_the_paper():
    factors = [Factor(space=s, time=t) for s, t in [(1, 3), (10, 1), (10, 3), (25, 6)]]
    betas = [recipe(f).beta for f in factors]
    assert betas == sorted(betas)
