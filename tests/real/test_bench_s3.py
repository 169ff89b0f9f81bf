"""The benchmark of the engine against a real S3 server: what it reads and writes counts."""

import json
from importlib.resources import files

import s3fs
from typer.testing import CliRunner

from stsr_core.cli import app


def test_the_engine_is_measured_reading_from_and_writing_to_a_bucket(s3, checkpoints, tmp_path, monkeypatch):
    bucket = s3.make_bucket("bench")
    there = s3fs.S3FileSystem(**s3.options, skip_instance_cache=True, use_listings_cache=False)
    there.put(str(files("stsr_core") / "samples/arpege_fc1h_20180501_SE.nc"), "bench/in.nc")
    settings = {"CHECKPOINTS": str(checkpoints), "S3_ENDPOINT": s3.endpoint, "S3_ACCESS_KEY_ID": s3.key,
                "S3_SECRET_ACCESS_KEY": s3.secret}  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(f"STSR_{name}", value)
    size = ["--factor", "4x1", "--cells", "40", "--steps", "6", "--members", "1", "--workers", "1", "--device", "cpu"]
    places = ["--input", f"{bucket}/in.nc", "--output", f"{bucket}/out", "--json", str(tmp_path / "figures.json")]
    done = CliRunner().invoke(app, ["bench", *size, *places])
    assert done.exit_code == 0, done.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["reading_seconds"] > 0
    assert figures["runs"][0]["bytes_written"] > 0
    assert 0 < figures["runs"][0]["share_outside_networks"] < 1
    assert set(there.find("bench/out")) <= {"bench/out"}  # the prefix lingers in listings
