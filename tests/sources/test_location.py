import os
import tempfile
import time
from pathlib import Path

import fsspec
import pytest

from stsr_core.errors import SourceError
from stsr_core.sources.location import KEPT_S, Location, located


def test_relative_paths_start_from_the_folder_of_the_catalogue(tmp_path):
    assert located("rain.nc", tmp_path) == str(tmp_path / "rain.nc")
    for absolute in ("/data/rain.nc", "s3://bucket/rain.nc"):
        assert located(absolute, tmp_path) == absolute
    assert Path(located("package:samples/arpege_fc1h_20180501_SE.nc")).is_file()


def test_an_unknown_scheme_is_an_error():
    with pytest.raises(SourceError, match="nosuch://a has a scheme that cannot be read here"):
        Location.of("nosuch://a", None, None)


def test_copies_are_kept_while_they_are_used_and_follow_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/sums.grib", b"one")
    place = Location.of("memory://sums.grib", None, None)
    first, again = Path(place.copied().path), Path(place.copied().path)
    assert (first, first.read_bytes()) == (again, b"one")
    assert place.copied().url == "memory://sums.grib"
    memory.pipe_file("/sums.grib", b"other")
    second = Path(place.copied().path)
    assert (second.read_bytes(), first.read_bytes()) == (b"other", b"one")
    long_ago = time.time() - KEPT_S - 1
    os.utime(first.parent, (long_ago, long_ago))
    assert Path(place.copied().path) == second
    assert not first.exists()
    assert Location.of(str(second), None, None).copied().path == str(second)
