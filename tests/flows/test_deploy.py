"""What alerts post, as Prefect's own server fills and sends it; no server runs here."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from prefect.blocks.webhook import Webhook
from prefect.server.utilities.user_templates import render_user_template, validate_user_template
from prefect.types import SecretDict
from pydantic import SecretStr
from typer.testing import CliRunner

from flows import deploy, up
from flows.declared import Declared, shipped_declaration
from stsr_core.cli import app
from stsr_core.settings import Settings

URL = "https://hooks.example/x"


@pytest.mark.parametrize(
    "message",
    [
        "plain",
        'Filter "x" is no CQL2',
        "doctor failed:\nFAULT\tstore",
        r"path C:\new",
        "'x' & <b> é",
        "{{ 1 }} {% if %}",
    ],
)
def test_alerts_are_json_whatever_a_run_said(message):
    failed = next(a for a in Declared.load(shipped_declaration()).automations if a.name == "stsr: run failed")
    run = SimpleNamespace(name="nightly all", state=SimpleNamespace(name="Failed", message=message))
    template = deploy.alert_payload(failed.message)
    validate_user_template(template)
    posted = asyncio.run(render_user_template(template, {"flow_run": run}))
    assert json.loads(posted) == {"text": f"stsr: nightly all ended as Failed: {message}"}


def block_after(monkeypatch, found):
    """The block that a deploy sets where `found` is there; None where it leaves it."""
    saved = []

    async def loaded(_):
        if found is None:
            raise ValueError("there is none")
        return found

    async def save(block, *_, **__):
        saved.append(block)

    async def read(*_):
        return SimpleNamespace(id="id")

    monkeypatch.setattr(Webhook, "aload", loaded)
    monkeypatch.setattr(Webhook, "save", save)
    client, changes = SimpleNamespace(read_block_document_by_name=read), deploy.Changes(dry_run=False)
    asyncio.run(deploy._alert_block(client, Settings(alert_url=SecretStr(URL)), changes))
    return saved[0] if saved else None


def test_alerts_say_that_they_are_json_and_a_block_that_does_not_is_set_again(monkeypatch):
    made = block_after(monkeypatch, None)
    assert made.url.get_secret_value() == URL
    assert made.headers.get_secret_value() == {"Content-Type": "application/json"}
    assert block_after(monkeypatch, made) is None
    assert block_after(monkeypatch, Webhook(url=SecretStr(URL))) is not None
    assert block_after(
        monkeypatch, Webhook(url=SecretStr(URL + "y"), headers=SecretDict(made.headers.get_secret_value()))
    )


def test_what_was_paused_in_the_ui_stays_paused():
    nightly = next(d for d in Declared.load(shipped_declaration()).deployments if d.name == "nightly")
    [schedule] = nightly.schedules
    for paused, active in ((True, False), (False, False), (True, True)):
        found = SimpleNamespace(paused=paused, schedules=[SimpleNamespace(slug=schedule.slug, active=active)])
        switched = deploy._switched(nightly, found)
        assert (switched["paused"], switched["schedules"][0]["active"]) == (paused, active)
    new = deploy._switched(nightly, None)
    assert (new["paused"], new["schedules"][0]["active"]) == (False, True)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--home", "{}/nowhere is no folder, so no run could take place there"),
        ("--code", "{}/nowhere holds no folder `flows`"),
        ("--file", "{}/nowhere cannot be read"),
    ],
)
def test_a_leading_tilde_is_the_home_folder_and_folders_that_are_not_there_are_refused(
    monkeypatch, tmp_path, option, message
):
    monkeypatch.setenv("HOME", str(tmp_path))
    done = CliRunner().invoke(app, ["deploy", option, "~/nowhere"])
    assert str(done.exception).startswith(message.format(tmp_path))


@pytest.mark.parametrize("option", ["--code", "--home"])
@pytest.mark.parametrize("place", [("--image", "stsr:1"), ("--infrastructure", "kubernetes")])
def test_folders_of_code_that_is_in_an_image_are_refused(tmp_path, option, place):
    done = CliRunner().invoke(app, ["deploy", option, str(tmp_path), *place])
    assert str(done.exception).startswith("Images bring their own code and folder")


def test_up_takes_a_folder_with_a_leading_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = []
    monkeypatch.setattr(up, "running", lambda folder, **_: asked.append(folder))
    CliRunner().invoke(app, ["up", "--folder", "~/ops"])
    assert asked == [tmp_path / "ops"]
