"""What alerts post, as Prefect's own server fills and sends it; no server runs here."""

import asyncio
import contextlib
import json
import uuid
from types import SimpleNamespace

import pytest
from prefect.blocks.webhook import Webhook
from prefect.events.schemas.automations import Automation
from prefect.server.utilities.user_templates import render_user_template, validate_user_template
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.types import SecretDict
from pydantic import SecretStr
from typer.testing import CliRunner

from flows import deploy, redeploy, up
from flows.declared import Declared, shipped_declaration
from stsr_core.cli import app
from stsr_core.configuration import shipped_catalog
from stsr_core.errors import ConfigurationError
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


@pytest.mark.parametrize("option", ["--code", "--home", "--keep-release"])
@pytest.mark.parametrize("place", [("--image", "stsr:1"), ("--infrastructure", "kubernetes")])
def test_folders_of_code_that_is_in_an_image_are_refused(tmp_path, option, place):
    folder = [] if option == "--keep-release" else [str(tmp_path)]
    done = CliRunner().invoke(app, ["deploy", option, *folder, *place])
    assert str(done.exception).startswith("Images bring their own code and folder")


def test_up_takes_a_folder_with_a_leading_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = []
    monkeypatch.setattr(up, "running", lambda folder, **_: asked.append(folder))
    CliRunner().invoke(app, ["up", "--folder", "~/ops"])
    assert asked == [tmp_path / "ops"]


def test_without_an_address_nothing_is_deployed_to_a_server_that_would_end_with_the_command():
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        done = CliRunner().invoke(app, ["deploy"])
        assert isinstance(done.exception, ConfigurationError)
        assert str(done.exception).startswith("PREFECT_API_URL is not set")
        done = CliRunner().invoke(app, ["deploy", "--keep-release"])
        assert str(done.exception).startswith("PREFECT_API_URL is not set")


class Server:
    """Stands in for a Prefect server that holds automations, of which it sends at most 200 at a time."""

    def __init__(self):
        self.there: list[Automation] = []

    async def read_automations(self, limit, offset):
        return self.there[offset : offset + min(limit, 200)]

    async def create_automation(self, automation):
        self.there.insert(0, Automation(**automation.model_dump() | {"id": uuid.uuid4()}))

    async def update_automation(self, key, automation):
        self.there = [Automation(id=key, **automation.model_dump()) if a.id == key else a for a in self.there]

    async def delete_automation(self, key):
        self.there = [a for a in self.there if a.id != key]

    def deploy(self, products):
        changes = deploy.Changes(dry_run=False)
        declared = Declared.load(shipped_declaration())
        asyncio.run(deploy._automations(self, declared, None, products, changes))
        return changes.lines


def test_automations_are_made_once_however_many_there_are_and_doubles_go():
    server, products = Server(), [f"p{i:03}" for i in range(250)]
    declared = len(Declared.load(shipped_declaration()).automations)
    assert len(server.deploy(products)) == len(server.there) == declared - 1 + 250
    assert server.deploy(products) == []
    doubled = server.there[-1]
    asyncio.run(server.create_automation(doubled))
    assert server.deploy(products) == [f"removed automation {doubled.name!r}"]
    assert len({a.name for a in server.there}) == len(server.there)
    assert len(server.deploy(products[1:])) == 1


def test_an_automation_that_was_muted_in_the_ui_stays_so():
    server = Server()
    server.deploy(["p"])
    server.there = [a.model_copy(update={"enabled": a.name != "stsr: run late"}) for a in server.there]
    assert server.deploy(["p"]) == []
    server.there = [a.model_copy(update={"description": "Other."}) for a in server.there]
    assert len(server.deploy(["p"])) == len(server.there)
    assert [a.name for a in server.there if not a.enabled] == ["stsr: run late"]


@pytest.fixture
def site(monkeypatch, tmp_path):
    """A server that takes everything, and what is asked of it; `home` is not where the command is typed."""
    asked = SimpleNamespace(home=tmp_path / "home", before=None)
    asked.home.mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    async def nothing(*_):
        return None

    async def deployments(_client, _declared, _place, products, _changes):
        asked.products = products

    async def alert_block(_client, settings, _changes):
        asked.alert = settings.alert_url

    async def deployed():
        return asked.before

    for name in ("require_server", "_pool", "_queues", "_limits", "_automations", "_remember"):
        monkeypatch.setattr(deploy, name, nothing)
    monkeypatch.setattr(deploy, "_deployments", deployments)
    monkeypatch.setattr(deploy, "_alert_block", alert_block)
    monkeypatch.setattr(deploy, "deployed", deployed)
    monkeypatch.setattr(deploy, "get_client", contextlib.AsyncExitStack)
    return asked


def test_settings_and_products_are_those_of_the_folder_that_runs_take_place_in(site):
    def said():
        done = CliRunner().invoke(app, ["deploy", "--home", str(site.home)])
        assert done.exit_code == 0, done.exception
        return done.output

    assert f"Alerts are off: STSR_ALERT_URL is set neither in the environment here nor in {site.home}/.env" in said()
    assert site.products == ["arpege-provence-1km"]
    (site.home / "catalog.yaml").write_text(shipped_catalog().read_text().replace("arpege-provence-1km", "mine"))
    (site.home / ".env").write_text(f"STSR_ALERT_URL={URL}\n")
    assert "Alerts are off" not in said()
    assert (site.products, site.alert.get_secret_value()) == (["mine"], URL)
    (site.home / "catalog.yaml").rename(site.home / "other.yaml")
    (site.home / ".env").write_text("STSR_CATALOG_FILE=other.yaml\n")
    said()
    assert site.products == ["mine"]


def test_what_a_redeploy_put_to_work_is_kept_while_its_code_is_there(site, monkeypatch, tmp_path):
    registered = []
    monkeypatch.setattr(
        redeploy, "register_by_its_code", lambda *arguments: registered.append(arguments) or "Nothing to change."
    )
    (tmp_path / "release" / "flows").mkdir(parents=True)
    good = deploy.Release(reference="good (abc)", code=str(tmp_path / "release"), home=str(site.home))
    for before, kept in (
        (None, False),
        (good, True),
        (good.model_copy(update={"home": "/other"}), False),
        (good.model_copy(update={"code": "/gone"}), False),
        (deploy.this_release(home=site.home), False),
    ):
        site.before = before
        registered.clear()
        done = CliRunner().invoke(app, ["deploy", "--home", str(site.home), "--keep-release", "--dry-run"])
        assert done.exit_code == 0, done.exception
        assert ("Keeps good (abc); `stsr deploy` without --keep-release" in done.output) is kept
        assert registered == ([(good, "--dry-run")] if kept else [])
