"""Steps of the runbook that need a store of their own: keys that rotate, and a disk that is full."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stsr_core.catalog import ls
from tests.real import postgres
from tests.real.seaweed import S3Server
from tests.real.servers import Site, start
from tests.real.site import PRODUCT, small_catalog

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, checkpoints: Path, s3: S3Server) -> Iterator[Site]:
    if postgres.programs() is None:
        pytest.skip("PostgreSQL is not installed")
    folder = tmp_path_factory.mktemp("runbook")
    small_catalog(folder / "catalog.yaml")
    destination = f"{s3.make_bucket('runbook')}/catalogue"
    with start(folder, checkpoints, STSR_DESTINATION=destination, STSR_S3_ENDPOINT=s3.endpoint) as running:
        running.api.switch("nightly/nightly", active=False)
        yield running


def put_keys(site: Site, key: str, secret: str) -> None:
    (site.folder / ".env").write_text(f"STSR_S3_ACCESS_KEY_ID={key}\nSTSR_S3_SECRET_ACCESS_KEY={secret}\n")


def doctor(site: Site) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stsr_core.cli", "doctor"]
    return subprocess.run(
        command, cwd=site.folder, env=site.environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_key_that_was_closed_is_told_and_the_next_one_is_read_without_starting_anything_anew(
    site: Site, s3: S3Server
) -> None:
    put_keys(site, "CLOSEDKEY", "closed-secret")
    run = site.api.start("nightly/nightly")
    found = site.api.finished(run)
    assert found["state_type"] == "FAILED"
    assert "InvalidAccessKeyId). Check address, credentials and rights." in found["state"]["message"]
    told = doctor(site)
    assert told.returncode == 1
    assert re.search("^FAULT +store: .*InvalidAccessKeyId", told.stdout, re.MULTILINE), told.stdout
    put_keys(site, s3.key, s3.secret)
    told = doctor(site)
    assert told.returncode == 0, told.stdout
    assert site.api.retried(run)["state_type"] == "COMPLETED"
    catalogue = site.environment["STSR_DESTINATION"]
    assert ls(catalogue, storage_options=s3.options) == {PRODUCT: ["v1"]}
    assert "closed-secret" not in told.stdout + found["state"]["message"]


def test_a_full_disk_fails_a_run_and_a_retry_finishes_it_when_there_is_room(site: Site, s3: S3Server) -> None:
    put_keys(site, s3.key, s3.secret)
    small = site.folder / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "none", str(small)], check=False).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        run = site.api.start("nightly/nightly", members=48, destination=str(small))
        found = site.api.finished(run)
        assert found["state_type"] == "FAILED"
        assert "No space left" in found["state"]["message"]
        assert not (small / "catalog.json").exists()
        made = {path: path.stat().st_mtime_ns for path in small.rglob("receipts/*.json")}
        subprocess.run(["mount", "-o", "remount,size=100m", str(small)], check=True)
        assert site.api.retried(run)["state_type"] == "COMPLETED"
        assert ls(str(small)) == {PRODUCT: ["v1"]}
        assert {path: path.stat().st_mtime_ns for path in made} == made
    finally:
        subprocess.run(["umount", str(small)], check=True)
