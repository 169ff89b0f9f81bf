from pathlib import Path
from unittest.mock import Mock

from fsspec.implementations.memory import MemoryFileSystem

from stsr_core.store.receipts import read_receipts, write_receipt
from tests.store.made import REGIONS, key_of


def test_receipts_are_found_where_the_path_of_a_store_looks_like_a_pattern(tmp_path, store):
    receipts = read_receipts(store, "precipitation")
    for name in ("run [1]", "all*", "which?"):
        assert read_receipts(f"{tmp_path}/{name}", "precipitation") == {}
        for receipt in receipts.values():
            write_receipt(f"{tmp_path}/{name}", "precipitation", receipt)
        assert read_receipts(f"{tmp_path}/{name}", "precipitation") == receipts


def test_a_receipt_asks_nothing_of_an_object_store_but_to_keep_it(store, monkeypatch):
    receipt = read_receipts(store, "precipitation")[key_of(REGIONS[0])]
    monkeypatch.setattr(MemoryFileSystem, "makedirs", Mock(side_effect=AssertionError))  # which may create a bucket
    write_receipt("memory://receipts/e.zarr", "precipitation", receipt)
    assert read_receipts("memory://receipts/e.zarr", "precipitation") == {receipt.shard: receipt}


def test_a_receipt_cut_short_counts_as_absent(store):
    harmed = key_of(REGIONS[2])
    whole = read_receipts(store, "precipitation")
    Path(f"{store}/precipitation/receipts/{harmed}.json").write_text("{")
    assert read_receipts(store, "precipitation") == {key: r for key, r in whole.items() if key != harmed}
