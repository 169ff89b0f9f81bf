import tarfile

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from stsr_core.errors import SourceError
from stsr_core.sources.declared import Declared
from stsr_core.sources.fine import fine_runs, places_of
from stsr_core.sources.open import open_dataset

TENTHS = Declared(units="0.1 mm", missing_values=(65535.0,))


@pytest.fixture(scope="module")
def hours(tmp_path_factory):
    """Five hourly GeoTIFFs as weather services publish them, one hour missing between the third and the fourth."""
    folder = tmp_path_factory.mktemp("geotiff")
    profile = {
        "driver": "GTiff", "width": 6, "height": 4, "count": 1, "dtype": "uint16", "crs": "EPSG:2154",
        "transform": from_origin(600_000, 6_800_000, 1000, 1000),
    }  # fmt: skip
    for number, hour in enumerate((1, 2, 3, 5, 6)):
        values = np.full((4, 6), 10 * number, np.uint16)
        values[0, 0] = 65535
        for variable in ("RR", "ERR"):
            with rasterio.open(folder / f"20180501{hour:02d}_{variable}.gtif", "w", **profile) as file:
                file.write(values if variable == "RR" else values // 2, 1)
    return folder


def test_geotiffs_in_a_tar_are_read_without_unpacking_and_split_at_gaps(hours, tmp_path):
    path = tmp_path / "H_COMEPHORE_201805.tar"
    with tarfile.open(path, "w") as tar:
        for file in sorted(hours.iterdir()):
            tar.add(file, arcname=f"201805/{file.name}")
    runs = fine_runs(str(path), "RR", TENTHS)
    assert [run.steps for run in runs] == [3, 2]
    amount = runs[1].read()
    assert amount.shape == (2, 4, 6)
    assert np.isnan(amount[:, 0, 0]).all()
    np.testing.assert_allclose(amount[:, 1, 1], [3.0, 4.0])  # tenths of a millimetre
    np.testing.assert_allclose(runs[0].read(1, 2)[0, 3, 5], 1.0)


def test_a_glob_of_geotiffs_is_one_series(hours):
    url = f"{hours}/*_RR.gtif"
    assert places_of([url]) == [url]
    data = open_dataset(url)
    assert dict(data.sizes) == {"time": 5, "y": 4, "x": 6}
    assert str(data["time"].values[3]) == "2018-05-01T05:00:00.000000000"
    assert data["y"].values[0] == 6_799_500


def test_units_are_never_guessed(hours):
    with pytest.raises(SourceError, match="no units"):
        fine_runs(f"{hours}/*_RR.gtif", "RR")[0].read()


def test_bad_names_and_files_are_errors(hours, tmp_path):
    bad = tmp_path / "rain.tif"
    bad.write_bytes((hours / "2018050101_RR.gtif").read_bytes())
    with pytest.raises(SourceError, match=r"rain\.tif names no time"):
        open_dataset(str(bad))
    short = tmp_path / "2018050101_RR.tif"
    short.write_bytes((hours / "2018050101_RR.gtif").read_bytes()[:60])
    with pytest.raises(SourceError, match="cannot be read"):
        open_dataset(str(short))
    empty = tmp_path / "empty.tar"
    with tarfile.open(empty, "w"):
        pass
    with pytest.raises(SourceError, match="holds no GeoTIFF"):
        open_dataset(str(empty))
    with pytest.raises(SourceError, match="no variable 'rain'; it has"):
        fine_runs(f"{hours}/*_RR.gtif", "rain")
    with pytest.raises(SourceError, match="Nothing is at"):
        places_of([str(tmp_path / "nothing" / "*.nc")])
