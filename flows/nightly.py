"""The nightly flow: what is new at a product's source becomes its next published version."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

from prefect import flow
from pydantic import BaseModel

from flows import artifacts
from flows.attempts import begin
from flows.jobs import jobs
from flows.log import event
from flows.parameters import ALL, CatalogFile, Destination, Members, ProductName
from flows.stages import show_plan, show_published, stage
from flows.tasks import (
    Job,
    check,
    generate_ensemble,
    make_plan,
    match,
    publish_version,
    read,
    resolve,
    to_lattice,
)
from stsr_core.checkpoint import Library
from stsr_core.ensemble.cluster import Cluster
from stsr_core.errors import OperatorError, StsrError
from stsr_core.events import about
from stsr_core.settings import Settings


class NightlyResult(BaseModel):
    """What a nightly run published."""

    product: str
    version: str
    item: str
    quicklook: str


@flow(name="nightly", flow_run_name="nightly {product}", validate_parameters=True)
def nightly(
    product: ProductName = ALL,
    force: bool = False,
    members: Members = None,
    catalog_file: CatalogFile = None,
    destination: Destination = None,
) -> list[NightlyResult]:
    """Publish the next version of each product whose source, configuration or checkpoint has changed.

    A product that fails does not keep the others from being published; the run fails in the end and names it.

    Args:
        product: name of a product in catalog.yaml, or "all".
        force: publish though nothing has changed since the last version.
        members: number of members, of each driving member; without it that of the product.
        catalog_file: catalog.yaml to use; without it the one of the settings.
        destination: folder or bucket of the catalogue; without it the one of the settings.

    Returns:
        What was published; empty where nothing is new.
    """
    settings = Settings()
    todo = jobs(product, settings, catalog_file=catalog_file, destination=destination, members=members)
    published, failed = [], {}
    for job in todo:
        try:
            with about(product=job.name):
                result = _publish_next(job, settings, force=force)
        except StsrError as e:
            if len(todo) == 1:
                raise
            event("failed", level=logging.ERROR, product=job.name, why=e)
            failed[job.name] = str(e)
        else:
            published += [result] if result is not None else []
    _summarise([job.name for job in todo], published, failed)
    if failed:
        problems = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise OperatorError(f"{len(failed)} of {len(todo)} products failed. {problems}")
    return published


def _publish_next(job: Job, settings: Settings, *, force: bool) -> NightlyResult | None:
    name, library = job.name, Library.open(settings.checkpoints)
    new = stage(resolve, name)(job, library, settings, force=force)
    if new is None:
        return None
    found = stage(match, name)(stage(read, name)(job), job.target, library, settings.match_limit)
    lattice, fingerprint = stage(to_lattice, name)(job, found)
    new = replace(new, fingerprint=fingerprint)
    plan = stage(make_plan, name)(lattice, found, library, job, settings)
    attempt = begin(job, plan, new.fingerprint, after=new.after, sole_publisher=settings.sole_publisher)
    if attempt is None:
        event("published_meanwhile")
        return None
    cluster = Cluster(settings.scheduler_address, settings.device, settings.workers, settings.precision)
    stage(generate_ensemble, name)(plan, library, attempt, cluster, partial(show_plan, name, plan, found, settings))
    report = stage(check, name)(plan, attempt, job.product)
    made = stage(publish_version, name)(job, plan, found, new, library, attempt, report)
    if made is None:
        return None
    version, picture = made
    show_published(job, version, picture)
    return NightlyResult(product=version.product, version=version.version, item=version.item_url, quicklook=picture)


def _summarise(names: list[str], published: list[NightlyResult], failed: dict[str, str]) -> None:
    versions = {result.product: result for result in published}
    rows: list[dict[str, str | int | float]] = [
        {
            "product": name,
            "outcome": "published" if name in versions else "failed" if name in failed else "nothing new",
            "version": versions[name].version if name in versions else "",
            "detail": versions[name].item if name in versions else failed.get(name, ""),
        }
        for name in names
    ]
    artifacts.table("nightly", rows, "What this run did")
