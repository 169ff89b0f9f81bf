import numpy as np
import pytest
import xarray as xr

from stsr_core.errors import SourceError
from stsr_core.sources.open import fingerprint, open_dataset

SAMPLE = "package:samples/arpege_fc1h_20180501_SE.nc"


@pytest.fixture
def data():
    return xr.Dataset({"p": (("time", "y", "x"), np.ones((2, 3, 4)))})


def test_netcdf_and_zarr_open_by_path(tmp_path, data):
    data.to_netcdf(tmp_path / "a.nc")
    data.to_zarr(tmp_path / "a.zarr", zarr_format=3, consolidated=False)
    data.to_zarr(tmp_path / "b.zarr", zarr_format=2)
    for name in ("a.nc", "a.zarr", "b.zarr"):
        with open_dataset(name, base=tmp_path) as opened:
            np.testing.assert_array_equal(opened["p"].values, data["p"].values)


def test_memory_urls_open_like_any_other_filesystem(tmp_path, data):
    import fsspec

    data.to_netcdf(tmp_path / "a.nc")
    with fsspec.open("memory://bucket/a.nc", "wb") as f:
        f.write((tmp_path / "a.nc").read_bytes())
    with open_dataset("memory://bucket/a.nc") as opened:
        np.testing.assert_array_equal(opened["p"].values, data["p"].values)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", r"is empty \(0 bytes\)"), (b"not a netcdf file at all", "cannot be read"), (None, "Nothing is at")],
)
def test_what_is_no_dataset_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.nc").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        open_dataset(str(tmp_path / "a.nc"))


def test_a_plain_folder_and_an_unknown_scheme_are_refused(tmp_path):
    with pytest.raises(SourceError, match="folder without a Zarr store"):
        open_dataset(str(tmp_path))
    with pytest.raises(SourceError, match="scheme"):
        open_dataset("gopher://host/a.nc")


def test_an_unreachable_server_is_an_error_not_a_traceback():
    with pytest.raises(SourceError, match="cannot be read|Nothing is at"):
        open_dataset("http://127.0.0.1:9/a.nc")


def test_fingerprints_follow_the_content(tmp_path, data):
    assert fingerprint(SAMPLE) == fingerprint(SAMPLE)
    a, b = tmp_path / "a.bin", tmp_path / "b.bin"
    a.write_bytes(b"1")
    b.write_bytes(b"1")
    assert fingerprint(str(a)) == fingerprint(str(b))
    b.write_bytes(b"2")
    assert fingerprint(str(a)) != fingerprint(str(b))
    data.to_zarr(tmp_path / "c.zarr", zarr_format=3, consolidated=False)
    before = fingerprint(str(tmp_path / "c.zarr"))
    (tmp_path / "c.zarr" / "p" / "c" / "0" / "0" / "0").write_bytes(b"changed")
    assert fingerprint(str(tmp_path / "c.zarr")) != before


def test_a_missing_source_has_no_fingerprint(tmp_path):
    with pytest.raises(SourceError, match="cannot be read"):
        fingerprint(str(tmp_path / "none.nc"))
