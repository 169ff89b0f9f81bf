"""How the stages run: names that say what runs, timeouts, retries of what may pass, artifacts of what came out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from prefect.events import emit_event

from flows import artifacts
from flows.log import event
from stsr_core.catalog.documents import DamagedError
from stsr_core.ensemble.generate import ShardError
from stsr_core.ensemble.product import Cost
from stsr_core.errors import PublicationError, SourceError, StoreError, StsrError
from stsr_core.settings import Settings
from stsr_core.store.group import read_object

if TYPE_CHECKING:
    from prefect import Task

    from flows.tasks import Job
    from stsr_core.catalog.publish import Published
    from stsr_core.ensemble.plan import Plan
    from stsr_core.factors import Match

P = ParamSpec("P")
R = TypeVar("R")

HOUR_S = 3600
# Seconds after which a stage counts as hung. They bound a fault, not the work: generous multiples of what large
# products take.
TIMEOUT_S = {
    "resolve": HOUR_S,
    "read": 6 * HOUR_S,
    "match": 300,
    "regrid": 6 * HOUR_S,
    "plan": 6 * HOUR_S,
    "generate": 7 * 24 * HOUR_S,
    "verify": 24 * HOUR_S,
    "publish": 6 * HOUR_S,
}
RETRIES = {"resolve": 2, "read": 2, "regrid": 2, "plan": 2, "generate": 1, "verify": 1, "publish": 1}
PASSING = (SourceError, StoreError, PublicationError, ShardError)  # may be gone a moment later


def may_pass(task: Any, run: Any, state: Any) -> bool:
    """Whether a failure may be gone at the next try: networks and disks, but no mistakes of people or code."""
    error = getattr(state.data, "exception", state.data)
    if isinstance(error, StsrError):
        return isinstance(error, PASSING) and not isinstance(error, DamagedError)
    return True


def stage(task: Task[P, R], product: str) -> Callable[P, R]:
    """Return the task of a stage, named after its product, with the stage's timeout and retries."""
    return task.with_options(
        task_run_name=f"{task.name} {product}",
        timeout_seconds=TIMEOUT_S[task.name],
        retries=RETRIES.get(task.name, 0),
        retry_delay_seconds=5,
        retry_condition_fn=may_pass,
    )


def patient(task: Task[P, R], name: str, *, hours: float) -> Callable[P, R]:
    """Return a task under a name, with retries of what may pass and a timeout in hours."""
    return task.with_options(
        task_run_name=name,
        timeout_seconds=hours * HOUR_S,
        retries=2,
        retry_delay_seconds=30,
        retry_condition_fn=may_pass,
    )


def show_plan(product: str, plan: Plan, found: Match, settings: Settings, todo: int) -> None:
    """Table of what is about to be made; `todo` counts the shards that are not done yet."""
    values: dict[str, str | int | float] = {
        "factor needed (space, time)": f"{found.requested_space:.2f}, {found.requested_time:.2f}",
        "factor matched (space, time)": str(found.factor),
        "log distance": round(found.distance, 4),
        "fine spacing told to the networks": f"{plan.recipe.served.configuration.spacing_km} km",
        "driving members": len(plan.cubes),
        "members of each": plan.recipe.members,
        "fine shape (member, time, y, x)": " x ".join(map(str, plan.fine_shape)),
        **dict(Cost.of(plan, settings.device_rate).rows(settings.price_per_device_hour)),
        "shards done before": len(plan.shards) - todo,
        "shards to make": todo,
    }
    shards = f"{todo} of {len(plan.shards)} shards to make"
    artifacts.facts(artifacts.key_of("plan", product), values, f"Plan of {product}: {shards}, factor {found.factor}")


def show_published(job: Job, published: Published, picture_url: str) -> None:
    """Picture, link and event of a new version."""
    name = f"{published.product} {published.version}"
    artifacts.link(
        artifacts.key_of("item", published.product), browsable(published.item_url, job), name, f"Published {name}"
    )
    emit_event(
        event="stsr.version.published",
        resource={"prefect.resource.id": f"stsr.product.{published.product}", "stsr.version": published.version},
        payload={"item": published.item_url},
    )
    try:
        png = read_object(picture_url, job.options)
    except StoreError as e:  # what is published is no failure
        event("not_shown", level=logging.WARNING, product=published.product, why=e)
        return
    artifacts.picture(artifacts.key_of("quicklook", published.product), png, f"Quick look of {name}")


def browsable(url: str, job: Job) -> str:
    """Address that a browser may open: the public one, else s3:// through the endpoint, and folders as file://."""
    settings, endpoint = Settings(), job.options.get("endpoint_url")
    inside = url.removeprefix(settings.destination.rstrip("/") + "/")
    if settings.public_url and inside != url:
        return f"{settings.public_url.rstrip('/')}/{inside}"
    if url.startswith("s3://"):
        return f"{str(endpoint).rstrip('/')}/{url.removeprefix('s3://')}" if endpoint else url
    return Path(url).resolve().as_uri()
