"""The nightly flow: what is new at a product's source becomes its next published version."""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from pydantic import BaseModel

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
from stsr_core.catalog.publish import Attempt
from stsr_core.checkpoint import Library
from stsr_core.configuration import Configuration, choose_catalog
from stsr_core.ensemble.cluster import Cluster
from stsr_core.settings import Settings


class NightlyResult(BaseModel):
    """What a nightly run published."""

    product: str
    version: str
    item: str
    quicklook: str


@flow(name="nightly", flow_run_name="nightly {product}")
def nightly(
    product: str,
    catalog_file: Path | None = None,
    destination: str | None = None,
    force: bool = False,
    members: int | None = None,
) -> NightlyResult | None:
    """Publish the next version of a product if its source has changed.

    Args:
        product: name of a product in catalog.yaml.
        catalog_file: catalog.yaml to use; without it the one of the settings.
        destination: folder or bucket of the catalogue; without it the one of the settings.
        force: publish though the source is the same as that of the last version.
        members: number of members; without it that of the product.

    Returns:
        What was published, None where nothing is new.
    """
    settings = Settings()
    path = choose_catalog(catalog_file or settings.catalog_file)
    configuration = Configuration.load(path)
    wanted = configuration.product(product)
    if members is not None:
        wanted = wanted.model_copy(update={"members": members})
    job = Job(
        name=product,
        product=wanted,
        source=configuration.sources[wanted.source],
        target=configuration.grids[wanted.grid],
        base=path.parent,
        destination=destination or settings.destination,
        options=settings.s3_options if (destination or settings.destination).startswith("s3://") else {},
        source_options=settings.s3_options,
    )
    library = Library.open(settings.checkpoints)
    digest = resolve(job, force=force)
    if digest is None:
        return None
    cube = read(job)
    found = match(cube, job.target, library, settings.match_limit)
    plan = make_plan(to_lattice(cube, job.target, found), found, library, wanted, settings)
    attempt = Attempt.begin(job.destination, product, job.options, sole_publisher=settings.sole_publisher)
    generate_ensemble(plan, library, attempt, Cluster(settings.scheduler_address, settings.device, settings.workers))
    report = check(plan, attempt, wanted)
    published, picture = publish_version(job, plan, found, digest, library, attempt, report)
    return NightlyResult(
        product=published.product, version=published.version, item=published.item_url, quicklook=picture
    )
