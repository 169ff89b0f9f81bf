"""A slow device and a slow store, simulated: what the driver submits, and what a worker does at the same time."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster, get_worker

from stsr_core.downscaler import Downscaler, choose_device
from stsr_core.ensemble import generate as engine
from stsr_core.ensemble.cluster import MANY, ONE, Cluster
from stsr_core.ensemble.generate import ShardError, Target, generate
from stsr_core.ensemble.plan import Plan, Recipe
from stsr_core.ensemble.shard import ShardResult
from stsr_core.errors import ConfigurationError
from stsr_core.factors import Factor
from stsr_core.sources.cube import as_cube

FACTOR = Factor(space=4, time=1)
SLOW_S = 0.2


class Load:
    """How many shards are computed and written, now and at most."""

    def __init__(self) -> None:
        self.lock, self.now, self.most, self.both = threading.Lock(), {"computed": 0, "written": 0}, {}, 0

    @contextmanager
    def counted(self, what: str):
        with self.lock:
            self.now[what] += 1
            self.most[what] = max(self.most.get(what, 0), self.now[what])
            self.both += all(self.now.values())
        try:
            time.sleep(SLOW_S)
            yield
        finally:
            with self.lock:
                self.now[what] -= 1


@pytest.fixture
def plan(library) -> Plan:
    checkpoint = library.serving(FACTOR)
    recipe = Recipe.of(checkpoint, checkpoint.card.serving(FACTOR), seed=1, members=48, conserve=True)
    return Plan((as_cube(np.ones((8, 9, 11), np.float32), FACTOR),), recipe)


@contextmanager
def dask(workers: int, resources):
    """A cluster of threads, and its client."""
    options = {"processes": False, "resources": resources, "dashboard_address": ":0"}
    with LocalCluster(n_workers=workers, threads_per_worker=1, **options) as cluster, Client(cluster) as client:
        yield client


@pytest.fixture
def client():
    with dask(1, ONE) as client:
        yield client


def run(plan, library, client, progress=lambda *_: None, device="auto"):
    downscaler = Downscaler.load(library.serving(FACTOR), FACTOR, choose_device("cpu"))
    generate(
        plan,
        plan.shards,
        downscaler,
        Target("memory://out", "rain", {}),
        client,
        Cluster(device=device),
        progress=progress,
    )


def made(*_):
    counts = dict.fromkeys(("wet", "missing", "sum_mm", "max_mm", "rain_mm", "spread_mm"), 0.0)
    return ShardResult(np.zeros((1, 1, 4, 4), np.uint16), 0, 0, counts, {})


@pytest.fixture(autouse=True)
def _no_work(monkeypatch):
    """Shards of nothing, packed and written in no time."""
    monkeypatch.setattr(engine, "make_shard", made)
    monkeypatch.setattr(engine, "write_shard", lambda *_: "digest")


@pytest.mark.parametrize(("resources", "written"), [(ONE, 2), (MANY, 8)])
def test_a_worker_computes_the_next_shard_while_it_writes_some_and_holds_no_more(
    plan, library, monkeypatch, resources, written
):
    load, seen = Load(), []

    def compute(*_):
        with load.counted("computed"):
            return made()

    def write(*_):
        with load.counted("written"):
            time.sleep((written - 2) * SLOW_S)  # the more slots, the slower the store that they make up for
            return "digest"

    monkeypatch.setattr(engine, "make_shard", compute)
    monkeypatch.setattr(engine, "write_shard", write)
    with dask(1, resources) as client:
        submitted = client.submit

        def submit(*args, **options):
            seen.append(sum(f.status == "pending" for f in client.futures.values()))
            return submitted(*args, **options)

        monkeypatch.setattr(client, "submit", submit)
        run(plan, library, client)
    assert len(seen) == len(plan.shards) == 12
    assert load.most["computed"] == 1  # a device does one shard at a time
    assert load.most["written"] <= written  # a store slower than the device holds it up: memory does not grow
    assert load.both >= len(plan.shards) // 2
    assert max(seen) == written  # and one more that waits


def test_a_shard_that_fails_on_one_worker_is_tried_on_another(plan, library, monkeypatch):
    tried = {}

    def compute(task, *_):
        worker = get_worker().name
        tried.setdefault(task.shard.key, []).append(worker)
        if worker == 0:
            raise OSError("a broken card")
        return made()

    monkeypatch.setattr(engine, "make_shard", compute)
    with dask(2, ONE) as client:
        run(plan, library, client)
    assert len(tried) == len(plan.shards)
    assert [0, 1] in tried.values()
    assert all(workers in ([1], [0, 1]) for workers in tried.values())


def test_workers_that_come_later_get_their_share(plan, library, client, monkeypatch):
    names = set()

    def compute(*_):
        names.add(get_worker().name)
        time.sleep(SLOW_S)
        if len(names) == 1:
            client.cluster.scale(3)
        return made()

    monkeypatch.setattr(engine, "make_shard", compute)
    run(plan, library, client)
    assert len(names) == 3


def test_progress_comes_whole_in_few_messages_and_of_dry_shards_in_none(plan, library, client, monkeypatch):
    wet = [shard.key for shard in plan.shards[::2]]

    def compute(task, _, progress):
        for _ in range(100 * (task.shard.key in wet)):
            progress(1, 0.25)
        return made()

    told = []
    monkeypatch.setattr(engine, "make_shard", compute)
    run(plan, library, client, lambda *event: told.append(event))
    assert told == [(100, 25.0)] * len(wet)


def test_a_cluster_whose_workers_offer_nothing_is_refused_and_does_not_hang(plan, library):
    with (
        dask(2, {}) as client,
        pytest.raises(ConfigurationError, match="None of the 2 Dask workers.*--resources GPU=1"),
    ):
        run(plan, library, client)


def test_workers_of_other_code_are_refused(plan, library, client, monkeypatch):
    versions = iter(["1+driver", "1+worker", "1+worker"])
    monkeypatch.setattr(engine, "code_version", lambda: next(versions))
    with pytest.raises(ConfigurationError, match=r"has stsr 1\+worker, this run 1\+driver.*Install the same on both"):
        run(plan, library, client)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a worker without a GPU is needed")
def test_a_worker_without_a_gpu_that_comes_late_is_not_let_compute(plan, library, monkeypatch, caplog):
    monkeypatch.setattr(engine, "WATCHED_S", 0.1)
    with dask(0, ONE) as client, ThreadPoolExecutor() as pool, caplog.at_level("WARNING"):
        going = pool.submit(run, plan, library, client, device="cuda")
        while "waiting_for_workers" not in caplog.text:
            time.sleep(0.05)
        client.cluster.scale(1)
        with pytest.raises(ConfigurationError, match="torch sees no GPU here"):
            going.result(timeout=60)


def test_a_shard_that_fails_ends_the_run_and_stops_what_is_at_work(plan, library, client, monkeypatch):
    stopped, failing, tries = threading.Event(), plan.shards[1].key, []

    def compute(task, _, progress):
        if task.shard.key == failing:
            tries.append(1)
            raise ValueError("out of luck")
        for _ in range(20):
            time.sleep(0.05)
            try:
                progress(1, 0.05)
            except ShardError:
                stopped.set()
                raise
            if task.shard.key == plan.shards[0].key:
                break
        return made()

    monkeypatch.setattr(engine, "make_shard", compute)
    with pytest.raises(ShardError, match=rf"{failing} failed: ValueError: out of luck"):
        run(plan, library, client)
    assert stopped.wait(10)
    assert len(tries) == 1 + engine.RETRIES == 3
