"""Where a run writes: the attempt that a dead run of the same work left, else a fresh one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING
from uuid import UUID

import httpx
import numpy as np
from prefect import get_client
from prefect.exceptions import PrefectException
from prefect.runtime import flow_run

from flows.log import event
from stsr_core.catalog.claims import claim
from stsr_core.catalog.publish import Attempt
from stsr_core.catalog.search import newest
from stsr_core.version import code_version

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
        The attempt; None where this very attempt has been published meanwhile.
    """
    fresh = Attempt.begin(job.destination, job.name, job.options, sole_publisher=sole_publisher)
    named = replace(fresh, name=_name(plan, digest, after))
    if not claim(named, owner(), _is_over):
        event("attempt_taken", attempt=named.name, instead=fresh.name)
        return fresh
    last = newest(job.name, job.destination, storage_options=job.options)
    return None if last is not None and f"/data/{named.name}/" in last.url else named


def owner() -> str:
    """Name under which this run claims attempts."""
    return str(flow_run.id)


def _name(plan: Plan, digest: str, after: str) -> str:
    """Digest of what the version is made from and by, in 12 hexadecimal digits."""
    bounds = plan.cube.times.bounds
    identity = [
        digest, after, str(bounds[0, 0]), str(bounds[-1, 1]), plan.origin, plan.fine_shape, plan.recipe.identity(),
        plan.task(plan.shards[0]).digest, code_version(),
    ]  # fmt: skip
    name = hashlib.sha256(json.dumps(identity, default=str).encode())
    name.update(np.ascontiguousarray(plan.cube.amount, dtype="<f4").tobytes())
    return name.hexdigest()[:12]


def _is_over(run: str) -> bool:
    """Whether a flow run has ended; one that this server does not know may be at work elsewhere."""
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(run)).state
    except (httpx.HTTPError, PrefectException, ValueError):
        return False
    return state is not None and state.is_final()
