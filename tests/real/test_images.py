"""Redeploying images through a pool of type docker; a stand-in for Docker runs them (image_worker.py)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.site import RELEASES, ROOT, Site, git, start

IMAGE = "registry.example/stsr"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, checkpoints: Path) -> Iterator[Site]:
    """A site whose runs take place in the image `good`."""
    with start(tmp_path_factory.mktemp("site"), checkpoints) as site:
        images = site.folder / "images"
        for tag in RELEASES:
            git(site.folder / "repository", "worktree", "add", "--detach", str(images / tag), tag)
        done = site.stsr("deploy", "--infrastructure", "docker", "--image", f"{IMAGE}:good")
        assert done.returncode == 0, done.stdout + done.stderr
        with (site.folder / "image_worker.log").open("w") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "tests.real.image_worker", str(images)],
                cwd=ROOT, env=site.for_commands, stdout=log, stderr=log,
            )  # fmt: skip
            yield site
            worker.terminate()
            worker.wait(60)


def deployed_image(site: Site) -> str:
    (image,) = {
        site.api.get(f"/deployments/name/{name}/{name}")["job_variables"]["image"] for name in ("nightly", "check")
    }
    assert site.api.get("/variables/name/stsr_release")["value"]["image"] == image
    return str(image)


def test_deploying_again_changes_nothing(site: Site) -> None:
    done = site.stsr("deploy", "--infrastructure", "docker", "--image", f"{IMAGE}:good")
    assert done.stdout.strip() == "Nothing to change."


@pytest.mark.parametrize(
    ("reference", "message"),
    [("broken", "a defect of the release"), ("unregistrable", "a defect of its deploy"), ("nosuch", "nosuch ended as")],
)
def test_an_image_that_fails_leaves_what_is_deployed(site: Site, reference: str, message: str) -> None:
    run = site.api.start("redeploy/redeploy", reference=reference, smoke_members=1)
    found = site.api.finished(run)
    assert found["state_type"] == "FAILED"
    assert message in found["state"]["message"]
    assert deployed_image(site) == f"{IMAGE}:good"
    assert f"to **{IMAGE}:{reference}**" in site.api.artifacts(run)["redeploy"]["data"]


def test_an_image_that_passes_is_deployed_by_its_tag(site: Site) -> None:
    git(site.folder / "repository", "worktree", "add", "--detach", str(site.folder / "images" / "next"), "good")
    found = site.api.finished(site.api.start("redeploy/redeploy", reference="next", smoke_members=1, dry_run=True))
    assert found["state_type"] == "COMPLETED", found["state"]["message"]
    assert deployed_image(site) == f"{IMAGE}:good"
    found = site.api.finished(site.api.start("redeploy/redeploy", reference="next", smoke_members=1))
    assert found["state_type"] == "COMPLETED", found["state"]["message"]
    assert deployed_image(site) == f"{IMAGE}:next"
