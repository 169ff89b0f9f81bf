"""Driving members from a real S3 server: read in each form that they have, and carried through nights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import s3fs
import xarray as xr
import yaml

from stsr_core.catalog import find as find_version
from stsr_core.catalog.integrity import verify_version
from stsr_core.sources.declared import Declared
from stsr_core.sources.harmonise import find
from stsr_core.sources.open import open_dataset
from tests.grib_files import REGULAR, write_grib
from tests.real import seaweed
from tests.real.site import PRODUCT, ROOT, small_catalog

SAMPLE = ROOT / "stsr_core" / "samples" / "arpege_fc1h_20180501_SE.nc"
RAIN = np.random.default_rng(7).gamma(0.5, 2.0, (3, 4, 3, 5)).astype(np.float32)
LABELS = ("0", "1", "2")


def ensemble() -> xr.Dataset:
    """Three realizations of four days in mm, 3 x 5 cells."""
    ends = np.datetime64("2001-01-02", "ns") + np.arange(4) * np.timedelta64(1, "D")
    coords = {"realization": np.arange(3), "time": ends, "lat": 45.0 - np.arange(3), "lon": 3.0 + np.arange(5)}
    data = xr.Dataset({"pr": (("realization", "time", "lat", "lon"), RAIN, {"units": "mm"})}, coords)
    data["time"].encoding.update(units="days since 2001-01-01", dtype="int32")
    return data


def message(day: int, member: int) -> tuple[str, dict[str, object], np.ndarray]:
    """Amounts of a day and member in metres, as centres write them with their perturbation number."""
    return REGULAR, {
        "dataDate": 20010101, "dataTime": 0, "Ni": 5, "Nj": 3, "latitudeOfFirstGridPointInDegrees": 45.0,
        "latitudeOfLastGridPointInDegrees": 43.0, "longitudeOfFirstGridPointInDegrees": 3.0,
        "longitudeOfLastGridPointInDegrees": 7.0, "iDirectionIncrementInDegrees": 1.0,
        "jDirectionIncrementInDegrees": 1.0, "productDefinitionTemplateNumber": 11, "shortName": "tp",
        "perturbationNumber": member, "numberOfForecastsInEnsemble": 3, "startStep": 24 * day,
        "endStep": 24 * (day + 1), "bitsPerValue": 24,
    }, RAIN[member, day].astype(np.float64) / 1000  # fmt: skip


@pytest.fixture(scope="module")
def bucket(s3: seaweed.S3Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bucket with an ensemble in each form."""
    folder = tmp_path_factory.mktemp("ensembles")
    ensemble().to_netcdf(folder / "whole.nc", engine="h5netcdf")
    ensemble().to_zarr(folder / "whole.zarr", zarr_format=3, consolidated=False)
    for number in range(3):
        ensemble().isel(realization=number, drop=True).to_netcdf(folder / f"pr_day_{number}_gn.nc", engine="h5netcdf")
    write_grib(folder / "whole.grib2", *(message(day, member) for day, member in np.ndindex(4, 3)))
    url = s3.make_bucket("ensembles")
    s3fs.S3FileSystem(**s3.options, skip_instance_cache=True).put(f"{folder}/", f"{url}/", recursive=True)
    return url


@pytest.mark.parametrize("name", ["whole.nc", "whole.zarr", "pr_day_?_gn.nc", "whole.grib2"])
def test_driving_members_read_from_a_bucket(s3: seaweed.S3Server, bucket: str, name: str) -> None:
    declared = Declared() if name.endswith("grib2") else Declared(time_label="end")
    variable = "tp" if name.endswith("grib2") else "pr"
    with open_dataset(f"{bucket}/{name}", storage_options=s3.options) as dataset:
        cubes = find(dataset, variable, declared).read_all()
    assert tuple(cube.driving for cube in cubes) == LABELS
    for cube, truth in zip(cubes, RAIN, strict=True):
        np.testing.assert_allclose(cube.amount, truth, atol=1e-4)
        assert str(cube.times.bounds[0, 0])[:13] == "2001-01-01T00"


NIGHT = """
import sys
from flows.nightly import nightly
for result in nightly(catalog_file=sys.argv[1], destination=sys.argv[2]):
    print("RESULT", result.version)
"""


def night(folder: Path, environment: dict[str, str]) -> list[str]:
    """Run the nightly flow against a Prefect server of its own; returns the versions it published."""
    done = subprocess.run(
        [sys.executable, "-c", NIGHT, str(folder / "catalog.yaml"), str(folder / "catalogue")],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT")]


def put_members(s3: seaweed.S3Server, folder: Path, url: str, shares: dict[str, float]) -> None:
    """Put shares of the shipped forecast into a bucket, a driving member each."""
    with xr.open_dataset(SAMPLE) as data:
        rain = data["precipitation"]
        for name, share in shares.items():
            data.assign(precipitation=(share * rain).assign_attrs(rain.attrs)).to_netcdf(folder / f"{name}.nc")
    fs = s3fs.S3FileSystem(**s3.options, skip_instance_cache=True)
    for name in shares:
        fs.put_file(str(folder / f"{name}.nc"), f"{url}/pr_{name}_1h.nc")


def test_nights_carry_driving_members_of_a_bucket_through(
    s3: seaweed.S3Server, checkpoints: Path, tmp_path: Path
) -> None:
    url = s3.make_bucket("driving")
    put_members(s3, tmp_path, url, {"r1": 1.0, "r2": 0.5})
    small_catalog(tmp_path / "catalog.yaml")
    catalog = yaml.safe_load((tmp_path / "catalog.yaml").read_text())
    (source,) = {p["source"] for p in catalog["products"].values()}
    catalog["sources"][source]["url"] = f"{url}/pr_*_1h.nc"
    (tmp_path / "catalog.yaml").write_text(yaml.safe_dump(catalog))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "STSR_"))} | {
        "OMP_NUM_THREADS": "1",
        "STSR_CHECKPOINTS": str(checkpoints),
        "STSR_DEVICE": "cpu",
        "STSR_WORKERS": "1",
        "STSR_S3_ENDPOINT": s3.endpoint,
        "STSR_S3_ACCESS_KEY_ID": s3.key,
        "STSR_S3_SECRET_ACCESS_KEY": s3.secret,
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    assert night(tmp_path, environment) == ["v1"]
    put_members(s3, tmp_path, url, {"r2": 0.25})
    assert night(tmp_path, environment) == ["v2"]
    assert night(tmp_path, environment) == []
    for version, share in (("v1", 0.5), ("v2", 0.25)):
        found = find_version(PRODUCT, version, str(tmp_path / "catalogue"))
        assert found.item["properties"]["stsr:driving_members"] == ["r1", "r2"]
        assert verify_version(found.folder).sound
        with xr.open_zarr(f"{found.folder}/data.zarr/ensemble") as data:
            assert data["driving_member"].values.tolist() == ["r1", "r1", "r2", "r2"]
            totals = data["precipitation"].sum(("time", "y", "x"), dtype=np.float64).values
        np.testing.assert_allclose(totals[:2], totals[0], rtol=1e-6)
        np.testing.assert_allclose(totals[2:], share * totals[0], rtol=1e-3)
