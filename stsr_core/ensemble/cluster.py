"""Where the work runs: an existing Dask scheduler, the GPUs of this machine, or its cores."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from stsr_core.errors import ConfigurationError

if TYPE_CHECKING:
    from distributed import Client, LocalCluster

RESOURCE = "GPU"  # what every worker offers, CPU workers too, so that submissions are the same
SLOT = 0.5  # what a shard takes of it until it is written: while one is written, the next is computed
ANSWER_S = 15  # seconds that a scheduler has to answer
ONE = {RESOURCE: 1.0}
MANY = {RESOURCE: 4.0}  # a GPU computes shards faster than one thread of its CPU packs and writes them
AT_ONCE = 2  # shards that a GPU computes: one while the other's thread prepares its work or waits for it
# One thread a worker: more workers use the cores better, and results do not depend on their number.
# One heap for all its threads, for each keeps what it frees (`memory.keep_freed`): several took 0.25 GB more.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MALLOC_ARENA_MAX": "1",
}  # fmt: skip
CONFIGURATION = {
    "distributed.nanny.pre-spawn-environ": ENVIRONMENT,
    "distributed.worker.profile.enabled": False,  # it takes 3 to 10 % of a worker's time: stacks of torch are deep
    "distributed.admin.tick.interval": "500ms",  # of every event loop; every 20 ms they take 1 % of a core each
}


@dataclass(frozen=True)
class Cluster:
    """Which cluster to use.

    Attributes:
        scheduler_address: an existing scheduler; `workers` is ignored then.
        device: auto, cpu or cuda; on an existing cluster each worker finds its own.
        workers: number of local workers; 0 means one per GPU or core.
        precision: auto, float32 or bfloat16, see `Downscaler.on`.
    """

    scheduler_address: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    @contextmanager
    def client(self) -> Iterator[Client]:
        """Connect, or start a local cluster that ends with the context.

        Raises:
            ConfigurationError: no scheduler answers, or cuda is asked for where no GPU is visible.
        """
        import dask
        from distributed import Client

        if self.scheduler_address is not None:
            try:
                count_workers(self.scheduler_address)  # a client waits for ever where something else answers
                client = Client(self.scheduler_address, timeout=ANSWER_S)
            except (OSError, ValueError, TimeoutError) as e:
                raise ConfigurationError(
                    f"No Dask scheduler answers at {self.scheduler_address} ({str(e) or 'not in time'}). Start it, or "
                    "unset STSR_SCHEDULER_ADDRESS to use this machine."
                ) from e
            with client:
                yield client
            return
        gpus = visible_gpus() if self.device != "cpu" else 0
        if self.device == "cuda" and not gpus:
            raise ConfigurationError("Device cuda is asked for, but no GPU is visible here. Use --device auto or cpu.")
        with (
            dask.config.set(CONFIGURATION),
            _quiet(),
            _ended(self._local(gpus)) as cluster,
            Client(cluster) as client,
        ):
            yield client

    def _local(self, gpus: int):  # type: ignore[no-untyped-def]
        if gpus:
            from dask_cuda import LocalCUDACluster

            count = min(self.workers or gpus, gpus)
            return LocalCUDACluster(n_workers=count, threads_per_worker=AT_ONCE, resources=MANY, dashboard_address=":0")
        from distributed import LocalCluster

        return LocalCluster(
            n_workers=self.workers or os.cpu_count() or 1,
            threads_per_worker=1,
            resources=ONE,
            dashboard_address=":0",
            silence_logs=logging.ERROR,
        )


def count_workers(address: str) -> int:
    """Ask a Dask scheduler how many workers it has.

    Raises:
        OSError or ValueError: nothing answers there in time, or something else than a scheduler of this Dask does.
    """
    from distributed import rpc
    from distributed.security import Security

    secured = Security().get_connection_args("client")  # by Dask's configuration, as clients are

    async def asked() -> int:
        async with asyncio.timeout(ANSWER_S), rpc(address, connection_args=secured) as scheduler:
            return len(await scheduler.ncores())

    return asyncio.run(asked())


@contextmanager
def _ended(cluster: LocalCluster) -> Iterator[LocalCluster]:
    """End a cluster with the block; one that takes long to end, as on busy machines, does not undo finished work."""
    try:
        yield cluster.__enter__()
    finally:
        with suppress(TimeoutError):  # what is left of it ends with this process
            cluster.close()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the comings and goings of a local cluster out of the log; its warnings stay."""
    logger = logging.getLogger("distributed")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def visible_gpus() -> int:
    """Count GPUs in a child process, so that this one does not initialise CUDA before it forks workers."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_count_gpus).result()
