"""The nightly flow: what is new at a product's source becomes its next published version."""

from __future__ import annotations

import logging
from functools import partial

from prefect import flow

from flows.jobs import jobs
from flows.log import event
from flows.parameters import ALL, CatalogFile, Destination, Members, ProductName
from flows.stages import show_plan, stage
from flows.tasks import Job, generate_ensemble
from flows.versions import NewVersion, conclude, prepare, summarise
from stsr_core.ensemble.cluster import Cluster
from stsr_core.errors import OperatorError
from stsr_core.events import about
from stsr_core.settings import Settings


@flow(name="nightly", flow_run_name="nightly {product}", validate_parameters=True)
def nightly(
    product: ProductName = ALL,
    force: bool = False,
    members: Members = None,
    catalog_file: CatalogFile = None,
    destination: Destination = None,
) -> list[NewVersion]:
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
        except Exception as e:  # whatever it is, the other products have their night
            event("failed", level=logging.ERROR, product=job.name, why=e)
            failed[job.name] = e
        else:
            published += [result] if result is not None else []
    summarise("nightly", [job.name for job in todo], published, failed)
    if failed:
        first, *_ = failed.values()
        if len(todo) == 1:
            raise first
        problems = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise OperatorError(f"{len(failed)} of {len(todo)} products failed. {problems}") from first
    return published


def _publish_next(job: Job, settings: Settings, *, force: bool) -> NewVersion | None:
    begun = prepare(job, settings, force=force)
    if begun is None:
        return None
    plan, show = begun.plan, partial(show_plan, job.name, begun.plan, begun.found, settings)
    cluster = Cluster(settings.scheduler_address, settings.device, settings.workers, settings.precision)
    stage(generate_ensemble, job.name)(plan, begun.checkpoints, begun.attempt, cluster, show)
    return conclude(begun)
