"""One Prefect task per stage: call stsr_core, log, return. Workers on the cluster never call Prefect.

How often and how long each is tried is said in stages.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from flows import artifacts
from flows.attempts import owner
from flows.log import event, shards_to_stderr
from stsr_core.catalog.changes import changes
from stsr_core.catalog.checkpoints import publish_checkpoint
from stsr_core.catalog.claims import release, require_claim
from stsr_core.catalog.items import Description, Entries, Provenance, SideFile
from stsr_core.catalog.publish import GROUPS, Attempt, Publication, Published, RedundantError, publish, quality_json
from stsr_core.catalog.reconcile import reconcile
from stsr_core.catalog.search import newest, published
from stsr_core.checkpoint import Library
from stsr_core.configuration import Product, Source, Static, TargetGrid
from stsr_core.downscaler import Downscaler, choose_device
from stsr_core.ensemble import product
from stsr_core.ensemble.cluster import Cluster
from stsr_core.ensemble.downscale import ARRAY, layout_of
from stsr_core.ensemble.generate import Target, generate, remaining
from stsr_core.ensemble.plan import Plan, Shard
from stsr_core.errors import PublicationError, SourceError
from stsr_core.factors import Match
from stsr_core.progress import progress_bar
from stsr_core.regrid import native_factor, reach
from stsr_core.settings import Settings
from stsr_core.sources.cube import Cube
from stsr_core.sources.harmonise import Reading, find, negatives_of
from stsr_core.sources.location import located
from stsr_core.sources.open import fingerprint, open_dataset
from stsr_core.sources.remote import shown
from stsr_core.statics import StaticSource
from stsr_core.store.coarse import write_coarse
from stsr_core.store.group import finish, is_whole, open_array, remove_store, reopen
from stsr_core.store.layout import amounts_of, create_ensemble, shard_path
from stsr_core.store.overview import write_overview
from stsr_core.store.pictures import cog, summary, thumbnail
from stsr_core.store.quicklook import quicklook, wettest_step
from stsr_core.store.receipts import read_receipts
from stsr_core.store.series import write_series
from stsr_core.store.verify import Expected, GateReport, Stored, verify
from stsr_core.version import code_version


@dataclass(frozen=True)
class Job:
    """One product of one night: what catalog.yaml says, and where it goes."""

    name: str
    product: Product
    source: Source
    target: TargetGrid
    base: Path
    destination: str
    options: Mapping[str, object] = field(repr=False)
    source_options: Mapping[str, object] = field(default_factory=dict, repr=False)
    statics: Mapping[str, StaticSource] = field(default_factory=dict, repr=False)
    static_entries: Mapping[str, Static] = field(default_factory=dict)

    def entries(self, statics: Iterable[str]) -> Entries:
        """Entries of catalog.yaml that it is made by, with those of the static fields named; no credentials."""
        fields = {name: self.static_entries[name] for name in statics if name in self.static_entries}
        return Entries(
            product=self.product,
            source=_public(self.source),
            grid=self.target,
            statics={name: _public(entry) for name, entry in fields.items()},
        )


Entry = TypeVar("Entry", Source, Static)


def _public(entry: Entry) -> Entry:
    """The entry without the credentials that its URL may hold."""
    return entry.model_copy(update={"url": shown(entry.url)})


@dataclass(frozen=True)
class New:
    """Something to do.

    Attributes:
        fingerprint: of the source, as it was read.
        after: newest version there is, "" where there is none.
    """

    fingerprint: str
    after: str


@task(name="resolve", cache_policy=NO_CACHE)
def resolve(job: Job, library: Library, settings: Settings, *, force: bool) -> New | None:
    """Look whether there is something to do: a new source, or another way to make it; None if there is not.

    A withdrawn version counts: the same source would make the same again. With `force` the last version is not
    compared, so that one whose item is damaged is got past.
    """
    found = fingerprint(job.source.url, base=job.base, storage_options=_source_options(job))
    url = shown(job.source.url)
    if force:
        there = published(job.name, job.destination, storage_options=job.options)
        event("forced", source=url, after=there[-1] if there else None)
        return New(found, there[-1] if there else "")
    last = newest(job.name, job.destination, storage_options=job.options)
    before = last.version if last is not None else None
    if last is None or last.item["properties"].get("stsr:source_fingerprint") != found:
        event("new_source", source=url, fingerprint=found[:12], after=before)
    elif changed := _changes(job, last.item["properties"], library, settings.match_limit):
        event("made_otherwise", changed=",".join(changed), after=before)
    else:
        event("nothing_new", source=url, version=before)
        return None
    return New(found, before or "")


def _changes(job: Job, properties: Mapping[str, Any], library: Library, limit: float) -> list[str]:
    """What catalog.yaml or the checkpoints would make otherwise than the version whose item says `properties`."""
    statics = properties.get("stsr:statics", {})
    prints = {name: job.statics[name].fingerprint for name in statics if name in job.statics}
    return changes(properties, job.entries(statics), prints, library, limit)


Days = tuple[date, date] | None  # the first and the last day of a source that are wanted, None for all


@contextmanager
def _found(job: Job, days: Days) -> Iterator[Reading]:
    source = job.source
    with open_dataset(source.url, base=job.base, storage_options=_source_options(job)) as dataset:
        yield find(dataset, source.variable, source.declared, near=reach(job.target), days=days)


@task(name="read", cache_policy=NO_CACHE)
def read(job: Job, days: Days = None) -> Reading:
    """Find what the source holds near the target; its values are read when they are regridded."""
    with _found(job, days) as reading:
        event("read", steps=reading.times.size, step=reading.times.step)
    return reading


@task(name="match", cache_policy=NO_CACHE)
def match(source: Reading, target: TargetGrid, library: Library, limit: float) -> Match:
    """Match the factor that the source would need to the nearest one that is served."""
    space, time = native_factor(source, target)
    found = library.family.nearest(space, time, limit=limit)
    event("matched", needed=f"({space:.2f},{time:.2f})", factor=found.factor, log_distance=found.distance)
    return found


@task(name="regrid", cache_policy=NO_CACHE)
def to_lattice(job: Job, found: Match, days: Days = None) -> tuple[tuple[Cube, ...], str]:
    """Read the source and regrid it conservatively onto the coarse lattice of the matched factor, block by block.

    Returns:
        A cube for each driving member, and the fingerprint of the source that they were read from.

    Raises:
        SourceError: the source cannot be read, or was rewritten meanwhile.
    """
    url, options = job.source.url, _source_options(job)
    before = fingerprint(url, base=job.base, storage_options=options)
    with _found(job, days) as reading:
        cubes = product.to_lattice(reading, job.target, found.factor)
    if fingerprint(url, base=job.base, storage_options=options) != before:
        raise SourceError(f"{shown(url)} changed while it was read. Run again when its producer has finished.")
    lattice = cubes[0]
    rows, columns = lattice.grid.shape
    event(
        "regridded", rows=rows, columns=columns, km=lattice.grid.x.step / 1000, step=lattice.times.step,
        driving_members=len(cubes), negatives_set_to_zero=sum(map(negatives_of, cubes)),
    )  # fmt: skip
    return cubes, before


@task(name="plan", cache_policy=NO_CACHE)
def make_plan(cubes: tuple[Cube, ...], found: Match, library: Library, job: Job, settings: Settings) -> Plan:
    """Plan the shards."""
    plan = product.plan_product(cubes, found, library, job.product, job.statics)
    cost = product.Cost.of(plan, settings.device_rate)
    members, steps, rows, columns = plan.fine_shape
    event(
        "planned", members=members, steps=steps, rows=rows, columns=columns, shards=cost.shards, dry=cost.dry,
        windows_skipped=cost.skipped, evaluations=cost.evaluations, device_hours=cost.device_hours,
    )  # fmt: skip
    if doubt := plan.strange(library.serving(found.factor).card):
        event("strange_grid", level=logging.WARNING, why=doubt)
    return plan


@task(name="generate", cache_policy=NO_CACHE)
def generate_ensemble(
    plan: Plan, library: Library, attempt: Attempt, cluster: Cluster, show: Callable[[int], None]
) -> None:
    """Generate all shards on the cluster, then what readers get beside them: series, overview and coarse totals.

    A retry, or a run that goes on with a dead one's attempt, makes what is missing; `show` is told how many shards.
    """
    todo = missing(plan, attempt)
    show(len(todo))
    if todo:
        make_shards(plan, todo, library, attempt, cluster)
    complete(plan, attempt)


def missing(plan: Plan, attempt: Attempt) -> list[Shard]:
    """Write an ensemble's metadata unless it is whole, and return the shards that are missing; then it is not whole."""
    options, url = attempt.documents.options, attempt.group_url("ensemble")
    whole = is_whole(url, options)
    if not whole:
        create_ensemble(url, layout_of(plan), array=ARRAY, options=options)
    shards = remaining(plan, Target(url, ARRAY, options))
    if whole and shards:
        reopen(url, options)
    return shards


def make_shards(plan: Plan, shards: Sequence[Shard], library: Library, attempt: Attempt, cluster: Cluster) -> None:
    """Make shards of a plan on the cluster, with progress in the log and in the UI."""
    configuration = plan.recipe.served.configuration
    factor = configuration.factor
    loaded = Downscaler.load(library.serving(factor), factor, choose_device("cpu"))
    downscaler = loaded.told(configuration.spacing_km)
    target = Target(attempt.group_url("ensemble"), ARRAY, attempt.documents.options)
    total, key = sum(plan.evaluations(shard) for shard in shards), artifacts.key_of("progress", attempt.product)
    with (
        shards_to_stderr(),
        cluster.client() as client,
        progress_bar("network evaluations", total) as advance,
        artifacts.live_progress(
            key, total, f"Progress of {attempt.product}: shards {len(shards)}, network evaluations {total}"
        ) as show,
    ):

        def progress(steps: int, seconds: float) -> None:
            advance(steps, seconds)
            show(steps, seconds)

        generate(plan, shards, downscaler, target, client, cluster, progress=progress)


def complete(plan: Plan, attempt: Attempt) -> None:
    """Close the ensemble and write what readers get beside it, as far as it is not there."""
    layout, options = layout_of(plan), attempt.documents.options
    ensemble, series, overview, coarse = (attempt.group_url(group) for group in GROUPS)
    begun = not is_whole(ensemble, options)
    lacking = {url for url in (series, overview, coarse) if not is_whole(url, options)}
    if begun:
        lacking |= {series, overview}  # which may be of an ensemble that a shard was lost of
    for url in lacking:
        remove_store(url, options)
    if begun:
        finish(ensemble, layout.attributes, options)
    if series in lacking:
        write_series(ensemble, ARRAY, series, layout, options)
    if overview in lacking:
        write_overview(ensemble, ARRAY, overview, layout, options)
    if coarse in lacking:
        amounts, labels = [c.amount for c in plan.cubes], _labels(plan)
        write_coarse(coarse, amounts, plan.cube.times, plan.cube.grid, layout.attributes, options, labels)


def _labels(plan: Plan) -> tuple[str, ...]:
    """Labels of the driving members; () where the source is no ensemble."""
    return tuple(cube.driving for cube in plan.cubes if cube.driving)


@task(name="verify", cache_policy=NO_CACHE)
def check(plan: Plan, attempt: Attempt, product: Product) -> GateReport:
    """Pass the gates over the receipts and the stored bytes; raises if one fails."""
    options = attempt.documents.options
    expected = [
        Expected(t.shard.key, t.shard.region(plan.space, plan.time), t.digest, t.shard.driving) for t in plan.tasks()
    ]
    measured = plan.recipe.served.measured_here
    stored = Stored(
        attempt.group_url("ensemble"),
        ARRAY,
        plan.recipe.served.configuration.factor,
        [cube.amount for cube in plan.cubes],
        product.members,
        product.conserve,
        options,
        measured.scores,
        measured.statistics,
    )
    report = verify(stored, expected, read_receipts(attempt.group_url("ensemble"), ARRAY, options), product.gates)
    attempt.write_side_file("quality.json", quality_json(report), "application/json", "Quality report", "metadata")
    for gate in report.gates:
        event("gate", gate=gate.name, passed=gate.passed, found=gate.found, needed=gate.needed)
    rows = [{**gate.model_dump(exclude={"passed"}), "passed": "yes" if gate.passed else "NO"} for gate in report.gates]
    failed = [gate.name for gate in report.gates if not gate.passed]
    verdict = f"FAILED {', '.join(failed)}" if failed else f"all {len(rows)} passed"
    artifacts.table(artifacts.key_of("gates", attempt.product), rows, f"Gates of {attempt.product}: {verdict}")
    report.raise_if_failed()
    return report


@task(name="publish", cache_policy=NO_CACHE)
def publish_version(
    job: Job, plan: Plan, found: Match, new: New, library: Library, attempt: Attempt, report: GateReport
) -> tuple[Published, str] | None:
    """Draw the pictures, publish the attempt and clean what crashes left.

    Returns:
        The version and its quick look; None where another run has published the same meanwhile.
    """
    publication = Publication(
        _description(job),
        layout_of(plan),
        _provenance(job, plan, found, new.fingerprint, library),
        report,
        _side_files(job, plan, attempt, report),
        publish_checkpoint(attempt.documents, library.serving(found.factor)),
        _shard_digests(plan, attempt),
        new.after,
    )
    require_claim(attempt, owner())
    documents = attempt.documents
    try:
        published = publish(attempt, publication)
    except RedundantError as e:
        event("published_meanwhile", why=e)
        documents.remove(attempt.prefix)
        release(attempt)
        return None
    release(attempt)
    event("published", version=published.version, item=published.item_url)
    _clean(attempt)
    return published, f"{attempt.url}/quicklook.png"


def _clean(attempt: Attempt) -> None:
    """Remove what crashes left; what cannot be removed is no reason to call a run failed that has published."""
    documents = attempt.documents
    try:
        removed = reconcile(
            documents.destination, attempt.product, documents.options, sole_publisher=documents.sole_publisher
        )
    except PublicationError as e:
        event("not_reconciled", level=logging.WARNING, why=e)
        return
    if removed:
        event("reconciled", removed=",".join(removed))


def _description(job: Job) -> Description:
    product, source = job.product, job.source
    return Description(
        job.name, product.title, product.description, source.license, source.attribution, product.keywords
    )


def _side_files(job: Job, plan: Plan, attempt: Attempt, report: GateReport) -> dict[str, SideFile]:
    bands = summary(attempt.group_url("overview"), attempt.documents.options)
    tiff = "image/tiff; application=geotiff; profile=cloud-optimized"
    picture, small = _picture(job, plan, attempt), thumbnail(bands[0], plan.fine_grid)
    write = attempt.write_side_file
    return {
        "quality": write("quality.json", quality_json(report), "application/json", "Quality report", "metadata"),
        "map": write("map.tif", cog(bands, plan.fine_grid), tiff, "Maps of the ensemble mean", "overview", "data"),
        "thumbnail": write("thumbnail.png", small, "image/png", "Total of the period", "thumbnail"),
        "quicklook": write("quicklook.png", picture, "image/png", "Quick look", "overview", "visual"),
    }


def _shard_digests(plan: Plan, attempt: Attempt) -> dict[str, str]:
    """Digests of the shards by their receipts, by path below the attempt."""
    receipts = read_receipts(attempt.group_url("ensemble"), ARRAY, attempt.documents.options)
    shape = layout_of(plan).shard
    return {
        shard_path("data.zarr/ensemble", ARRAY, shape, shard.region(plan.space, plan.time)): receipts[
            shard.key
        ].bytes_digest
        for shard in plan.shards
    }


def _source_options(job: Job) -> Mapping[str, object]:
    return job.source_options if located(job.source.url, job.base).startswith("s3://") else {}


def _provenance(job: Job, plan: Plan, found: Match, digest: str, library: Library) -> Provenance:
    configuration = plan.recipe.served.configuration
    checkpoint = library.serving(configuration.factor)
    return Provenance(
        source_url=shown(job.source.url),
        source_fingerprint=digest,
        source_attribution=job.source.attribution,
        source_license=job.source.license,
        requested_factor=(round(found.requested_space, 4), round(found.requested_time, 4)),
        factor=(found.factor.space, found.factor.time),
        spacing_km=configuration.spacing_km,
        match_distance=round(found.distance, 6),
        beta=configuration.beta,
        noise=configuration.correlation.model_dump(),
        context_length=configuration.context_length,
        conservation=configuration.conservation.model_dump(),
        conserved=plan.recipe.conserve,
        checkpoint=checkpoint.card.name,
        checkpoint_digest=checkpoint.digest,
        network_evaluations=plan.recipe.served.evaluations,
        code_version=code_version(),
        seed=plan.recipe.seed,
        members=plan.fine_shape[0],
        driving_members=_labels(plan),
        scores=plan.recipe.served.measured_here.scores,
        statics={static.name: job.statics[static.name].fingerprint for static in checkpoint.card.statics},
        configuration=job.entries(static.name for static in checkpoint.card.statics),
    )


def _picture(job: Job, plan: Plan, attempt: Attempt) -> bytes:
    coarse = np.mean([cube.amount for cube in plan.cubes], axis=0)
    step = wettest_step(coarse)
    fine = step * plan.time
    array = open_array(attempt.group_url("ensemble"), ARRAY, attempt.documents.options, mode="r")
    ensemble = amounts_of(np.asarray(array[:, fine]))
    stamp = np.datetime_as_string(plan.fine_times.labels[fine], "m") if plan.fine_times.labels.dtype != object else ""
    return quicklook(
        coarse[step] / plan.time,
        ensemble,
        title=f"{job.product.title}: {stamp or plan.fine_times.labels[fine]}",
        km_per_cell=abs(plan.fine_grid.x.step) / 1000,
    )
