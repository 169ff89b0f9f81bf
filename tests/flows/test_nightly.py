"""The nightly flow against a real, temporary Prefect server."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pystac
import pytest
import xarray as xr

SCRIPT = """
import sys
from pathlib import Path
from flows.embedded import run_embedded
for force in (False, False, True):
    print("RESULT", run_embedded(Path(sys.argv[1]), force=force, members=2, device="cpu", workers=1))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory, checkpoints):
    """Three nightly runs with tiny networks: new data, nothing new, forced."""
    folder = tmp_path_factory.mktemp("demo")
    environment = {**os.environ, "STSR_CHECKPOINTS": str(checkpoints), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        capture_output=True, text=True, env=environment, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [line for line in done.stdout.splitlines() if line.startswith("RESULT")], done


def test_new_data_is_published_old_is_not_and_force_makes_version_2(published):
    _, results, done = published
    assert "version='v1'" in results[0]
    assert results[1] == "RESULT None"
    assert "version='v2'" in results[2]
    log = done.stdout + done.stderr
    assert re.search(
        r" new_source product=arpege-provence-1km run=[0-9a-f-]{36} source=package:\S+ fingerprint=\w+\n", log
    )
    assert re.search(r" published product=arpege-provence-1km run=\S+ version=v1 item=\S+/v1.json\n", log)
    assert re.search(r" nothing_new product=arpege-provence-1km run=\S+ source=\S+ version=v1\n", log)
    made = set(re.findall(r" shard_made product=arpege-provence-1km run=\S+ shard=(\S+) evaluations=", log))
    assert made == {"m0-t0-y0-x0"}


def test_the_published_versions_are_valid_linked_and_open(published):
    folder, _, _ = published
    catalog = pystac.Catalog.from_file(str(folder / "catalog.json"))
    items = {i.properties["version"]: i for i in catalog.get_items(recursive=True)}
    assert set(items) == {"v1", "v2"}
    assert items["v2"].get_single_link("predecessor-version") is not None
    item = items["v2"]
    assert item.properties["stsr:factor"] == [10, 1]
    assert all(gate["passed"] for gate in item.properties["stsr:gates"])
    data = xr.open_zarr(item.assets["ensemble"].get_absolute_href())
    assert dict(data.sizes) == {"member": 2, "time": 24, "y": 250, "x": 250, "nv": 2}
    assert Path(item.assets["quicklook"].get_absolute_href()).read_bytes().startswith(b"\x89PNG")


def test_the_same_source_and_seed_give_the_same_version_again(published):
    folder, _, _ = published
    catalog = pystac.Catalog.from_file(str(folder / "catalog.json"))
    first, second = (
        xr.open_zarr(i.assets["ensemble"].get_absolute_href())["precipitation"].values
        for i in catalog.get_items(recursive=True)
    )
    assert (first == second).all()
