"""Driving the work: shards as plain Dask futures, a receipt for each, only what is missing.

Workers write shard and receipt themselves; the driver sees receipts only. No more than a few shards per
worker are in flight, so memory does not grow with the plan: one is computed, one is packed and written, one waits.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeAlias

import torch
from distributed import Client, Future, KilledWorker, WorkerPlugin, as_completed, get_worker, secede
from distributed.comm.core import CommClosedError

from stsr_core.downscaler import Downscaler, choose_device
from stsr_core.ensemble.cluster import AT_ONCE, RESOURCE, SLOT
from stsr_core.ensemble.shard import ShardResult, make_shard
from stsr_core.errors import ConfigurationError, StoreError, StsrError
from stsr_core.events import line
from stsr_core.memory import keep_freed
from stsr_core.store.group import is_whole, shape_of, whole_shape
from stsr_core.store.layout import write_shard
from stsr_core.store.receipts import Receipt, read_receipt, read_receipts, write_receipt
from stsr_core.store.verify import StoredShard, damaged
from stsr_core.version import code_version

if TYPE_CHECKING:
    from dask.typing import Key
    from distributed import Worker

    from stsr_core.ensemble.cluster import Cluster
    from stsr_core.ensemble.plan import Plan, Shard, ShardTask
    from stsr_core.progress import Advance

WAITING = 1  # shards per worker that are submitted beyond those that it works on
SWITCH_SECONDS = 1e-4  # that a thread that packs holds up those that feed a GPU; Python's 5 ms cost it 7 %
TOLD_S = 0.5  # seconds between messages about progress
WATCHED_S = 30.0  # seconds between looks at whether there are workers
RETRIES = 2  # times that a shard is tried on another worker
_log = logging.getLogger("stsr.shard")


class ShardError(StsrError):
    """A shard that could not be made; the message names it."""


@dataclass(frozen=True)
class Target:
    """The store that shards go to."""

    url: str
    array: str
    options: Mapping[str, object]


class Networks(WorkerPlugin):
    """Readies a worker, once for each checkpoint: how it keeps memory, and the networks on its device."""

    idempotent = True  # another run's is the same: its networks and streams are left as they are

    def __init__(self, digest: str, downscaler: Downscaler, device: str, precision: str) -> None:
        told, self.code = downscaler.served.configuration, code_version()
        self.name = f"stsr-networks-{digest}-{self.code}-{told.factor}-{told.spacing_km}km-{device}-{precision}"
        self.downscaler, self.device, self.precision = downscaler, device, precision
        self.failure: ConfigurationError | None = None

    def setup(self, worker: Worker) -> None:
        """Load them; a worker chooses its device by itself, the driver may have none."""
        keep_freed()
        try:
            self._load(worker.address)
        except ConfigurationError as e:
            self.failure = e  # a worker that comes later can tell only those whose shards it gets
            raise

    def _load(self, address: str) -> None:
        if code_version() != self.code:
            raise ConfigurationError(
                f"Dask worker {address} has stsr {code_version()}, this run {self.code}: receipts would vouch for what "
                "other code made. Install the same on both, and start the workers again."
            )
        self.downscaler = self.downscaler.on(choose_device(self.device), precision=self.precision)
        self.streams: SimpleQueue[torch.cuda.Stream] = SimpleQueue()
        if self.downscaler.device.type == "cuda":
            sys.setswitchinterval(SWITCH_SECONDS)
            for _ in range(AT_ONCE):
                self.streams.put(torch.cuda.Stream(self.downscaler.device))

    @property
    def made_on(self) -> str:
        """Device and precision, on which the last digits of amounts depend."""
        return f"{self.downscaler.device.type} {str(self.downscaler.precision).removeprefix('torch.')}"

    def require_ready(self, kept: str) -> None:
        """Refuse work that this worker cannot do, or not as the shards that are kept were made.

        Raises:
            ConfigurationError: it could not load the networks, or computes in another precision.
        """
        if self.failure:
            raise self.failure
        needed = kept.partition(" ")[2]
        if needed and needed != self.made_on.partition(" ")[2]:
            raise ConfigurationError(
                f"Finished shards were made on {kept}, this worker computes on {self.made_on}: their members would "
                f"not be the same. Set STSR_PRECISION to {needed}, or start over with --overwrite."
            )

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Give a shard its own stream on a GPU, which works for one while the thread of another prepares or waits."""
        if self.downscaler.device.type != "cuda":
            yield
            return
        stream = self.streams.get()
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            self.streams.put(stream)


@dataclass(frozen=True)
class _Run:
    """What all shards of one call have in common.

    Attributes:
        name: of the call, which no other has.
        plugin: name of the worker's plugin.
        target: where they go.
        kept: what other shards of the ensemble were made on, see `Receipt.made_on`; "" where there are none.
    """

    name: str
    plugin: str
    target: Target
    kept: str

    @property
    def topic(self) -> str:
        """Dask's name for the messages about its progress."""
        return f"stsr-progress-{self.name}"


@dataclass(frozen=True)
class _Failed:
    """A shard that could not be made on one worker."""

    worker: str
    error: StsrError


_Outcome: TypeAlias = Receipt | _Failed


def _on_worker(task: ShardTask, run: _Run) -> _Outcome:
    """Make, write and vouch for one shard; runs on a worker, which computes the next while this one is packed."""
    worker = get_worker()
    plugin = worker.plugins[run.plugin]
    assert isinstance(plugin, Networks)
    torch.set_num_threads(1)
    progress = _Progress(worker, run.topic)
    try:
        plugin.require_ready(run.kept)
        with plugin.stream():
            result = make_shard(task, plugin.downscaler, progress)
        progress.tell()
        secede()
        return _written(task, result, run.target, plugin.made_on)
    except StsrError as e:
        return _Failed(worker.address, e)
    except Exception as e:
        _log.exception(line("shard_failed", shard=task.shard.key))
        return _Failed(worker.address, ShardError(f"Shard {task.shard.key} failed: {type(e).__name__}: {e}"))


class _Progress:
    """Tells the driver what a shard's networks have done, every TOLD_S.

    A message for every window kept the driver of two workers busy for 4 % of its time; it may have hundreds.
    """

    def __init__(self, worker: Worker, topic: str) -> None:
        self.worker, self.topic, self.key = worker, topic, worker.get_current_task()
        self.evaluations, self.seconds, self.told = 0, 0.0, time.monotonic()

    def __call__(self, evaluations: int, seconds: float) -> None:
        """Count; raises ShardError when nobody waits for the shard any more."""
        _raise_if_cancelled(self.worker, self.key)
        self.evaluations, self.seconds = self.evaluations + evaluations, self.seconds + seconds
        if time.monotonic() - self.told >= TOLD_S:
            self.tell()

    def tell(self) -> None:
        """Tell the driver what it was not told yet; of shards without rain there is nothing."""
        if self.evaluations or self.seconds:  # a GPU is waited for after its evaluations were counted
            self.worker.log_event(self.topic, (self.evaluations, self.seconds))
        self.evaluations, self.seconds, self.told = 0, 0.0, time.monotonic()


def _raise_if_cancelled(worker: Worker, key: Key) -> None:
    """Stop a shard that nobody waits for any more: Dask itself lets a running task run to its end."""
    state = worker.state.tasks.get(key)
    if state is None or state.state != "executing":
        raise ShardError(f"{key} was cancelled.")


def _written(task: ShardTask, result: ShardResult, target: Target, made_on: str) -> Receipt:
    """Write a shard, then its receipt."""
    factor = task.recipe.served.configuration.factor
    region = task.shard.region(factor.space, factor.time)
    digest = write_shard(target.url, target.array, region, result.quanta, target.options)
    receipt = Receipt(
        shard=task.shard.key,
        plan_digest=task.digest,
        bytes_digest=digest,
        closure_quanta=result.closure_quanta,
        network_evaluations=result.evaluations,
        made_on=made_on,
        **result.counts,
        sums=result.sums,
    )
    write_receipt(target.url, target.array, receipt, target.options)
    return receipt


def _sorted(plan: Plan, target: Target) -> tuple[set[str], list[str]]:
    """Sort the receipts of a store, after reading the bytes that they vouch for.

    Returns:
        Keys of shards that are whole, and keys of shards made from other input, arguments or code. Damaged
        shards are in neither.
    """
    receipts = read_receipts(target.url, target.array, target.options)
    if not receipts:
        return set(), []
    whole, foreign = {}, []
    for shard in plan.shards:
        receipt = receipts.get(shard.key)
        if receipt is None:
            continue
        if receipt.plan_digest == plan.task(shard).digest:
            whole[shard.key] = StoredShard(shard.key, shard.region(plan.space, plan.time), receipt.bytes_digest)
        else:
            foreign.append(shard.key)
    harmed = set(damaged(target.url, target.array, list(whole.values()), target.options))
    return whole.keys() - harmed, foreign


def remaining(plan: Plan, target: Target, *, extend: bool = False) -> list[Shard]:
    """Shards of the plan without a valid receipt or with damaged bytes.

    Args:
        plan: what is to be there.
        target: what is there.
        extend: the store may hold a smaller or shorter ensemble; shards that differ, as they were not full or their
            windows now reach further, are made again.

    Raises:
        StoreError: shards are there that belong to other input, arguments or code.
    """
    kept, foreign = _sorted(plan, target)
    grows = extend and not _is_as_large(plan, target) and (kept or _holds_part(plan, target))
    if foreign and not grows:
        raise StoreError(
            f"{target.url} holds {len(foreign)} shards (first {foreign[0]}) made from other input, arguments or code"
            f"{' and none of this ensemble' if extend and not kept else ''}. Name another output, or start over with "
            "--overwrite."
        )
    return [shard for shard in plan.shards if shard.key not in kept]


def require_made(plan: Plan, target: Target) -> None:
    """Make sure that every shard of a plan is there as its receipt says, before a store is called whole.

    Raises:
        ShardError: some are not.
    """
    lost = remaining(plan, target, extend=True)
    if lost:
        raise ShardError(
            f"{len(lost)} shards of {target.url} (first {lost[0].key}) were lost or damaged while others were made. "
            "Does something else write there? The same command makes them again."
        )


def _is_as_large(plan: Plan, target: Target) -> bool:
    """Whether a store is whole, and of the size of the plan."""
    options = target.options
    return is_whole(target.url, options) and shape_of(target.url, target.array, options) == plan.fine_shape


def _holds_part(plan: Plan, target: Target) -> bool:
    """Whether a store holds the ensemble with fewer members or steps, all of whose shards grow."""
    shape = whole_shape(target.url, target.array, target.options)
    if not shape or any(there > wanted for there, wanted in zip(shape, plan.fine_shape, strict=True)):
        return False
    members, steps = shape[:2]
    before = plan.part(max(1, members // len(plan.cubes)), steps // plan.time)
    if before.fine_shape[:2] != (members, steps) or before.member_block != plan.member_block:
        return False
    receipts = read_receipts(target.url, target.array, target.options)
    there = [shard for shard in before.shards if shard.key in receipts]
    return bool(there) and all(receipts[shard.key].plan_digest == before.task(shard).digest for shard in there)


def generate(
    plan: Plan,
    shards: Sequence[Shard],
    downscaler: Downscaler,
    target: Target,
    client: Client,
    cluster: Cluster,
    *,
    progress: Advance,
) -> None:
    """Make shards of a plan.

    Args:
        plan: what they belong to.
        shards: which to make, see `remaining`.
        downscaler: the plan's networks, on the CPU; workers move their copy to their device.
        target: where shards and receipts go; its metadata is written already.
        client: the cluster's.
        cluster: says device and precision of every worker.
        progress: called with the number of network evaluations just done and the seconds they took, from another
            thread.

    Raises:
        ShardError: a shard failed on every try, or the scheduler went away; shards that were finished stay.
        StoreError: a shard has amounts that the store does not hold, or could not be written, on every try.
        ConfigurationError: no worker of the cluster offers what shards ask for, or those that do have other code,
            no such device, or another precision than finished shards.
    """
    plugin = Networks(plan.recipe.checkpoint_digest, downscaler, cluster.device, cluster.precision)
    client.register_plugin(plugin)
    run = _Run(uuid.uuid4().hex, plugin.name, target, _kept_on(plan, shards, target))
    flight = _Flight(client, (plan.task(shard) for shard in shards), run)
    with _reported(client, run.topic, progress), _watched(flight):
        pool = as_completed(flight.more())
        try:
            for future in pool:
                outcome = _result(future)
                if isinstance(outcome, Receipt):
                    _log.info(_made(outcome))
                pool.update(flight.landed(future.key, outcome))
        except (CancelledError, CommClosedError) as e:
            raise ShardError(
                "The Dask scheduler went away, or cancelled the run. Start it again; the same command goes on with "
                "what is missing."
            ) from e
        finally:
            with suppress(CommClosedError):
                client.cancel(list(pool.futures))


def _kept_on(plan: Plan, shards: Sequence[Shard], target: Target) -> str:
    """What shards of a plan that are not to be made were made on; one says it for all."""
    made = {shard.key for shard in shards}
    kept = next((shard.key for shard in plan.shards if shard.key not in made), "")
    receipt = read_receipt(target.url, target.array, kept, target.options) if kept else None
    return receipt.made_on if receipt else ""


def _result(future: Future[_Outcome]) -> _Outcome:
    """What became of a shard; raises ShardError if it killed its workers."""
    try:
        return future.result()
    except KilledWorker as e:
        raise ShardError(
            f"{future.key} was on {e.allowed_failures + 1} workers when they died. Look for what kills them, most "
            "likely memory; the same command goes on with what is missing."
        ) from e


def _made(receipt: Receipt) -> str:
    return line(
        "shard_made", shard=receipt.shard, evaluations=receipt.network_evaluations, closure=receipt.closure_quanta,
        max_mm=receipt.max_mm,
    )  # fmt: skip


class _Flight:
    """The shards in flight: as many as the cluster of the moment takes, and those that failed once more elsewhere."""

    def __init__(self, client: Client, todo: Iterable[ShardTask], run: _Run) -> None:
        self.client, self.todo, self.run = client, iter(todo), run
        self.tasks: dict[Key, ShardTask] = {}
        self.shunned: dict[str, list[str]] = {}  # by shard, the workers on which it failed

    def more(self) -> list[Future[_Outcome]]:
        """Submit what the cluster takes beside what is in flight."""
        room = range(self._capacity() - len(self.tasks))
        return [self._submit(task) for _, task in zip(room, self.todo, strict=False)]

    def landed(self, key: Key, outcome: _Outcome) -> list[Future[_Outcome]]:
        """Submit what follows a shard: the same once more if it failed, and others; raises what failed too often."""
        task = self.tasks.pop(key)
        if isinstance(outcome, Receipt):
            self.shunned.pop(task.shard.key, None)
            return self.more()
        shunned = self.shunned.setdefault(task.shard.key, [])
        if len(shunned) == RETRIES:
            raise outcome.error
        shunned.append(outcome.worker)
        _log.warning(line("shard_failed", shard=task.shard.key, worker=outcome.worker, why=outcome.error))
        return [self._submit(task), *self.more()]

    def _submit(self, task: ShardTask) -> Future[_Outcome]:
        shunned = self.shunned.get(task.shard.key, [])
        others = [a for a, offer in self._offers().items() if offer and a not in shunned] if shunned else []
        # Dask takes tasks of one key for the same, whoever submits them: another run would get what this one wrote.
        key = f"shard-{task.shard.key}-{self.run.name[:12]}-{len(shunned)}"
        self.tasks[key] = task
        return self.client.submit(
            _on_worker, task, self.run, resources={RESOURCE: SLOT}, pure=False, key=key, workers=others or None,
            allow_other_workers=bool(others),
        )  # fmt: skip

    def warn(self) -> None:
        """Say so where there is no worker; they may come, or come back, at any time."""
        if not self._offers():
            _log.warning(line("waiting_for_workers", shards=len(self.tasks)))

    def _capacity(self) -> int:
        """Shards that the workers of the moment take; a few where none has come yet, as clusters start late."""
        offers = self._offers()
        if offers and not any(offers.values()):
            raise ConfigurationError(
                f"None of the {len(offers)} Dask workers offers the resource {RESOURCE} that shards need. Start them "
                f"with `dask worker --resources {RESOURCE}=1`."
            )
        return sum(int(offer / SLOT) + WAITING for offer in offers.values() if offer) or WAITING

    def _offers(self) -> dict[str, float]:
        """What each worker offers for shards, by its address."""
        workers = self.client.scheduler_info(n_workers=-1)["workers"]
        return {address: float(w["resources"].get(RESOURCE, 0.0)) for address, w in workers.items()}


@contextmanager
def _watched(flight: _Flight) -> Iterator[None]:
    """Say every WATCHED_S that shards wait for workers, when there are none: their futures would just stay away."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(WATCHED_S):
            with suppress(OSError):  # of a scheduler that went away, which the futures tell
                flight.warn()

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


@contextmanager
def _reported(client: Client, topic: str, progress: Advance) -> Iterator[None]:
    """Pass on what workers log about their network evaluations."""

    def handler(event: tuple[float, tuple[int, float]]) -> None:
        progress(*event[1])

    client.subscribe_topic(topic, handler)
    try:
        yield
    finally:
        client.unsubscribe_topic(topic)
