"""Where a run writes: the attempt that a dead run of the same work left, else a fresh one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING
from uuid import UUID

import httpx
from prefect import get_client
from prefect.exceptions import PrefectException
from prefect.runtime import flow_run

from flows.log import event
from stsr_core.catalog.claims import claim, release
from stsr_core.catalog.publish import REMOVING, Attempt, listed_attempts
from stsr_core.ensemble.product import attempt_name

if TYPE_CHECKING:
    from flows.tasks import Job
    from stsr_core.ensemble.plan import Plan


def begin(job: Job, plan: Plan, digest: str, *, after: str, sole_publisher: bool) -> Attempt | None:
    """Begin an attempt at a product's next version, or go on with one.

    An attempt is named by all that determines its bytes and by the version it follows. A run that finds it left by
    a run that is over goes on with it; beside a run that is alive it begins one of its own.

    Args:
        job: the product.
        plan: what is to be made.
        digest: fingerprint of the source.
        after: version that it follows; "" for a version that is made once only.
        sole_publisher: see `Attempt.begin`.

    Returns:
        The attempt; None where this very attempt is published already, as whichever version.
    """
    fresh = Attempt.begin(job.destination, job.name, job.options, sole_publisher=sole_publisher)
    named = replace(fresh, name=attempt_name(plan, digest, after))
    claimed = claim(named, owner(), _is_over)
    found = named.documents.read(f"{job.name}/collection.json")  # after the claim: until then others may publish it
    collection = found[0] if found is not None else {}
    published, going = named.name in listed_attempts(collection), named.name in collection.get(REMOVING, [])
    if claimed and not published and not going:
        return named
    if claimed:
        release(named)
    if published:
        return None
    event("attempt_going" if going else "attempt_taken", attempt=named.name, instead=fresh.name)
    return fresh


def owner() -> str:
    """Name under which this run claims attempts."""
    return str(flow_run.id)


def _is_over(run: str) -> bool:
    """Whether a flow run has ended; one that this server does not know may be at work elsewhere."""
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(run)).state
    except (httpx.HTTPError, PrefectException, ValueError):
        return False
    return state is not None and state.is_final()
