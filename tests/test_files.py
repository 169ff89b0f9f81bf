import os

import pytest

from stsr_core.files import whole


def test_what_is_written_takes_the_place_of_what_was_there(tmp_path, monkeypatch):
    path, synced = tmp_path / "a.json", []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_size), fsync(handle)))
    path.write_text("old")
    with whole(path) as part:
        part.write_text("newer")
        assert path.read_text() == "old"
    assert path.read_text() == "newer"
    assert synced == [5]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_cannot_be_written_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(error), whole(path) as part:
        part.write_text("half")
        raise error
    with pytest.raises(FileNotFoundError), whole(path):
        pass
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
