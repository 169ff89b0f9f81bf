from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from stsr_core.cli import app
from stsr_core.ensemble.plan import Plan, Recipe
from stsr_core.ensemble.product import Cost, attempt_name
from stsr_core.errors import ConfigurationError
from stsr_core.factors import Factor
from stsr_core.sources.cube import as_cube

FACTOR = Factor(space=4, time=3)


def plan(library, members: int = 5) -> Plan:
    rain = np.zeros((32, 30, 30), np.float32)
    rain[:16] = 1.0  # the second half is dry
    checkpoint = library.serving(FACTOR)
    recipe = Recipe.of(checkpoint, checkpoint.card.serving(FACTOR), seed=1, members=members, conserve=True)
    return Plan((as_cube(rain, FACTOR),), recipe)


def test_the_cost_counts_shards_evaluations_and_bytes(library):
    cost = Cost.of(plan(library), device_rate=1e6)
    assert cost.shards == 4
    assert cost.dry == 2
    assert cost.bytes == 2 * 5 * 96 * 120 * 120
    assert cost.evaluations == sum(plan(library).evaluations(s) for s in plan(library).shards) > 0
    assert cost.device_hours == pytest.approx(cost.cell_evaluations / 1e6 / 3600)
    more = Cost.of(plan(library, members=10), device_rate=1e6)
    assert more.device_hours > 1.5 * cost.device_hours
    assert ("cost", f"{2 * cost.device_hours:.2f}") in cost.rows(price_per_device_hour=2.0)


def test_the_name_of_an_attempt_covers_the_static_fields_of_all_shards(library):
    bare = plan(library)
    fields = np.zeros((1, *bare.fine_shape[2:]), np.float32)
    other = fields.copy()
    other[0, -1, -1] = 1.0
    names = {attempt_name(p, "f", "v1") for p in (bare, replace(bare, statics=fields), replace(bare, statics=other))}
    assert len(names) == 3


@pytest.mark.parametrize(("hours", "shown"), [(0.03341, "0.0334"), (1234.5, "1230"), (0.0, "0")])
def test_figures_are_shown_with_three_digits_that_count(library, hours, shown):
    cost = replace(Cost.of(plan(library), device_rate=1.0), device_hours=hours)
    assert ("device hours", shown) in cost.rows()


def test_a_plan_above_the_limit_is_refused(library):
    cost = Cost.of(plan(library), device_rate=1.0)
    cost.check(None)
    with pytest.raises(ConfigurationError, match="more than the limit of 0.5.*STSR_MAX_DEVICE_HOURS"):
        cost.check(0.5)


def test_stsr_plan_says_what_a_product_takes_without_running_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["plan", "arpege-provence-1km", "--members", "16"])
    assert done.exit_code == 0, done.output
    assert "(10,1) is nearest" in done.output
    assert "told a fine spacing of 1 km" in " ".join(done.output.split())
    assert "(16, 24, 250, 250)" in done.output
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("STSR_MAX_DEVICE_HOURS", "0.001")
    refused = CliRunner().invoke(app, ["plan", "arpege-provence-1km"])
    assert isinstance(refused.exception, ConfigurationError)
