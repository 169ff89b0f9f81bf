"""The backfill flow: a long period in pieces, between nightly runs, published as a product of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import httpx
from prefect import flow, get_client, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.concurrency.sync import concurrency
from prefect.exceptions import PrefectException

from flows import artifacts
from flows.jobs import jobs
from flows.log import event
from flows.parameters import CatalogFile, Destination, Members, Order, Period, Pieces, ProductName, PublishAs
from flows.stages import HOUR_S, patient, show_plan
from flows.tasks import Job, complete, make_shards, missing
from flows.versions import Begun, NewVersion, conclude, prepare, summarise
from stsr_core.configuration import Configuration, choose_catalog
from stsr_core.ensemble.cluster import Cluster
from stsr_core.errors import ConfigurationError
from stsr_core.events import about
from stsr_core.settings import Settings

if TYPE_CHECKING:
    from stsr_core.ensemble.plan import Plan, Shard

LIMIT = "stsr-backfill"  # global concurrency limit: pieces of all backfills that run at a time
PATIENCE_S = 6 * HOUR_S  # seconds that a piece waits for nightly runs, at most
LOOK_EVERY_S = 15.0
SHOWN = 100  # pieces in the table that is written after each: all of many would fill the database
LEASE_S = 60.0  # seconds after which the slot of a killed backfill is free again


@dataclass(frozen=True)
class Piece:
    """Shards of some days that are made together."""

    name: str
    keys: frozenset[str]


@flow(name="backfill", flow_run_name="backfill {product} {period}", validate_parameters=True)
def backfill(
    product: ProductName,
    period: Period,
    pieces: Pieces = Pieces(),  # noqa: B008  it is frozen
    members: Members = None,
    publish_as: PublishAs = None,
    catalog_file: CatalogFile = None,
    destination: Destination = None,
) -> NewVersion | None:
    """Make a period of a product in pieces and publish it as a product of its own; the nightly one stays as it is.

    The same parameters again go on where a run was interrupted. Nightly runs pass before each piece.

    Args:
        product: name of a product in catalog.yaml.
        period: days to make.
        pieces: how the period is cut, in which order, and how fast it goes.
        members: number of members, of each driving member; without it that of the product.
        publish_as: name to publish under, not that of a product in catalog.yaml; without it the product's name and the
            period.
        catalog_file: catalog.yaml to use; without it the one of the settings.
        destination: folder or bucket of the catalogue; without it the one of the settings.

    Returns:
        What was published, None where this very version is published already.

    Raises:
        ConfigurationError: a nightly product has the name to publish under.
    """
    settings = Settings()
    job = jobs(product, settings, catalog_file=catalog_file, destination=destination, members=members)[0]
    named = _named(job, publish_as, period)
    _require_apart(named.name, period, Configuration.load(choose_catalog(catalog_file or settings.catalog_file)))
    with about(product=named.name):
        begun, made = prepare(named, settings, force=True, days=(period.first, period.last), once=True), None
        if begun is not None:
            _make_all(begun, pieces, settings)
            made = conclude(begun)
    summarise("backfill", [named.name], [made] if made is not None else [], {})
    return made


@task(name="piece", cache_policy=NO_CACHE)
def make_piece(work: Begun, shards: list[Shard], cluster: Cluster) -> None:
    """Make the shards of a piece that are not done yet."""
    make_shards(work.plan, shards, work.checkpoints, work.attempt, cluster)


@task(name="complete", cache_policy=NO_CACHE)
def complete_ensemble(work: Begun) -> None:
    """Close the ensemble and write what readers get beside it."""
    complete(work.plan, work.attempt)


def _make_all(work: Begun, pieces: Pieces, settings: Settings) -> None:
    plan, name = work.plan, work.job.name
    cluster = Cluster(settings.scheduler_address, settings.device, pieces.workers, settings.precision)
    todo = missing(plan, work.attempt)
    show_plan(name, plan, work.found, settings, len(todo))
    cut = list(cut_pieces(plan, pieces.days, pieces.order))
    for number, piece in enumerate(cut, 1):
        shards = [shard for shard in todo if shard.key in piece.keys]
        if shards:
            _let_nightly_pass()
            with concurrency(LIMIT, lease_duration=LEASE_S):
                patient(make_piece, f"piece {piece.name} of {name}", hours=168)(work, shards, cluster)
            time.sleep(pieces.pause_s if number < len(cut) else 0)
        _show_pieces(name, cut, number)
    patient(complete_ensemble, f"complete {name}", hours=24)(work)


def _show_pieces(name: str, pieces: list[Piece], done: int) -> None:
    first = max(0, done - SHOWN)
    rows: list[dict[str, str | int | float]] = [
        {"piece": piece.name, "shards": len(piece.keys), "done": "yes" if i < done else ""}
        for i, piece in enumerate(pieces[first : first + SHOWN], first)
    ]
    artifacts.table(artifacts.key_of("pieces", name), rows, f"{done} of {len(pieces)} pieces of {name}")


def cut_pieces(plan: Plan, days: int, order: Order) -> Iterator[Piece]:
    """Cut a plan into pieces of whole time blocks that span about `days` days, and yield them in order."""
    hours_per_block = plan.block[0] * plan.cube.times.step.total_seconds() / 3600
    blocks = max(1, round(days * 24 / hours_per_block))
    groups: dict[int, list[Shard]] = {}
    for shard in plan.shards:
        groups.setdefault(shard.index[1] // blocks, []).append(shard)
    bounds = plan.cube.times.bounds
    for index in sorted(groups, reverse=order is Order.newest_first):
        shards = groups[index]
        first, last = shards[0].box[0][0], shards[-1].box[0][1] - 1
        name = f"{str(bounds[first, 0])[:10]}..{str(bounds[last, 1])[:10]}"
        yield Piece(name, frozenset(shard.key for shard in shards))


def _named(job: Job, publish_as: str | None, period: Period) -> Job:
    name = publish_as or f"{job.name}-{period.first:%Y%m%d}-{period.last:%Y%m%d}"
    titled = job.product.model_copy(update={"title": f"{job.product.title}, {period.first} to {period.last}"})
    return replace(job, name=name, product=titled)


def _require_apart(name: str, period: Period, configuration: Configuration) -> None:
    if name in configuration.products:
        raise ConfigurationError(
            f"{name} is a product of catalog.yaml; published under its name, {period} alone would be its latest "
            "version. Give another name as publish_as."
        )


def _let_nightly_pass() -> None:
    """Wait while a nightly run is at work; without a server that answers, go on."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until and _nightly_runs():
        event("waits", reason="a nightly run is at work")
        time.sleep(LOOK_EVERY_S)


def _nightly_runs() -> bool:
    """Whether the server knows of one. One without a deployment sends no heartbeats: dead, it would run for ever."""
    running = FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING])
    try:
        with get_client(sync_client=True) as client:
            found = client.read_flow_runs(
                flow_filter=FlowFilter(name=FlowFilterName(any_=["nightly"])),
                flow_run_filter=FlowRunFilter(
                    state=FlowRunFilterState(type=running), deployment_id=FlowRunFilterDeploymentId(is_null_=False)
                ),
                limit=1,
            )
    except (httpx.HTTPError, PrefectException):
        return False
    return bool(found)
