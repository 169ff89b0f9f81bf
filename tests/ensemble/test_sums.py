"""Statistics of ensembles: closed forms, and that they tell broken ensembles from other weather."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from stsr_core.configuration import LikeCard
from stsr_core.ensemble import sums as shard_sums
from stsr_core.factors import Factor
from stsr_core.store.statistics import added, statistics

FACTOR = Factor(space=8, time=1)
BOUNDS = {name: tuple(bounds) for name, bounds in LikeCard().model_dump().items()}


def rain(seed, *, intensity=1.0, coverage=0.5, members=4):
    """An ensemble as sound checkpoints make it: common coarse amounts, detail of some cells' size, wet and dry."""
    rng = np.random.default_rng(seed)
    large = gaussian_filter(rng.standard_normal((12, 96, 96)), (2, 14, 14))
    small = gaussian_filter(rng.standard_normal((members, 12, 96, 96)), (0, 0, 2, 2))
    field = np.exp(1.5 * large / large.std() + 0.5 * small / small.std())
    field *= large / large.std() > np.quantile(large / large.std(), 1 - coverage)
    return conserved((intensity * field).astype(np.float32))


def blocks(amount):
    m, nt, ny, nx = amount.shape
    return amount.reshape(m, nt, ny // 8, 8, nx // 8, 8)


def conserved(amount):
    """Members scaled to the coarse amounts of the first."""
    parts = blocks(amount)
    means = parts.mean(axis=(3, 5), keepdims=True)
    gain = np.where(means > 0, means[:1] / np.maximum(means, 1e-9), 0)
    return (parts * gain).reshape(amount.shape).astype(np.float32)


def sums(amount, factor=FACTOR, rows=1):
    return shard_sums.sums(torch.from_numpy(amount).split(rows * factor.space, dim=2), factor)


def of(amount, factor=FACTOR):
    return statistics(sums(amount, factor))


def shuffled(amount):
    """Cells of each coarse cell in any order: noise instead of structure."""
    parts = blocks(amount).transpose(0, 1, 2, 4, 3, 5)
    mixed = np.random.default_rng(0).permuted(parts.reshape(*parts.shape[:4], 64), axis=-1)
    return mixed.reshape(parts.shape).transpose(0, 1, 2, 4, 3, 5).reshape(amount.shape)


def even(amount):
    means = blocks(amount).mean(axis=(3, 5), keepdims=True)
    return np.broadcast_to(means, blocks(amount).shape).reshape(amount.shape).copy()


def damped(amount, share):
    """Detail of a residual that is scaled wrongly."""
    return even(amount) + np.float32(share) * (amount - even(amount))


def drizzle(amount):
    """A little rain in every cell of wet coarse cells, the rest in a few."""
    return np.float32(0.5) * even(amount) + np.float32(0.5) * conserved(amount**4)


def failing(amount, card):
    found = of(amount)
    return {n for n, (low, high) in BOUNDS.items() if not low * card[n] <= found.get(n, 0.0) <= high * card[n]}


@pytest.mark.parametrize("weather", [{"intensity": 5.0}, {"intensity": 0.3, "coverage": 0.3}, {"coverage": 0.9}])
def test_other_weather_is_like_the_card(weather):
    assert failing(rain(2, **weather), of(rain(1))) == set()


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (lambda a: np.repeat(a[:1], 4, axis=0), "members"),
        (shuffled, "neighbours"),
        (even, "detail"),
        (lambda a: damped(a, 0.3), "detail"),
        (lambda a: conserved(even(a) + (a - even(a))[:, :1]).clip(0), "hours"),
        (drizzle, "wet"),
    ],
)
def test_a_broken_ensemble_is_not(broken, expected):
    assert expected in failing(broken(rain(2)), of(rain(1)))


def test_independent_noise_and_equal_members_have_closed_forms():
    noise = 100 + np.random.default_rng(0).standard_normal((3, 6, 64, 64)).astype(np.float32)
    found = of(noise)
    # E|a - b| / E(|a| + |b|) of independent normal values is 1 / sqrt(2)
    assert [found[n] for n in ("members", "hours", "neighbours")] == pytest.approx([2**-0.5] * 3, abs=0.01)
    assert of(np.repeat(noise[:1], 3, axis=0))["members"] == 0.0


def test_cells_that_are_dry_or_equally_wet_are_as_wet_as_their_unevenness_says():
    amount = np.zeros((1, 2, 16, 16), np.float32)
    amount[:, :, ::2, ::4] = 3.0
    assert of(amount)["wet"] == pytest.approx(1.0)
    assert "members" not in of(amount)  # one alone
    assert of(np.zeros_like(amount)) == {}


def test_sums_of_members_and_of_places_add_up_and_missing_cells_count_for_nothing():
    amount = rain(3)
    parts = [amount[:, :, :48], amount[:, :, 48:]]
    assert sums(amount, rows=12) == pytest.approx(sums(amount), rel=1e-6)  # all at once, as on a GPU
    whole, together = sums(amount, FACTOR), added(sums(part, FACTOR) for part in parts)
    for name in set(whole) - {"change"}:
        assert together[name] == pytest.approx(whole[name], rel=1e-6)
    holed = amount.copy()
    holed[:, :, 48:] = np.nan
    alone = sums(parts[0], FACTOR)
    assert sums(holed, FACTOR) == pytest.approx(alone, rel=1e-6)


def test_counts_are_those_of_the_cells_whether_step_by_step_or_at_once():
    amount = rain(4)
    amount[:, 3, :20] = np.nan
    by_step, at_once = (shard_sums.counts(torch.from_numpy(amount).split(n, dim=1)) for n in (1, 12))
    assert by_step == pytest.approx(at_once, rel=1e-6)
    held = np.nan_to_num(amount)
    rainy = held[:, (held > 0.1).any(axis=0)]
    assert by_step == pytest.approx(
        {
            "wet": (held > 0.1).sum(), "missing": 4 * 20 * 96, "sum_mm": held.sum(dtype=float), "max_mm": held.max(),
            "rain_mm": rainy.mean(dtype=float), "spread_mm": rainy.std(axis=0, ddof=1).mean(dtype=float),
        },
        rel=1e-5,
    )  # fmt: skip
    dry = shard_sums.counts([torch.zeros(1, 2, 4, 4)])
    assert set(dry) == set(by_step)
    assert not any(dry.values())
