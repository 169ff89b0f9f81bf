"""What a group is from its first object to its last, on disks and in object stores."""

import itertools
import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import xarray as xr
import zarr
from fsspec.implementations.local import LocalFileSystem

from stsr_core.errors import StoreError
from stsr_core.store.group import filesystem, finish, is_whole, remove_store
from stsr_core.store.layout import MISSING, create_ensemble
from tests.store.made import LAYOUT, REGIONS, files_of, shard_file


def test_a_store_opens_only_when_it_is_finished(store, quanta):
    assert not is_whole(store)
    with pytest.raises(FileNotFoundError):
        xr.open_zarr(store, consolidated=False)
    finish(store, LAYOUT.attributes)
    assert is_whole(store)
    data = xr.open_zarr(store)
    np.testing.assert_allclose(
        data["precipitation"].values, np.where(quanta == MISSING, np.nan, quanta * 0.01), atol=1e-5
    )
    assert data["time"].values[0] == np.datetime64("2001-01-01T01:00")
    assert data["time_bnds"].values[0, 0] == np.datetime64("2001-01-01T00:00")
    assert data.attrs["title"] == "test"
    assert "consolidated_metadata" in json.loads(Path(store, "zarr.json").read_text())


def test_what_a_killed_writer_began_is_no_part_of_a_finished_store(store):
    began = Path(shard_file(store, REGIONS[5])).with_suffix(".0a.partial")
    began.write_bytes(b"half")
    finish(store, {})
    assert not began.exists()


def test_a_full_disk_is_told_when_a_store_is_finished(store, monkeypatch):
    monkeypatch.setattr(zarr, "consolidate_metadata", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(StoreError, match=r"cannot be finished .*No space left.* Check free space"):
        finish(store, {})
    assert not is_whole(store)


def test_remove_store_refuses_what_is_no_store(tmp_path, store):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a").write_text("keep me")
    xr.Dataset({"a": ("time", [1.0])}).to_zarr(tmp_path / "other.zarr", zarr_format=3, consolidated=False)
    for name in ("letters", "other.zarr"):
        before = files_of(tmp_path / name)
        with pytest.raises(StoreError, match="no Zarr store that stsr wrote"):
            remove_store(str(tmp_path / name))
        assert files_of(tmp_path / name) == before
    remove_store(store)
    assert not (tmp_path / "e.zarr").exists()
    remove_store(store)


def test_a_removal_cut_short_can_be_done_again(store, monkeypatch):
    finish(store, {})
    removed = LocalFileSystem.rm
    for left in range(1, 4):
        calls = itertools.count()

        def killed(fs, path, calls=calls, left=left, **how):
            if next(calls) == left:
                raise KeyboardInterrupt
            removed(fs, path, **how)

        monkeypatch.setattr(LocalFileSystem, "rm", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_store(store)
        assert f"{store}/stsr.json" in map(str, Path(store).iterdir())
    monkeypatch.undo()
    remove_store(store)
    assert not Path(store).exists()


def test_an_object_store_is_held_to_the_same():
    fs = filesystem("memory://place")[0]
    fs.pipe_file("/place/time/c/0", b"keep me")
    with pytest.raises(StoreError, match="memory://place is there and no Zarr store that stsr wrote.*another output"):
        create_ensemble("memory://place", LAYOUT, array="precipitation")
    assert fs.find("/place") == ["/place/time/c/0"]
    for _ in range(2):
        create_ensemble("memory://place/e.zarr", LAYOUT, array="precipitation")
    remove_store("memory://place/e.zarr")
    assert fs.find("/place") == ["/place/time/c/0"]
    fs.rm("/place", recursive=True)


def test_a_store_whose_name_is_a_pattern_is_not_removed_from_an_object_store():
    for name in ("out1.zarr", "out[1].zarr"):
        create_ensemble(f"memory://patterns/{name}", LAYOUT, array="precipitation")
    with pytest.raises(StoreError, match="other stores may fit that"):
        remove_store("memory://patterns/out[1].zarr")
    remove_store("memory://patterns/out1.zarr")
    assert [name.rsplit("/", 1)[-1] for name in filesystem("memory://")[0].ls("/patterns", detail=False)] == [
        "out[1].zarr"
    ]
