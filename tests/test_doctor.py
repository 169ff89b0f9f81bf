import contextlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version

import pytest
import yaml
from distributed import LocalCluster

from stsr_core import doctor, translation
from stsr_core.configuration import shipped_catalog
from stsr_core.doctor import Health, examine
from stsr_core.settings import Settings
from stsr_core.sources.location import located
from stsr_core.sources.open import open_dataset as opened


@pytest.fixture
def here(tmp_path, monkeypatch, checkpoints):
    """A folder of its own as working directory, with tiny checkpoints and no server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STSR_CHECKPOINTS", str(checkpoints))
    monkeypatch.setenv("STSR_DEVICE", "cpu")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    return tmp_path


def found(products=None):
    return {f.name: f for f in examine(products)}


def test_a_sound_installation_has_no_fault_and_leaves_nothing(here):
    findings = found(["all"])
    assert not [str(f) for f in findings.values() if f.health is Health.fault]
    assert "factor (10,1)" in findings["product arpege-provence-1km"].found
    assert "conditional writes hold" in findings["store"].found
    assert findings["alerts"].health is Health.warning
    assert [p.name for p in (here / "stsr-output").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("name", "value", "check", "message"),
    [
        ("STSR_DEVICE", "tpu", "settings", "STSR_DEVICE"),
        ("STSR_CHECKPOINTS", "/nowhere", "checkpoints", "No folder of checkpoints at /nowhere"),
        ("STSR_SCHEDULER_ADDRESS", "tcp://127.0.0.1:9", "scheduler", "does not answer"),
        ("STSR_SCHEDULER_ADDRESS", "tcp://127.0.0.1:99999", "scheduler", "Port out of range 0-65535"),
        ("STSR_S3_ACCESS_KEY_ID", "key", "credentials", "one half of the S3 keys"),
        ("PREFECT_API_URL", "http://127.0.0.1:9/api", "Prefect server", "does not answer"),
        ("STSR_DESTINATION", "/dev/null/x", "store", "Not a directory"),
    ],
)
def test_each_fault_is_found_and_says_what_to_do(here, monkeypatch, name, value, check, message):
    monkeypatch.setenv(name, value)
    finding = found()[check]
    assert finding.health is Health.fault
    assert message in str(finding)


@pytest.mark.parametrize(("native", "health"), [(True, Health.good), (False, Health.warning)])
def test_half_precision_on_a_cpu_that_has_none_is_found_slow(here, monkeypatch, native, health):
    monkeypatch.setenv("STSR_PRECISION", "bfloat16")
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": native})
    finding = found()["device"]
    assert finding.health is health
    assert ("Unset STSR_PRECISION" in str(finding)) is not native


def test_whatever_stops_a_check_is_its_fault_and_the_others_are_made(here, monkeypatch):
    def broken(_):
        raise UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid continuation byte")

    monkeypatch.setattr(doctor, "_catalog", broken)
    monkeypatch.setattr(doctor, "_chosen", lambda *_: broken(_))
    findings = found(["all"])
    assert findings["catalog.yaml"].health is Health.fault
    assert "UnicodeDecodeError: 'utf-8' codec can't decode" in findings["catalog.yaml"].found
    assert [f.name for f in findings.values() if f.health is Health.fault] == ["catalog.yaml"]
    assert list(findings)[-1] == "git"


def test_a_checkout_that_needs_other_packages_than_are_installed_is_found(here, monkeypatch):
    (here / "pyproject.toml").write_text('[project]\ndependencies = ["zarr>=99", "nosuch-package"]\n')
    monkeypatch.setattr(doctor, "__file__", str(here / "stsr_core" / "doctor.py"))
    assert re.fullmatch(r"zarr 3\S+, needed >=99; nosuch-package is missing", found()["versions"].found)


def test_a_damaged_checkpoint_is_found(here, monkeypatch, checkpoints):
    for path in checkpoints.iterdir():
        (here / path.name).write_bytes(path.read_bytes())
    weights = next(here.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    monkeypatch.setenv("STSR_CHECKPOINTS", str(here))
    assert "damaged" in found()["checkpoints"].found


@pytest.mark.parametrize(("lacking", "health"), [("", Health.good), ("no C compiler is there", Health.warning)])
def test_gpus_without_what_translates_kernels_are_a_warning(here, monkeypatch, lacking, health):
    monkeypatch.setenv("STSR_DEVICE", "auto")
    monkeypatch.setattr("stsr_core.ensemble.cluster.visible_gpus", lambda: 2)
    monkeypatch.setattr(doctor, "missing", lambda: lacking)
    device = found()["device"]
    assert device.health is health
    assert "2 GPUs" in device.found
    assert lacking in device.found
    assert ("gcc" in device.mend) is bool(lacking)


def test_kernels_need_triton_and_a_compiler(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(translation, "find_spec", lambda _: object())
    monkeypatch.setattr(translation.shutil, "which", lambda name: "/usr/bin/clang" if name == "clang" else None)
    assert not translation.missing()
    monkeypatch.setattr(translation.shutil, "which", lambda _: None)
    assert "compiler" in translation.missing()
    monkeypatch.setenv("CC", "cc")
    assert not translation.missing()
    monkeypatch.setattr(translation, "find_spec", lambda _: None)
    assert "Triton" in translation.missing()


def test_a_setting_that_is_misspelt_is_a_warning_wherever_it_is_written(here, monkeypatch):
    monkeypatch.setenv("STSR_S3_ENDPIONT", "http://localhost:1")
    monkeypatch.setenv("STSR_DEBUG", "1")
    (here / ".env").write_text("stsr_worker=2\nSTSR_WORKERS=2\nOTHER=1\n")
    settings = found()["settings"]
    assert settings.health is Health.warning
    assert settings.found.endswith("; unknown: STSR_S3_ENDPIONT, STSR_WORKER")


def test_what_a_url_holds_of_credentials_is_not_told(here, monkeypatch):
    catalog = yaml.safe_load(shipped_catalog().read_text())
    [source] = catalog["sources"].values()
    file = str(located(source["url"], shipped_catalog().parent))
    source["url"] = "http://me:word@host/a.grib2?sig=abc"
    (here / "catalog.yaml").write_text(yaml.safe_dump(catalog))
    monkeypatch.setattr("stsr_core.sources.open.open_dataset", lambda *_, **__: opened(file))
    product = found(["all"])["product arpege-provence-1km"]
    assert product.health is Health.good
    assert "steps of http://host/a.grib2, factor" in product.found


def test_a_prefect_server_that_asks_for_a_password_gets_it(here, monkeypatch):
    class Guarded(BaseHTTPRequestHandler):
        def do_GET(self):
            allowed = self.headers["Authorization"] in ("Basic YWRtaW46d29yZA==", "Bearer pnu_word")
            self.send_response(200 if allowed else 401)
            self.end_headers()
            self.wfile.write(f'"{version("prefect")}"'.encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/api"
        monkeypatch.setenv("PREFECT_API_URL", url)
        refused = doctor._checked("server", doctor._prefect, Settings())
        assert f"{url} answers 401 Unauthorized -> Correct the URL, or PREFECT_API_AUTH_STRING" in str(refused)
        inside = url.replace("//", "//admin:word@")
        for name, word in (
            ("PREFECT_API_AUTH_STRING", "admin:word"), ("PREFECT_API_KEY", "pnu_word"), ("PREFECT_API_URL", inside)
        ):  # fmt: skip
            with monkeypatch.context() as patch:
                patch.setenv(name, word)
                assert doctor._prefect(Settings()) == (
                    Health.good, f"{url} answers, version {version('prefect')}", ""
                )  # fmt: skip
        server.shutdown()


@contextlib.contextmanager
def prefect(answers):
    """A server that answers some paths with JSON, all others with 404; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            path = self.path.removeprefix("/api")
            self.send_response(200 if path in answers else 404)
            self.end_headers()
            self.wfile.write(json.dumps(answers.get(path)).encode())

        def do_POST(self):
            self.do_GET()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/api"
        server.shutdown()


BLOCK = "/block_types/slug/webhook/block_documents/name/stsr-alert"
DEPLOYED = {"/deployments/name/nightly/nightly": {"work_pool_name": "stsr"}}


@pytest.mark.parametrize(
    ("answers", "health", "message"),
    [
        ({}, Health.warning, "nothing is deployed there (404 Not Found) -> Run `stsr deploy`"),
        (DEPLOYED | {"/work_pools/stsr": {"status": "READY"}}, Health.good, "work pool stsr is served"),
        (
            DEPLOYED | {"/work_pools/stsr": {"status": "NOT_READY"}},
            Health.warning,
            "none serves work pool stsr (NOT_READY) -> Start one: `prefect worker start --pool stsr`",
        ),
    ],
)
def test_a_pool_that_no_worker_serves_is_found(monkeypatch, answers, health, message):
    with prefect(answers) as url:
        monkeypatch.setenv("PREFECT_API_URL", url)
        finding = doctor._checked("worker", doctor._worker, Settings())
    assert finding.health is health
    assert message in str(finding)
    assert "unknown" in doctor._worker(Settings()).found  # it is gone


@pytest.mark.parametrize(
    ("block", "actions", "enabled", "health"),
    [
        (True, "call-webhook", True, Health.good),
        (True, "do-nothing", True, Health.warning),
        (True, "call-webhook", False, Health.warning),
        (False, "call-webhook", True, Health.warning),
    ],
)
def test_alerts_that_reach_nobody_are_found(monkeypatch, block, actions, enabled, health):
    automation = {"name": "stsr: run failed", "enabled": enabled, "actions": [{"type": actions}]}
    other = {"name": "of others", "enabled": True, "actions": [{"type": "call-webhook"}]}
    settings = Settings(alert_url="https://hooks.example/x")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert doctor._alerts(settings).health is Health.good
    with prefect({"/automations/filter": [automation, other]} | ({BLOCK: {}} if block else {})) as url:
        monkeypatch.setenv("PREFECT_API_URL", url)
        finding = doctor._checked("alerts", doctor._alerts, settings)
    assert finding.health is health
    assert ("the server calls none -> Run `stsr deploy`" in str(finding)) is (health is Health.warning)
    assert "unknown whether the server" in doctor._alerts(settings).found  # it is gone


def test_a_scheduler_that_is_none_or_has_no_workers_is_found(monkeypatch):
    monkeypatch.setattr(doctor, "ANSWER_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        finding = doctor._workers(f"tcp://127.0.0.1:{silent.getsockname()[1]}")
        assert (finding.health, "but as no Dask scheduler" in finding.found) == (Health.fault, True)
    monkeypatch.setattr(doctor, "ANSWER_S", 10.0)
    for workers, health in ((0, Health.warning), (1, Health.good)):
        with LocalCluster(
            n_workers=workers, threads_per_worker=1, dashboard_address=":0", processes=False, protocol="tcp"
        ) as cluster:
            assert doctor._workers(cluster.scheduler_address).health is health
