"""Driving the work: shards as plain Dask futures, a receipt for each, only what is missing.

Workers write shard and receipt themselves; the driver sees receipts only. No more than a few shards per
worker are in flight, so memory does not grow with the plan: one is computed, one is written, one waits.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from distributed import Client, Future, KilledWorker, WorkerPlugin, as_completed, get_worker, secede
from distributed.comm.core import CommClosedError

from stsr_core.downscaler import Downscaler, choose_device
from stsr_core.ensemble.cluster import SLOT
from stsr_core.ensemble.shard import Progress, ShardResult, make_shard
from stsr_core.errors import StoreError, StsrError
from stsr_core.events import line
from stsr_core.store.layout import write_shard
from stsr_core.store.receipts import Receipt, read_receipts, write_receipt
from stsr_core.store.verify import StoredShard, damaged

if TYPE_CHECKING:
    from dask.typing import Key
    from distributed import Worker

    from stsr_core.ensemble.plan import Plan, Shard, ShardTask

IN_FLIGHT = 3  # shards per worker that are submitted at a time
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
    """Puts the networks on a worker's device, once per worker and checkpoint."""

    def __init__(self, digest: str, downscaler: Downscaler, device: str) -> None:
        self.name = f"stsr-networks-{digest}-{downscaler.factor}"
        self.downscaler, self.device = downscaler, device

    def setup(self, worker: Worker) -> None:
        """Load them."""
        device = choose_device(self.device)
        for network in (self.downscaler.mean_network, self.downscaler.denoiser):
            network.to(device)
        self.downscaler = replace(self.downscaler, device=device)


@dataclass(frozen=True)
class _Run:
    """What all shards of one call have in common: the worker's plugin, the topic of progress, the store."""

    plugin: str
    topic: str
    target: Target


def _on_worker(task: ShardTask, run: _Run) -> Receipt:
    """Make, write and vouch for one shard; runs on a worker, which goes on with the next while this one is written."""
    worker = get_worker()
    plugin = worker.plugins[run.plugin]
    assert isinstance(plugin, Networks)
    torch.set_num_threads(1)
    key = worker.get_current_task()

    def progress(evaluations: int, seconds: float) -> None:
        _raise_if_cancelled(worker, key)
        worker.log_event(run.topic, (evaluations, seconds))

    try:
        result = make_shard(task, plugin.downscaler, progress)
        secede()
        return _written(task, result, plugin.downscaler, run.target)
    except StsrError:
        raise
    except Exception as e:
        raise ShardError(f"Shard {task.shard.key} failed: {type(e).__name__}: {e}") from e


def _raise_if_cancelled(worker: Worker, key: Key) -> None:
    """Stop a shard that nobody waits for any more: Dask itself lets a running task run to its end."""
    state = worker.state.tasks.get(key)
    if state is None or state.state != "executing":
        raise ShardError(f"{key} was cancelled.")


def _written(task: ShardTask, result: ShardResult, downscaler: Downscaler, target: Target) -> Receipt:
    """Write a shard, then its receipt."""
    region = task.shard.region(downscaler.factor.space, downscaler.factor.time)
    digest = write_shard(target.url, target.array, region, result.quanta, target.options)
    receipt = Receipt(
        shard=task.shard.key,
        plan_digest=task.digest,
        bytes_digest=digest,
        closure_quanta=result.closure_quanta,
        network_evaluations=result.evaluations,
        **result.statistics(),
    )
    write_receipt(target.url, target.array, receipt, target.options)
    return receipt


def done(plan: Plan, target: Target) -> tuple[set[str], list[str]]:
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
        extend: the store may hold a smaller or shorter ensemble; shards that differ are made again.

    Raises:
        StoreError: shards are there that belong to other input, arguments or code.
    """
    kept, foreign = done(plan, target)
    if foreign and not (extend and kept):
        raise StoreError(
            f"{target.url} holds {len(foreign)} shards (first {foreign[0]}) made from other input, arguments or code"
            f"{' and none of this ensemble' if extend else ''}. Name another output, or start over with --overwrite."
        )
    return [shard for shard in plan.shards if shard.key not in kept]


def generate(
    plan: Plan,
    shards: Sequence[Shard],
    downscaler: Downscaler,
    target: Target,
    client: Client,
    *,
    progress: Progress,
    device: Literal["auto", "cpu", "cuda"] | None = None,
) -> None:
    """Make shards of a plan.

    Args:
        plan: what they belong to.
        shards: which to make, see `remaining`.
        downscaler: the plan's networks, on the CPU; workers move their copy to their device.
        target: where shards and receipts go; its metadata is written already.
        client: the cluster.
        progress: called with the number of network evaluations just done and the seconds they took, from another
            thread.
        device: what the workers use, which may have GPUs where this process has none; without it a device of the kind
            that the downscaler is on.

    Raises:
        ShardError: a shard failed on every try, or the scheduler went away; shards that were finished stay.
    """
    todo = (plan.task(shard) for shard in shards)
    chosen = device or ("auto" if downscaler.device.type == "cuda" else "cpu")
    plugin = Networks(plan.recipe.checkpoint_digest, downscaler, chosen)
    client.register_plugin(plugin)
    run = _Run(plugin.name, f"stsr-progress-{uuid.uuid4().hex}", target)
    with _reported(client, run.topic, progress):
        submitted = _submitted(client, todo, run)
        pool = as_completed(next(submitted, ()))
        try:
            for future in pool:
                _log.info(_made(_result(future)))
                for more in next(submitted, ()):
                    pool.add(more)
        except (CancelledError, CommClosedError) as e:
            raise ShardError(
                "The Dask scheduler went away, or cancelled the run. Start it again; the same command goes on with "
                "what is missing."
            ) from e
        finally:
            with suppress(CommClosedError):
                client.cancel(list(pool.futures))


def _result(future: Future[Receipt]) -> Receipt:
    """Receipt of a shard; raises ShardError if it killed its workers."""
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


def _submitted(client: Client, todo: Iterator[ShardTask], run: _Run) -> Iterator[list[Future[Receipt]]]:
    """Yield a first handful of futures that fills the cluster, then one more at a time."""

    def submit(count: int) -> list[Future[Receipt]]:
        return [
            client.submit(_on_worker, task, run, resources=SLOT, retries=RETRIES, pure=False, key=_key(task))
            for _, task in zip(range(count), todo, strict=False)
        ]

    yield submit(IN_FLIGHT * max(1, len(client.scheduler_info(n_workers=-1)["workers"])))
    while more := submit(1):
        yield more


def _key(task: ShardTask) -> str:
    return f"shard-{task.shard.key}-{task.digest[:12]}"


@contextmanager
def _reported(client: Client, topic: str, progress: Progress) -> Iterator[None]:
    """Pass on what workers log about their network evaluations."""

    def handler(event: tuple[float, tuple[int, float]]) -> None:
        progress(*event[1])

    client.subscribe_topic(topic, handler)
    try:
        yield
    finally:
        client.unsubscribe_topic(topic)
