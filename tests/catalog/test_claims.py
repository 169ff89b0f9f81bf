from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from stsr_core.catalog.claims import claim, release, require_claim
from stsr_core.catalog.publish import Attempt
from stsr_core.errors import PublicationError


@pytest.fixture
def attempt(tmp_path) -> Attempt:
    return replace(Attempt.begin(str(tmp_path), "rain"), name="0123456789ab")


def dead(*runs: str):
    return lambda run: run in runs


def test_an_attempt_is_claimed_by_one_living_run_and_again_by_the_same(attempt):
    assert claim(attempt, "a", dead())
    assert claim(attempt, "a", dead())
    assert not claim(attempt, "b", dead())
    require_claim(attempt, "a")


def test_the_attempt_of_a_dead_run_changes_hands_and_its_zombie_is_told(attempt):
    assert claim(attempt, "a", dead())
    assert claim(attempt, "b", dead("a"))
    require_claim(attempt, "b")
    with pytest.raises(
        PublicationError, match="Run b has taken over .*0123456789ab, because this run was thought dead"
    ):
        require_claim(attempt, "a")


def test_of_many_that_claim_the_attempt_of_a_dead_run_one_wins(attempt):
    assert claim(attempt, "dead", dead())
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: claim(attempt, f"run {n}", dead("dead")), range(8)))
    assert sum(won) == 1


def test_of_two_that_find_a_dead_claim_at_once_the_slower_does_not_have_it(attempt):
    assert claim(attempt, "dead", dead())

    def overtaken(run):
        assert claim(attempt, "b", dead("dead"))
        return run == "dead"

    assert not claim(attempt, "a", overtaken)
    require_claim(attempt, "b")


def test_a_released_claim_is_gone_and_none_is_needed_for_a_fresh_attempt(attempt, tmp_path):
    assert claim(attempt, "a", dead())
    release(attempt)
    assert not list((tmp_path / "rain" / "claims").glob("*.json"))
    require_claim(attempt, "b")
