"""What nightly runs and backfills have in common: every stage of a version but the making of its shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date

from pydantic import BaseModel

from flows import artifacts
from flows.attempts import begin
from flows.log import event
from flows.stages import show_plan, show_published, stage
from flows.tasks import Job, New, check, make_plan, match, publish_version, read, resolve, to_lattice
from stsr_core.catalog.publish import Attempt
from stsr_core.checkpoint import Library
from stsr_core.ensemble.plan import Plan
from stsr_core.ensemble.product import Cost
from stsr_core.factors import Match
from stsr_core.settings import Settings


class NewVersion(BaseModel):
    """What a run published."""

    product: str
    version: str
    item: str
    quicklook: str


@dataclass(frozen=True)
class Begun:
    """A version that is planned and has a place to go to; its shards are still to be made."""

    job: Job
    new: New
    found: Match
    checkpoints: Library
    plan: Plan
    attempt: Attempt


def prepare(
    job: Job, settings: Settings, *, force: bool, days: tuple[date, date] | None = None, once: bool = False
) -> Begun | None:
    """Run the stages before the shards.

    Args:
        job: the product.
        settings: those of this run.
        force: go on though nothing is new.
        days: first and last day of the source that are made; all without it.
        once: the version is made once only, whatever was published before it.

    Returns:
        None where there is nothing to do.
    """
    name, library = job.name, Library.open(settings.checkpoints)
    new = stage(resolve, name)(job, library, settings, force=force)
    if new is None:
        return None
    found = stage(match, name)(stage(read, name)(job, days), job.target, library, settings.match_limit)
    cubes, fingerprint = stage(to_lattice, name)(job, found, days)
    new = replace(new, fingerprint=fingerprint)
    plan = stage(make_plan, name)(cubes, found, library, job, settings)
    require_affordable(name, plan, found, settings)
    after = "" if once else new.after
    attempt = begin(job, plan, fingerprint, after=after, sole_publisher=settings.sole_publisher)
    if attempt is None:
        event("nothing_new" if once else "published_meanwhile")
        return None
    return Begun(job, new, found, library, plan, attempt)


def require_affordable(name: str, plan: Plan, found: Match, settings: Settings) -> None:
    """Show a plan, then refuse it if it is above the limit of device hours; raises ConfigurationError."""
    show_plan(name, plan, found, settings, len(plan.shards))
    Cost.of(plan, settings.device_rate).check(settings.max_device_hours)


def conclude(begun: Begun) -> NewVersion | None:
    """Run the stages after the shards; None where another run has published the same meanwhile."""
    job, plan, attempt, name = begun.job, begun.plan, begun.attempt, begun.job.name
    report = stage(check, name)(plan, attempt, job.product)
    made = stage(publish_version, name)(job, plan, begun.found, begun.new, begun.checkpoints, attempt, report)
    if made is None:
        return None
    version, picture = made
    show_published(job, version, picture)
    return NewVersion(product=version.product, version=version.version, item=version.item_url, quicklook=picture)


def summarise(key: str, names: list[str], published: list[NewVersion], failed: Mapping[str, Exception]) -> None:
    """Show what became of each product."""
    versions = {result.product: result for result in published}
    rows: list[dict[str, str | int | float]] = [
        {
            "product": name,
            "outcome": "published" if name in versions else "failed" if name in failed else "nothing new",
            "version": versions[name].version if name in versions else "",
            "detail": versions[name].item if name in versions else str(failed.get(name, "")),
        }
        for name in names
    ]
    counts = Counter(row["outcome"] for row in rows)
    artifacts.table(key, rows, "What this run did: " + ", ".join(f"{n} {outcome}" for outcome, n in counts.items()))
