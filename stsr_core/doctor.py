"""What an installation needs to run, checked for real; every fault says how to mend it. Needs no Prefect."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import tomllib
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from stsr_core.ensemble.cluster import count_workers
from stsr_core.errors import ConfigurationError, StsrError
from stsr_core.settings import Settings, unknown_names
from stsr_core.sources.remote import shown
from stsr_core.translation import missing
from stsr_core.version import code_version

CLOCK_S = 5.0  # seconds that this clock may differ from that of the store
FREE_GB = 5.0  # free space below which a local destination gets a warning
ANSWER_S = 10.0  # seconds that a server has to answer


class Health(StrEnum):
    """How a finding is to be taken."""

    good = "ok"
    warning = "warning"
    fault = "FAULT"


class State(NamedTuple):
    """How something is, what was found of it, and what to do about it; see `Finding`."""

    health: Health
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: what was checked.
        health: how it is.
        found: what was found.
        mend: what to do about it, empty where nothing is to be done.
    """

    name: str
    health: Health
    found: str
    mend: str = ""

    def __str__(self) -> str:
        mend = f" -> {self.mend}" if self.mend else ""
        return f"{self.health.value:8}{self.name}: {self.found}{mend}"


def examine(products: list[str] | None = None) -> Iterator[Finding]:
    """Check everything, one finding a check.

    Args:
        products: products whose source is read and matched; none without it, ["all"] for all.
    """
    try:
        settings = Settings()
    except ConfigurationError as e:
        yield Finding("settings", Health.fault, str(e))
        return
    checks: list[tuple[str, Callable[[Settings], State]]] = [
        ("settings", _settings),
        ("versions", _versions),
        ("catalog.yaml", _catalog),
        ("checkpoints", _checkpoints),
        ("device", _device),
        ("scheduler", _scheduler),
        ("credentials", _credentials),
        ("store", _store),
        ("space", _space),
        ("Prefect server", _prefect),
        ("Prefect worker", _worker),
        ("alerts", _alerts),
        ("git", _git),
    ]
    for name, check in checks:
        yield _checked(name, check, settings)
    try:
        chosen = _chosen(products or [], settings)
    except Exception:  # the check of catalog.yaml has said why
        return
    for product in chosen:
        yield _checked(f"product {product}", partial(_product, name=product), settings)


def _settings(settings: Settings) -> State:
    named = ", ".join(sorted(settings.model_fields_set)) or "nothing set, all defaults"
    if unknown := unknown_names():
        mend = "Correct or remove them; infra/settings.md lists those there are."
        return State(Health.warning, f"{named}; unknown: {', '.join(unknown)}", mend)
    return State(Health.good, named)


def _checked(name: str, check: Callable[[Settings], State], settings: Settings) -> Finding:
    try:
        return Finding(name, *check(settings))
    except StsrError as e:
        return Finding(name, Health.fault, str(e))
    except OSError as e:
        return Finding(name, Health.fault, str(e), "Check the path and its permissions.")
    except Exception as e:  # whatever it is, the other checks are made
        return Finding(name, Health.fault, f"{type(e).__name__}: {e}", "Correct the setting or file that it is about.")


def _versions(_: Settings) -> State:
    from packaging.requirements import Requirement

    wrong = []
    for line in _requirements():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found}, needed {requirement.specifier}")
    if wrong:
        return State(Health.fault, "; ".join(wrong), "pip install stsr again in this environment.")
    return State(Health.good, f"stsr {code_version()}, torch {version('torch')}")


def _requirements() -> list[str]:
    """What this code needs: a checkout may need other packages than the release that is installed."""
    project = Path(__file__).parents[1] / "pyproject.toml"
    if project.is_file():
        found: list[str] = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
        return found
    return requires("stsr") or []


def _catalog(settings: Settings) -> State:
    from stsr_core.configuration import Configuration, choose_catalog

    path = choose_catalog(settings.catalog_file)
    products = Configuration.load(path).products
    return State(Health.good, f"{path}: products {', '.join(products) or 'none'}")


def _checkpoints(settings: Settings) -> State:
    from stsr_core.checkpoint import Library

    library = Library.open(settings.checkpoints)
    for checkpoint in library.checkpoints:
        checkpoint.weights()
    if not library.checkpoints:
        mend = "Train one with `stsr train`, or unset STSR_CHECKPOINTS."
        return State(Health.fault, f"none in {settings.checkpoints}", mend)
    names = ", ".join(c.card.name for c in library.checkpoints)
    return State(Health.good, f"{names} serve {', '.join(map(str, library.family.factors))}; whole")


def _device(settings: Settings) -> State:
    from stsr_core.ensemble.cluster import visible_gpus

    if settings.scheduler_address is not None:
        return State(Health.good, "that of the scheduler's workers")
    if settings.device == "cpu":
        return _cpu(settings, f"CPU as set, {os.cpu_count()} cores")
    count, driver = visible_gpus(), _driver()
    if count:
        return _gpus(f"{count} GPUs, driver {driver or 'unknown'}")
    if driver:
        mend = "Install a driver that fits this torch's CUDA, or look at CUDA_VISIBLE_DEVICES."
        return State(Health.fault, f"driver {driver}, but torch sees no GPU", mend)
    if settings.device == "cuda":
        return State(Health.fault, "cuda is set, no GPU is here", "Set STSR_DEVICE=auto, or add a GPU.")
    return _cpu(settings, f"no GPU, {os.cpu_count()} CPU cores")


def _cpu(settings: Settings, found: str) -> State:
    if settings.precision == "bfloat16":
        import torch

        from stsr_core.downscaler import native_bfloat16

        if not native_bfloat16(torch.device("cpu")):
            mend = "Unset STSR_PRECISION: this CPU takes five times as long in bfloat16 as in single precision."
            return State(Health.warning, f"{found}, without bfloat16", mend)
    return State(Health.good, found)


def _gpus(found: str) -> State:
    lacking = missing()
    if not lacking:
        return State(Health.good, found)
    mend = "Install gcc and Triton, which comes with torch for CUDA; without them shards take twice as long."
    return State(Health.warning, f"{found}; {lacking}", mend)


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def _scheduler(settings: Settings) -> State:
    address = settings.scheduler_address
    if address is None:
        return State(Health.good, "none set; each run starts a local cluster")
    parts = urlsplit(address if "://" in address else f"tcp://{address}")
    try:
        socket.create_connection((parts.hostname or "", parts.port or 8786), timeout=ANSWER_S).close()
    except (OSError, ValueError) as e:  # ValueError: it has no port that can be
        mend = "Start it, or correct or unset STSR_SCHEDULER_ADDRESS."
        return State(Health.fault, f"{address} does not answer ({e})", mend)
    return _workers(address)


def _workers(address: str) -> State:
    try:
        count = count_workers(address)
    except (OSError, ValueError):
        mend = "Correct STSR_SCHEDULER_ADDRESS: something else is there, or another version of Dask."
        return State(Health.fault, f"{address} answers, but as no Dask scheduler", mend)
    if not count:
        mend = "Start some with `dask worker`; runs wait for them."
        return State(Health.warning, f"{address} has no workers", mend)
    return State(Health.good, f"{address} answers, workers: {count}")


def _credentials(settings: Settings) -> State:
    key, secret = settings.s3_access_key_id, settings.s3_secret_access_key
    if (key is None) != (secret is None):
        mend = "Set both STSR_S3_ACCESS_KEY_ID and STSR_S3_SECRET_ACCESS_KEY."
        return State(Health.fault, "one half of the S3 keys is set", mend)
    if key is not None and settings.s3_anonymous:
        mend = "Unset STSR_S3_ANONYMOUS; publishing needs the keys."
        return State(Health.warning, "S3 keys are set, but access is anonymous", mend)
    if key is None and settings.destination.startswith("s3://"):
        return State(Health.warning, "no S3 keys set; those of the machine are used, if any")
    return State(Health.good, "S3 keys are set" if key is not None else "none needed")


def _store(settings: Settings) -> State:
    """Write, read, list and remove a probe; probe conditional writes; compare clocks."""
    from stsr_core.catalog.documents import Documents

    options = settings.options_of(settings.destination)
    documents = Documents.at(settings.destination, options, sole_publisher=settings.sole_publisher)
    probe = f".doctor-{uuid.uuid4().hex[:8]}"
    documents.require_conditional_writes()
    try:
        documents.write(f"{probe}/probe", b"stsr")
        now = datetime.now(UTC)
        fetched = documents.fetch(f"{probe}/probe")
        written = next((when for _, when in documents.files(probe).values()), None)
    finally:
        documents.remove(probe)
    if fetched is None or fetched[0] != b"stsr" or written is None:
        mend = "Use a store that reads back what was written."
        return State(Health.fault, f"{settings.destination} lost a probe", mend)
    off = abs((now - written).total_seconds())
    if off > CLOCK_S:
        mend = "Set both clocks by NTP; `reconcile` compares them."
        return State(Health.warning, f"its clock differs from this one by {off:.0f} s", mend)
    found = f"{settings.destination} can be written, listed and read, conditional writes hold, clock within {off:.1f} s"
    return State(Health.good, found)


def _space(settings: Settings) -> State:
    local = Path(settings.destination) if "://" not in settings.destination else Path.cwd()
    folder = next(p for p in (local.absolute(), *local.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(folder).free / 1e9
    if free < FREE_GB:
        return State(Health.warning, f"{free:.1f} GB free in {folder}", "Free some, or run `maintain`.")
    return State(Health.good, f"{free:.0f} GB free in {folder}")


def _prefect(_: Settings) -> State:
    url = shown(os.environ.get("PREFECT_API_URL", ""))
    if not url:
        return State(Health.warning, "PREFECT_API_URL is not set", "`stsr up` starts a server.")
    try:
        found = str(_asked("/admin/version"))
    except urllib.error.HTTPError as e:
        mend = "Correct the URL, or PREFECT_API_AUTH_STRING or PREFECT_API_KEY."
        return State(Health.fault, f"{url} answers {e.code} {e.reason}", mend)
    except (urllib.error.URLError, OSError, ValueError) as e:
        return State(Health.fault, f"{url} does not answer ({e})", "Start it, or correct the URL.")
    mine = version("prefect")
    if found.split(".")[:2] != mine.split(".")[:2]:
        mend = "Bring both to one minor version."
        return State(Health.warning, f"{url} is {found}, this client {mine}", mend)
    return State(Health.good, f"{url} answers, version {found}")


def _asked(path: str, body: Mapping[str, object] | None = None) -> Any:
    """What the server of PREFECT_API_URL answers."""
    url = os.environ["PREFECT_API_URL"]
    sent = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **_authorization(url)}
    request = urllib.request.Request(f"{shown(url).rstrip('/')}{path}", sent, headers)
    with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
        return json.loads(answer.read())


def _authorization(url: str) -> dict[str, str]:
    """What Prefect's clients send to a server that asks who they are."""
    parts = urlsplit(url)
    if parts.username is not None:
        return _basic(f"{unquote(parts.username)}:{unquote(parts.password or '')}")
    if key := os.environ.get("PREFECT_API_KEY"):
        return {"Authorization": f"Bearer {key}"}
    if word := os.environ.get("PREFECT_API_AUTH_STRING"):
        return _basic(word)
    return {}


def _basic(word: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(word.encode()).decode()}"}


def _worker(_: Settings) -> State:
    """Whether a worker serves the pool that is deployed to."""
    if not os.environ.get("PREFECT_API_URL"):
        return State(Health.good, "none is looked for without a server")
    try:
        pool = _asked("/deployments/name/nightly/nightly")["work_pool_name"]
        status = _asked(f"/work_pools/{pool}")["status"]
    except urllib.error.HTTPError as e:
        return State(Health.warning, f"nothing is deployed there ({e.code} {e.reason})", "Run `stsr deploy`.")
    except OSError:  # the check of the server has said why
        return State(Health.warning, "unknown, as the server does not answer")
    if status != "READY":
        mend = f"Start one: `prefect worker start --pool {pool}`; resume the pool in the UI if it is paused."
        return State(Health.warning, f"none serves work pool {pool} ({status})", mend)
    return State(Health.good, f"work pool {pool} is served")


def _alerts(settings: Settings) -> State:
    if settings.alert_url is None:
        return State(Health.warning, "no webhook", "Set STSR_ALERT_URL and run `stsr deploy`.")
    if not os.environ.get("PREFECT_API_URL"):
        return State(Health.good, "a webhook is set")
    try:
        _asked("/block_types/slug/webhook/block_documents/name/stsr-alert")
        actions = [action["type"] for a in _asked("/automations/filter", {}) if _is_ours(a) for action in a["actions"]]
    except urllib.error.HTTPError:
        actions = []
    except OSError:
        return State(Health.warning, "a webhook is set; unknown whether the server, which is silent, has it")
    if "call-webhook" not in actions:
        mend = "Run `stsr deploy` where STSR_ALERT_URL is set."
        return State(Health.warning, "a webhook is set, but the server calls none", mend)
    return State(Health.good, "the server calls a webhook")


def _is_ours(automation: Mapping[str, Any]) -> bool:
    return str(automation["name"]).startswith("stsr: ") and bool(automation["enabled"])


def _git(_: Settings) -> State:
    tool = shutil.which("git")
    if tool is None:
        return State(Health.warning, "git is not installed", "Install it; the flow `redeploy` needs it.")
    return State(Health.good, tool)


def _chosen(products: list[str], settings: Settings) -> list[str]:
    from stsr_core.configuration import Configuration, choose_catalog

    if products != ["all"]:
        return products
    return list(Configuration.load(choose_catalog(settings.catalog_file)).products)


def _product(settings: Settings, name: str) -> State:
    """Read the first block of the source of a product and match its factor; nothing is generated."""
    from stsr_core.checkpoint import Library
    from stsr_core.configuration import Configuration, choose_catalog
    from stsr_core.regrid import native_factor, reach
    from stsr_core.sources.harmonise import find
    from stsr_core.sources.location import located
    from stsr_core.sources.open import open_dataset

    path = choose_catalog(settings.catalog_file)
    configuration = Configuration.load(path)
    product = configuration.product(name)
    source, grid = configuration.sources[product.source], configuration.grids[product.grid]
    options = settings.source_options(located(source.url, path.parent))
    with open_dataset(source.url, base=path.parent, storage_options=options) as dataset:
        reading = find(dataset, source.variable, source.declared, near=reach(grid))
        next(reading.blocks())
    space, time = native_factor(reading, grid)
    found = Library.open(settings.checkpoints).family.nearest(space, time, limit=settings.match_limit)
    said = f"{reading.times.size} steps of {shown(source.url)}, factor {found.factor}"
    return State(Health.good, said)
