import os
import tempfile
import time
from pathlib import Path

import fsspec
import pytest

from stsr_core.errors import SourceError
from stsr_core.sources.location import KEPT_S, Location, located, stamp_of


def test_relative_paths_start_from_the_folder_of_the_catalogue(tmp_path):
    assert located("rain.nc", tmp_path) == str(tmp_path / "rain.nc")
    for absolute in ("/data/rain.nc", "s3://bucket/rain.nc"):
        assert located(absolute, tmp_path) == absolute
    assert Path(located("package:samples/arpege_fc1h_20180501_SE.nc")).is_file()


def test_an_unknown_scheme_is_an_error():
    with pytest.raises(SourceError, match="nosuch://a has a scheme that cannot be read here"):
        Location.of("nosuch://a", None, None)


def write(path, content, time_s):
    path.write_bytes(content)
    os.utime(path, (time_s, time_s))


def test_copies_are_kept_while_they_are_used_and_follow_the_file(site, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder, address = site
    write(folder / "sums.grib", b"one", 1e9)
    place = Location.of(f"{address}/sums.grib", None, None)
    first, again = Path(place.copied().path), Path(place.copied().path)
    assert (first, first.read_bytes()) == (again, b"one")
    assert place.copied().url == f"{address}/sums.grib"
    write(folder / "sums.grib", b"two", 1e9 + 60)  # as many bytes: only their time tells them apart
    second = Path(place.copied().path)
    assert (second.read_bytes(), first.read_bytes()) == (b"two", b"one")
    long_ago = time.time() - KEPT_S - 1
    os.utime(first.parent, (long_ago, long_ago))
    assert Path(place.copied().path) == second
    assert not first.exists()
    assert Location.of(str(second), None, None).copied().path == str(second)


def test_what_no_server_says_the_time_of_is_copied_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    memory = fsspec.filesystem("memory")
    place = Location.of("memory://sums.grib", None, None)
    for content in (b"one", b"two"):
        memory.pipe_file("/sums.grib", content)
        assert Path(place.copied().path).read_bytes() == content


@pytest.mark.parametrize("name", ["ETag", "etag", "mtime", "LastModified", "last_modified", "Last-Modified", "updated"])
def test_every_filesystem_has_its_name_for_what_changes(name):
    assert stamp_of({"size": 3, name: "then"}) == "3 then"
    assert stamp_of({"size": 3}) is None
