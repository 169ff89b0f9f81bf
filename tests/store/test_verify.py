"""Gates on one small store."""

from pathlib import Path

import numpy as np
import pytest

import stsr_core.store.verify as verify_module
from stsr_core.configuration import Gates, LikeCard
from stsr_core.errors import GateError
from stsr_core.factors import Factor
from stsr_core.store.receipts import read_receipts, write_receipt
from stsr_core.store.statistics import STATISTICS, statistics
from stsr_core.store.verify import Expected, Stored, verify
from tests.store.made import FACTOR, REGIONS, key_of, shard_file, sums_of


def report_of(store, coarse, gates=None, regions=REGIONS, members=3):
    expected = [Expected(key_of(r), r, "p" + key_of(r)) for r in regions]
    stored = Stored(store, "precipitation", FACTOR, [coarse], members, conserved=True)
    return verify(stored, expected, read_receipts(store, "precipitation"), gates or Gates())


def failed(report):
    return {gate.name: gate for gate in report.gates if not gate.passed}


def test_a_sound_store_passes_every_gate(store, coarse):
    report = report_of(store, coarse)
    assert report.passed, report
    assert {g.name for g in report.gates} == {
        "receipts", "stored bytes", "closure", "missing cells", "plausible range", "spread", "wet fraction",
        "card: spread over skill", "card: wet fraction over truth", *(f"like card: {name}" for name in STATISTICS),
    }  # fmt: skip
    report.raise_if_failed()


@pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
def test_a_damaged_shard_is_found_and_named(store, coarse, damage, tmp_path):
    path = Path(shard_file(store, REGIONS[5]))
    raw = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(raw[:-9] if damage == "truncated" else bytes([raw[0] ^ 1]) + raw[1:])
    report = report_of(store, coarse)
    assert failed(report)["stored bytes"].where == key_of(REGIONS[5])
    with pytest.raises(GateError, match="stored bytes: found 1 damaged.*m0-t1-y0-x1.*kept for inspection"):
        report.raise_if_failed()


def test_a_missing_receipt_is_found_and_named(store, coarse):
    Path(f"{store}/precipitation/receipts/{key_of(REGIONS[2])}.json").unlink()
    gate = failed(report_of(store, coarse))["receipts"]
    assert gate.found == "7 valid receipts"
    assert gate.where == key_of(REGIONS[2])


def test_a_receipt_of_another_plan_does_not_count(store, coarse):
    expected = [Expected(key_of(r), r, "other") for r in REGIONS]
    stored = Stored(store, "precipitation", FACTOR, [coarse], 3, conserved=True)
    assert "receipts" in failed(verify(stored, expected, read_receipts(store, "precipitation"), Gates()))


def test_closure_is_recomputed_from_the_stored_bytes(store, coarse):
    wrong = coarse.copy()
    wrong[3, 2, 3] += 0.01
    gate = failed(report_of(store, wrong))["closure"]
    assert gate.found == "4 quanta"
    assert gate.where == "m0-t1-y1-x1"


def test_missing_cells_must_be_those_of_the_input(store, coarse):
    filled = np.nan_to_num(coarse)
    assert "missing cells" in failed(report_of(store, filled))
    holed = coarse.copy()
    holed[0, 0, 0] = np.nan
    assert failed(report_of(store, holed))["missing cells"].where == "m0-t0-y0-x0"


def test_receipts_vouch_for_shards_that_are_not_read_back(store, coarse, monkeypatch):
    monkeypatch.setattr(verify_module, "SAMPLE", 1)
    for region, change in ((REGIONS[5], {"closure_quanta": 3}), (REGIONS[6], {"missing": 12})):
        receipt = read_receipts(store, "precipitation")[key_of(region)]
        write_receipt(store, "precipitation", receipt.model_copy(update=change))
    gates = failed(report_of(store, coarse))
    assert (gates["closure"].found, gates["closure"].where) == ("3 quanta", key_of(REGIONS[5]))
    assert gates["missing cells"].where == key_of(REGIONS[6])


def test_range_and_spread_have_bounds(store, coarse):
    assert "plausible range" in failed(report_of(store, coarse, Gates(max_mm=4.0)))
    assert "spread" in failed(report_of(store, coarse, Gates(min_relative_spread=0.6)))
    assert "spread" not in failed(report_of(store, coarse, Gates(min_relative_spread=0.6), members=1))


def test_statistics_must_be_in_line_with_rain_and_card(store, coarse):
    # 8 shards say 10 wet cells each; 48 of the 48 coarse cells but one are wetter than 0.1 mm, of 4 cells and 3 members
    wet = failed(report_of(store, coarse, Gates(min_wet_fraction=0.2)))["wet fraction"]
    assert wet.found == f"{80 / (int((coarse > 0.1).sum()) * 12):.2f} of the cells where it rains"
    expected = [Expected(key_of(r), r, "p" + key_of(r)) for r in REGIONS]
    for skill in (0.4, 1.6):
        scores = {"spread_skill": skill, "wet_fraction_ratio": 1.74}
        stored = Stored(store, "precipitation", FACTOR, [coarse], 3, conserved=True, scores=scores)
        report = verify(stored, expected, read_receipts(store, "precipitation"), Gates())
        assert {name: (g.found, g.needed) for name, g in failed(report).items()} == {
            "card: spread over skill": (f"{skill:.2f}", "0.5 to 1.5")
        }


@pytest.mark.parametrize(("amount", "found"), [(0.15, "no rain"), (0.25, "0.00 of the cells where it rains")])
def test_cells_are_wet_above_a_tenth_of_a_millimetre_in_each_fine_step(amount, found):
    stored = Stored("", "", Factor(space=1, time=2), [np.full((1, 1, 1), amount, np.float32)], 1, conserved=True)
    assert verify_module._wet_fraction(stored, [], Gates()).found == found


def like_card(store, coarse, card, gates=None):
    """Results of the gates against the statistics of a card, by statistic."""
    expected = [Expected(key_of(r), r, "p" + key_of(r)) for r in REGIONS]
    stored = Stored(store, "precipitation", FACTOR, [coarse], 3, conserved=True, statistics=card)
    gates = verify(stored, expected, read_receipts(store, "precipitation"), gates or Gates()).gates
    return {g.name.removeprefix("like card: "): g for g in gates if g.name.startswith("like card: ")}


def test_statistics_must_be_like_those_of_the_card(store, coarse, quanta, monkeypatch):
    whole = statistics(sums_of(quanta))
    monkeypatch.setattr(verify_module, "JUDGED", 40)  # there are 47 wet coarse cells and steps
    assert all(gate.passed for gate in like_card(store, coarse, whole).values())
    for times in (0.7, 1.4):
        other = {**whole, "members": whole["members"] / times}
        results = like_card(store, coarse, other)
        assert [name for name, gate in results.items() if not gate.passed] == ["members"]
    assert results["members"].found.endswith(f", on the card {other['members']:.3f}")
    assert results["members"].needed == "0.75 to 1.35 times the card's"
    wider = Gates(like_card=LikeCard(members=(0.5, 1.5)))
    assert like_card(store, coarse, other, wider)["members"].passed


def test_a_card_without_statistics_and_an_ensemble_with_little_rain_are_not_judged_and_say_so(store, coarse):
    assert {g.found for g in like_card(store, coarse, {}).values()} == {"not judged: not on the card"}
    little = like_card(store, coarse, dict.fromkeys(STATISTICS, 99.0))
    assert all(g.passed and g.found.startswith("not judged: fewer than 50 wet coarse cells") for g in little.values())
