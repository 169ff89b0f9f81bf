"""The maintain flow: remove what crashes left, check what is published, let old versions go."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Annotated

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, Field

from flows import artifacts
from flows.log import event
from flows.parameters import ALL, Destination, ProductName, Retention, Withdrawal
from flows.stages import patient
from stsr_core.catalog.documents import DamagedError
from stsr_core.catalog.integrity import verify_version
from stsr_core.catalog.reconcile import reconcile, unlisted
from stsr_core.catalog.retention import expiring, retire
from stsr_core.catalog.search import find, products, published, withdrawn
from stsr_core.catalog.withdrawal import withdraw
from stsr_core.errors import ConfigurationError, StoreError, StsrError
from stsr_core.settings import Settings

GRACE_H = 7 * 24.0  # a backfill that was interrupted may be resumed for a week


class Upkeep(BaseModel):
    """What a maintain run did to a product."""

    product: str
    removed: list[str]
    retired: list[str]
    checked: list[str]
    flaws: list[str]


@flow(name="maintain", flow_run_name="maintain {product}", validate_parameters=True)
def maintain(
    product: ProductName = ALL,
    grace_hours: Annotated[float, Field(ge=1, le=8760)] = GRACE_H,
    check_newest: Annotated[int, Field(ge=0, le=1000)] = 1,
    retention: Retention | None = None,
    withdrawal: Withdrawal | None = None,
    dry_run: bool = False,
    destination: Destination = None,
) -> list[Upkeep]:
    """Reconcile, check and thin out a catalogue; safe beside runs that publish.

    Args:
        product: name of a published product, or "all": those that left data and never got a version too.
        grace_hours: attempts that wrote nothing for so long are removed.
        check_newest: newest good versions of each product whose every byte is read and compared.
        retention: which superseded versions go; without it all stay.
        withdrawal: a version that must no longer be used, and why; of one product, not of all.
        dry_run: only say what would be done.
        destination: folder or bucket of the catalogue; without it the one of the settings.

    Returns:
        What was done, by product.

    Raises:
        ConfigurationError: a version of no product in particular is to be withdrawn.
        PublicationError: it cannot be withdrawn; nothing else was done.
        StoreError: a published version is damaged, or something could not be done; everything else was done.
    """
    if withdrawal is not None and product == ALL:
        raise ConfigurationError(f"{withdrawal.version} of all products is to be withdrawn. Name the product it is of.")
    settings = Settings()
    where = destination or settings.destination
    names = _everything(where, settings) if product == ALL else [product]
    if withdrawal is not None:
        patient(take_back, f"withdraw {withdrawal.version}", hours=1)(product, where, withdrawal, dry_run=dry_run)
    upkeep = partial(_keep_up, where=where, grace_hours=grace_hours, check_newest=check_newest, retention=retention)
    done = [upkeep(name, dry_run=dry_run) for name in names]
    _show(done, dry_run=dry_run)
    flaws = [flaw for upkeep in done for flaw in upkeep.flaws]
    if flaws:
        raise StoreError(
            f"Flaws found: {len(flaws)}. {'; '.join(flaws[:5])}. Restore objects that are damaged from a backup, or "
            "publish the product again with `force`; mend what kept something from being done, then run maintain again."
        )
    return done


def _everything(where: str, settings: Settings) -> list[str]:
    """Products that the catalogue lists, and those that never got a version but hold data."""
    options = settings.options_of(where)
    beside = unlisted(where, options)
    try:
        return [*products(where, storage_options=options), *beside]
    except StoreError:
        event("nothing_published", catalogue=where)
        return beside


def _keep_up(
    name: str, *, where: str, grace_hours: float, check_newest: int, retention: Retention | None, dry_run: bool
) -> Upkeep:
    """Keep up one product; what cannot be done of it is among its flaws, and keeps nothing else from being done."""
    flaws: list[str] = []
    retired, removed, newest = [], [], []
    with _noting(flaws, f"let go {name}"):
        if retention:
            retired = patient(let_go, f"let go {name}", hours=24)(name, where, retention, dry_run=dry_run)
    with _noting(flaws, f"reconcile {name}"):
        removed = patient(remove_leftovers, f"reconcile {name}", hours=24)(name, where, grace_hours, dry_run=dry_run)
    with _noting(flaws, f"list {name}"):
        options = Settings().options_of(where)
        left_out = {*retired, *withdrawn(name, where, storage_options=options)}
        there = published(name, where, storage_options=options)
        newest = [v for v in there if v not in left_out][::-1][:check_newest]
    for version in newest:
        with _noting(flaws, f"verify {name} {version}"):
            flaws += patient(verify, f"verify {name} {version}", hours=24)(name, version, where)
    return Upkeep(product=name, removed=removed, retired=retired, checked=newest, flaws=flaws)


@contextmanager
def _noting(flaws: list[str], what: str) -> Iterator[None]:
    """Note an error among the flaws, and go on."""
    try:
        yield
    except StsrError as e:
        flaws.append(f"{what} failed: {str(e).rstrip('.')}")


@task(name="withdraw", cache_policy=NO_CACHE)
def take_back(product: str, destination: str, withdrawal: Withdrawal, *, dry_run: bool) -> None:
    """Withdraw a version; readers of `latest` get the newest good one."""
    settings = Settings()
    latest = withdraw(
        product, withdrawal.version, withdrawal.reason, destination, settings.options_of(destination),
        dry_run=dry_run, sole_publisher=settings.sole_publisher,
    )  # fmt: skip
    event("withdrawn", level=logging.WARNING, product=product, version=withdrawal.version, latest=latest or "none")


@task(name="let go", cache_policy=NO_CACHE)
def let_go(product: str, destination: str, retention: Retention, *, dry_run: bool) -> list[str]:
    """Take versions that retention lets go out of the catalogue."""
    settings = Settings()
    options = settings.options_of(destination)
    names = expiring(product, destination, options, keep=retention.keep, age=timedelta(days=retention.days))
    if not dry_run:
        retire(product, names, destination, options, sole_publisher=settings.sole_publisher)
    return names


@task(name="reconcile", cache_policy=NO_CACHE)
def remove_leftovers(product: str, destination: str, grace_hours: float, *, dry_run: bool) -> list[str]:
    """Remove what crashes left, and the data of versions that were let go."""
    settings = Settings()
    return reconcile(
        destination, product, settings.options_of(destination), grace=timedelta(hours=grace_hours), dry_run=dry_run,
        sole_publisher=settings.sole_publisher,
    )  # fmt: skip


@task(name="verify", cache_policy=NO_CACHE)
def verify(product: str, version: str, destination: str) -> list[str]:
    """Read every byte of a version; returns what is wrong."""
    options = Settings().options_of(destination)
    try:
        found = find(product, version, destination, storage_options=options)
        item = found.url.rpartition("/")[2]  # a crash may have left others beside it
        verdict = verify_version(found.folder, options, item_name=item)
    except (StoreError, DamagedError) as e:  # it cannot be checked, nor could it be at another try
        return [f"{product} {version}: {str(e).rstrip('.')}"]
    event("verified", product=product, version=version, objects=verdict.objects, flaws=len(verdict.flaws))
    return [f"{product} {version}: {flaw}" for flaw in verdict.flaws]


def _show(done: list[Upkeep], *, dry_run: bool) -> None:
    rows: list[dict[str, str | int | float]] = [
        {
            "product": upkeep.product,
            "let go": ", ".join(upkeep.retired),
            "leftovers": ", ".join(upkeep.removed),
            "checked": ", ".join(upkeep.checked),
            "flaws": "; ".join(upkeep.flaws) or "none",
        }
        for upkeep in done
    ]
    flaws = sum(len(upkeep.flaws) for upkeep in done)
    artifacts.table("maintain", rows, f"What {'would be' if dry_run else 'was'} done: {flaws or 'no'} flaws found")
