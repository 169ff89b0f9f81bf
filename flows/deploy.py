"""Bring a Prefect server to the state that prefect.yaml declares; nothing is written where nothing differs."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import httpx
from prefect import get_client
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions, StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.actions import CallWebhook, ChangeFlowRunState, DoNothing
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.types import SecretDict
from prefect.utilities.callables import parameter_schema
from prefect.variables import Variable
from prefect.workers.utilities import get_default_base_job_template_for_infrastructure_type
from pydantic import BaseModel, Field

from flows.declared import MARK, Automation, Declared, Deployment, Infrastructure, InfrastructureName
from flows.parameters import ALL
from stsr_core.configuration import Configuration, choose_catalog
from stsr_core.errors import ConfigurationError
from stsr_core.settings import Settings
from stsr_core.sources.remote import shown

if TYPE_CHECKING:
    from prefect.client.schemas.responses import DeploymentResponse
    from prefect.flows import Flow

HEARTBEAT_S = 30  # seconds between heartbeats of a run; the zombie automation waits for five
ALERT_BLOCK = "stsr-alert"
RELEASE = "stsr_release"  # variable: what is deployed
PAGE = 200  # what a server sends at most

T = TypeVar("T")


class Release(BaseModel):
    """What is deployed on a server: a folder of code, or an image."""

    reference: str = Field(description="What people call it: a git commit, an image tag, or `working tree`.")
    infrastructure: InfrastructureName = Field(InfrastructureName.process, description="Kind of the work pool.")
    code: str | None = Field(None, description="Folder of the code, empty for an image.")
    image: str | None = Field(None, description="Image, empty for a folder.")
    home: str | None = Field(
        None, description="Folder that runs take place in; relative paths of the settings start there."
    )


@dataclass
class Changes:
    """What a deploy changed, or would change."""

    dry_run: bool
    lines: list[str] = field(default_factory=list)

    def add(self, what: str) -> bool:
        """Note a change; returns whether to make it."""
        self.lines.append(what)
        return not self.dry_run


async def deploy(declared: Declared, release: Release, *, dry_run: bool = False) -> list[str]:
    """Bring the server to the declared state.

    Args:
        declared: what it is to hold.
        release: the code that runs use, and where they run.
        dry_run: only say what would change.

    Returns:
        What was changed, one line each; empty where nothing was.

    Raises:
        ConfigurationError: no server answers, or the release does not fit the infrastructure.
    """
    settings, changes = settings_of(release), Changes(dry_run)
    chosen = declared.infrastructures.get(release.infrastructure)
    if chosen is None:
        raise ConfigurationError(f"prefect.yaml declares no infrastructure {release.infrastructure}. Add it there.")
    products = list(Configuration.load(choose_catalog(settings.catalog_file, Path(release.home or ""))).products)
    variables = _job_variables(chosen, release)
    await require_server()
    async with get_client() as client:
        await _pool(client, chosen, changes)
        await _queues(client, declared, chosen.work_pool, changes)
        await _limits(client, declared, changes)
        wanted = declared.deployments_on(release.infrastructure)
        await _deployments(client, wanted, (chosen.work_pool, variables, release.reference), products, changes)
        await _automations(client, declared, await _alert_block(client, settings, changes), products, changes)
        await _remember(release, changes)
    return changes.lines


def settings_of(release: Release) -> Settings:
    """Return the settings that runs find: those of the environment, else of `.env` in their folder, or in this one."""
    return Settings(_env_file=Path(release.home or "") / ".env")


async def deployed() -> Release | None:
    """Return what is deployed on the server, None where nothing is."""
    found = await Variable.aget(RELEASE)
    return None if found is None else Release.model_validate(found)


async def kept(release: Release) -> Release:
    """Return what is deployed in the folder of a release, if its code is still there; else that release.

    Raises:
        ConfigurationError: no server answers.
    """
    await require_server()
    before = await deployed()
    if before is None or before.code is None or before.home != release.home:
        return release
    return before if (Path(before.code) / "flows").is_dir() else release


async def require_server() -> None:
    """Make sure that a server answers.

    Raises:
        ConfigurationError: none does, or no address is set: Prefect would start a server that ends with this command.
    """
    url = get_current_settings().api.url
    if not url:
        raise ConfigurationError(
            "PREFECT_API_URL is not set, so there is no server to deploy to. Set it, for example to "
            "http://127.0.0.1:4200/api; `stsr up` starts a server and prints its address."
        )
    try:
        async with get_client() as client:
            response = await client.hello()
            response.raise_for_status()
    except httpx.HTTPError as e:
        raise ConfigurationError(
            f"No Prefect server answers at {shown(url)} ({type(e).__name__}). Start one with `stsr up` or "
            "`prefect server start`, and set PREFECT_API_URL."
        ) from e


def _job_variables(infrastructure: Infrastructure, release: Release) -> dict[str, Any]:
    environment = {
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_CLIENT_METRICS_ENABLED": "false",  # of the worker; runs inherit it, and would fight for its port
        "DO_NOT_TRACK": "1",
    }
    if infrastructure.type is InfrastructureName.process:
        if release.code is None or release.home is None:
            raise ConfigurationError("Runs in processes need a folder of code. Leave out --image.")
        return {
            **infrastructure.job_variables,
            "working_dir": release.home,
            "env": {**environment, "PYTHONPATH": release.code, "PYTHONSAFEPATH": "1"},
        }
    if release.image is None:
        raise ConfigurationError(f"Runs in {infrastructure.type.value} need an image. Name it with --image.")
    filled = json.loads(json.dumps(infrastructure.job_variables).replace("{image}", release.image))
    return {**filled, "env": environment}


async def _pool(client: PrefectClient, wanted: Infrastructure, changes: Changes) -> None:
    template = await _job_template(wanted)
    try:
        found = await client.read_work_pool(wanted.work_pool)
    except ObjectNotFound:
        if changes.add(f"created work pool {wanted.work_pool} ({wanted.type.value})"):
            await client.create_work_pool(
                WorkPoolCreate(name=wanted.work_pool, type=wanted.type.value, base_job_template=template)
            )
        return
    if found.type != wanted.type.value:
        raise ConfigurationError(
            f"Work pool {wanted.work_pool} is of type {found.type}, not {wanted.type.value}. Rename one of them."
        )
    if found.concurrency_limit is not None and changes.add(f"removed the limit of work pool {wanted.work_pool}"):
        await client.update_work_pool(wanted.work_pool, WorkPoolUpdate(concurrency_limit=None))
    if found.base_job_template != template and changes.add(f"changed the jobs of work pool {wanted.work_pool}"):
        await client.update_work_pool(wanted.work_pool, WorkPoolUpdate(base_job_template=template))


async def _job_template(infrastructure: Infrastructure) -> dict[str, Any]:
    """How jobs of a pool are made: as Prefect declares it, with what is declared here in place of its parts."""
    found = await get_default_base_job_template_for_infrastructure_type(infrastructure.type.value)
    if found is None:
        raise ConfigurationError(
            f"The Prefect server knows no template of {infrastructure.type.value} jobs. Install "
            f"prefect-{infrastructure.type.value} here."
        )
    return {**found, "job_configuration": found["job_configuration"] | infrastructure.job_configuration}


async def _queues(client: PrefectClient, declared: Declared, pool: str, changes: Changes) -> None:
    try:
        there = {queue.name: queue for queue in await client.read_work_queues(work_pool_name=pool)}
    except ObjectNotFound:
        there = {}  # a dry run before the pool is made
    for queue in sorted(declared.work_queues, key=lambda q: q.priority):
        found = there.get(queue.name)
        if found is None:
            if changes.add(f"created work queue {pool}/{queue.name}"):
                made = await client.create_work_queue(queue.name, work_pool_name=pool, priority=queue.priority)
                await client.update_work_queue(made.id, concurrency_limit=queue.concurrency_limit)
        elif (found.priority, found.concurrency_limit) != (queue.priority, queue.concurrency_limit) and changes.add(
            f"changed work queue {pool}/{queue.name}"
        ):
            await client.update_work_queue(found.id, priority=queue.priority, concurrency_limit=queue.concurrency_limit)
    gone = there.keys() - {queue.name for queue in declared.work_queues} - {"default"}
    for name in sorted(gone):
        if changes.add(f"removed work queue {pool}/{name}"):
            await client.delete_work_queue_by_id(there[name].id)


async def _limits(client: PrefectClient, declared: Declared, changes: Changes) -> None:
    found = await _all(lambda n, skip: client.read_global_concurrency_limits(limit=n, offset=skip))
    there = {limit.name: limit for limit in found}
    for name, limit in declared.limits.items():
        if (name not in there or there[name].limit != limit) and changes.add(f"set limit {name} to {limit}"):
            await client.upsert_global_concurrency_limit_by_name(name, limit)
    for name in sorted(there.keys() - declared.limits.keys()):
        if name.startswith(f"{MARK}-") and changes.add(f"removed limit {name}"):
            await client.delete_global_concurrency_limit_by_name(name)


async def _deployments(
    client: PrefectClient,
    deployments: list[Deployment],
    place: tuple[str, dict[str, Any], str],
    products: list[str],
    changes: Changes,
) -> None:
    pool, variables, reference = place
    ours = DeploymentFilter(tags=DeploymentFilterTags(all_=[MARK]))
    registered = await _all(lambda n, skip: client.read_deployments(deployment_filter=ours, limit=n, offset=skip))
    there = {(await client.read_flow(d.flow_id)).name + "/" + d.name: d for d in registered}
    names = set()
    for deployment in deployments:
        flow = _flow(deployment)
        full = f"{flow.name}/{deployment.name}"
        names.add(full)
        found = there.get(full)
        wanted = _wanted(deployment, flow, pool, variables, products, reference) | _switched(deployment, found)
        differs = sorted(wanted) if found is None else _differing(wanted, _found(found))
        verb = "created" if found is None else f"changed {', '.join(differs)} of"
        if differs and changes.add(f"{verb} deployment {full}"):
            await _create(client, deployment, await client.create_flow(flow), wanted)
    for full in sorted(there.keys() - names):
        if changes.add(f"removed deployment {full}"):
            await client.delete_deployment(there[full].id)


async def _all(read: Callable[[int, int], Awaitable[list[T]]]) -> list[T]:
    """Read all pages; `read` is given the length of a page and how many of the things to leave out before it."""
    found: list[T] = []
    while page := await read(PAGE, len(found)):
        found += page
    return found


def _flow(deployment: Deployment) -> Flow[..., Any]:
    found: Flow[..., Any] = getattr(importlib.import_module(deployment.module), deployment.function)
    return found


def _wanted(
    deployment: Deployment, flow: Flow[..., Any], pool: str, variables: dict[str, Any], products: list[str], ref: str
) -> dict[str, Any]:
    schema = parameter_schema(flow).model_dump(exclude_none=True)
    if deployment.products:
        field_ = schema["properties"][deployment.products]
        field_["enum"] = ([ALL] if field_.get("default") == ALL else []) + products
    return {
        "description": deployment.description,
        "tags": sorted(deployment.tags),
        "parameters": deployment.parameters,
        "work_pool_name": pool,
        "work_queue_name": deployment.work_queue,
        "entrypoint": f"{deployment.module}.{deployment.function}",
        "job_variables": variables,
        "concurrency_limit": deployment.concurrency_limit,
        "collision_strategy": "ENQUEUE",
        "parameter_openapi_schema": schema,
        "enforce_parameter_schema": True,
        "version": f"{version('stsr')} {ref}"[:60],
    }


def _switched(deployment: Deployment, found: DeploymentResponse | None) -> dict[str, Any]:
    """Schedules as declared; what was paused in the UI stays so, for whoever did it had a reason."""
    active = {} if found is None else {s.slug: s.active for s in found.schedules}
    schedules = sorted(deployment.schedules, key=lambda s: s.slug)
    return {
        "paused": found is not None and found.paused,
        "schedules": [s.model_dump() | {"active": active.get(s.slug, True)} for s in schedules],
    }


def _found(there: DeploymentResponse) -> dict[str, Any]:
    limit, options = there.global_concurrency_limit, there.concurrency_options
    schedules = [
        {"cron": s.schedule.cron, "timezone": s.schedule.timezone, "slug": s.slug, "active": s.active}
        for s in there.schedules
        if isinstance(s.schedule, CronSchedule)
    ]
    return {
        "description": there.description,
        "tags": sorted(there.tags),
        "parameters": there.parameters,
        "work_pool_name": there.work_pool_name,
        "work_queue_name": there.work_queue_name,
        "entrypoint": there.entrypoint,
        "job_variables": there.job_variables,
        "concurrency_limit": limit.limit if limit else None,
        "collision_strategy": options.collision_strategy.value if options else None,
        "paused": there.paused,
        "schedules": sorted(schedules, key=lambda s: str(s["slug"])),
        "parameter_openapi_schema": there.parameter_openapi_schema,
        "enforce_parameter_schema": there.enforce_parameter_schema,
        "version": there.version,
    }


def _differing(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    return [key for key in sorted(wanted) if _plain(wanted[key]) != _plain(found[key])]


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


async def _create(client: PrefectClient, deployment: Deployment, flow_id: UUID, wanted: dict[str, Any]) -> None:
    rest = {k: v for k, v in wanted.items() if k not in ("concurrency_limit", "collision_strategy", "schedules")}
    await client.create_deployment(
        flow_id=flow_id,
        name=deployment.name,
        concurrency_limit=deployment.concurrency_limit,
        concurrency_options=ConcurrencyOptions(collision_strategy=ConcurrencyLimitStrategy.ENQUEUE),
        schedules=[
            DeploymentScheduleCreate(
                schedule=CronSchedule(cron=s["cron"], timezone=s["timezone"]), slug=s["slug"], active=s["active"]
            )
            for s in wanted["schedules"]
        ],
        **rest,
    )


async def _alert_block(client: PrefectClient, settings: Settings, changes: Changes) -> UUID | None:
    """Block that calls the webhook of the settings, None where there is none."""
    found: Webhook | None = None
    with contextlib.suppress(ValueError):  # there is none yet
        found = await Webhook.aload(ALERT_BLOCK)
    if settings.alert_url is None:
        if found is not None and changes.add(f"removed block webhook/{ALERT_BLOCK}"):
            await Webhook.adelete(ALERT_BLOCK)
        return None
    wanted = Webhook(url=settings.alert_url, headers=SecretDict({"Content-Type": "application/json"}))
    if not _same_calls(found, wanted) and changes.add(f"set block webhook/{ALERT_BLOCK}"):
        await wanted.save(ALERT_BLOCK, overwrite=True)
    try:
        document = await client.read_block_document_by_name(ALERT_BLOCK, "webhook")
    except ObjectNotFound:
        return None
    return document.id


def _same_calls(found: Webhook | None, wanted: Webhook) -> bool:
    if found is None:
        return False
    return (found.url, found.headers.get_secret_value()) == (wanted.url, wanted.headers.get_secret_value())


async def _automations(
    client: PrefectClient, declared: Declared, block: UUID | None, products: list[str], changes: Changes
) -> None:
    everything = await _all(lambda n, skip: client.read_automations(limit=n, offset=skip))
    ours = [a for a in everything if a.name.startswith(f"{MARK}: ")]
    there = {a.name: a for a in reversed(ours)}
    wanted = {w.name: w for a in declared.automations for w in _expanded(a, block, products)}
    for name, automation in wanted.items():
        found = there.get(name)
        if found is None:
            if changes.add(f"created automation {name!r}"):
                await client.create_automation(automation)
            continue
        as_switched = automation.model_copy(update={"enabled": found.enabled})  # in the UI, as schedules are
        if _bare(found) != _bare(as_switched) and changes.add(f"changed automation {name!r}"):
            await client.update_automation(found.id, as_switched)
    for other in sorted(ours, key=lambda a: a.name):
        keep = other.name in wanted and other is there[other.name]  # else not declared, or there twice
        if not keep and changes.add(f"removed automation {other.name!r}"):
            await client.delete_automation(other.id)


def _expanded(automation: Automation, block: UUID | None, products: list[str]) -> Iterator[AutomationCore]:
    for product in products if automation.per_product else [""]:

        def filled(text: str, product: str = product) -> str:
            return text.replace("{product}", product)

        trigger = automation.trigger
        related = {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{trigger.tag}"}
        yield AutomationCore(
            name=filled(automation.name),
            description=automation.description,
            enabled=True,
            trigger=EventTrigger(
                posture=Posture[trigger.posture],
                expect=set(trigger.expect),
                after=set(trigger.after),
                match=ResourceSpecification({"prefect.resource.id": filled(trigger.resource)}),
                match_related=ResourceSpecification(related if trigger.tag else {}),
                for_each={"prefect.resource.id"} if trigger.for_each_run else set(),
                threshold=1,
                within=timedelta(seconds=trigger.within_s),
            ),
            actions=[_action(automation, filled(automation.message), block)],
        )


def _action(automation: Automation, message: str, block: UUID | None) -> Any:
    if automation.action == "crash":
        return ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message=message)
    if block is None:
        return DoNothing()
    return CallWebhook(block_document_id=block, payload=alert_payload(message))


def alert_payload(message: str) -> str:
    """Template of the JSON that an alert posts; its text is quoted after it is filled, for runs say anything."""
    return f'{{% set text %}}stsr: {message}{{% endset %}}{{"text": {{{{ text | tojson }}}} }}'


def _bare(automation: AutomationCore) -> Any:
    """What makes an automation, without what the server adds."""
    trigger = automation.trigger
    assert isinstance(trigger, EventTrigger)
    return _plain([
        automation.description,
        automation.enabled,
        trigger.posture.value, sorted(trigger.expect), sorted(trigger.after), sorted(trigger.for_each),
        trigger.threshold, trigger.within.total_seconds(),
        _labels(trigger.match),
        _labels(trigger.match_related),
        [action.model_dump(mode="json", exclude_none=True) for action in automation.actions],
    ])  # fmt: skip


def _labels(specification: Any) -> Any:
    return specification.model_dump() if isinstance(specification, ResourceSpecification) else specification


async def _remember(release: Release, changes: Changes) -> None:
    if await deployed() != release and changes.add(f"set variable {RELEASE} to {release.reference}"):
        await Variable.aset(RELEASE, release.model_dump(), overwrite=True)


def this_release(code: Path | None = None, home: Path | None = None, reference: str | None = None) -> Release:
    """The release that is this very code, or that of a folder."""
    folder = (code or Path(__file__).parents[1]).resolve()
    return Release(reference=reference or "working tree", code=str(folder), home=str((home or Path.cwd()).resolve()))
