"""A slow device and a slow store, simulated: what the driver submits, and what a worker does at the same time."""

import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from distributed import Client, LocalCluster

from stsr_core.downscaler import Downscaler, choose_device
from stsr_core.ensemble import generate as engine
from stsr_core.ensemble.cluster import ONE
from stsr_core.ensemble.generate import IN_FLIGHT, ShardError, Target, generate
from stsr_core.ensemble.plan import Plan, Recipe
from stsr_core.ensemble.shard import ShardResult
from stsr_core.evaluation.evaluate import as_cube
from stsr_core.factors import Factor

FACTOR = Factor(space=4, time=1)
SLOW_S = 0.2


class Load:
    """How many shards are computed, held in memory and written, now and at most."""

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
    return Plan(as_cube(np.ones((8, 9, 11), np.float32), FACTOR), recipe)


@pytest.fixture
def client():
    options = {"processes": False, "resources": ONE, "dashboard_address": None}
    with LocalCluster(n_workers=1, threads_per_worker=1, **options) as cluster, Client(cluster) as client:
        yield client


def run(plan, library, client, progress=lambda *_: None):
    downscaler = Downscaler.load(library.serving(FACTOR), FACTOR, choose_device("cpu"))
    generate(plan, plan.shards, downscaler, Target("memory://out", "rain", {}), client, progress=progress)


def made(task, *_):
    return ShardResult(np.zeros((1, 1, 1, 1), np.uint16), 0, 0)


def test_a_worker_computes_the_next_shard_while_it_writes_one_and_holds_no_more(plan, library, client, monkeypatch):
    load, submitted, seen = Load(), client.submit, []

    def compute(task, *_):
        with load.counted("computed"):
            return made(task)

    def write(*_):
        with load.counted("written"):
            return "digest"

    def submit(*args, **options):
        seen.append(sum(f.status == "pending" for f in client.futures.values()))
        return submitted(*args, **options)

    monkeypatch.setattr(engine, "make_shard", compute)
    monkeypatch.setattr(engine, "write_shard", write)
    monkeypatch.setattr(client, "submit", submit)
    run(plan, library, client)
    assert len(seen) == len(plan.shards) > 2 * IN_FLIGHT
    assert load.most["computed"] == 1  # a device does one shard at a time
    assert load.most["written"] <= 2  # a store slower than the device holds it up: memory does not grow
    assert load.both >= len(plan.shards) // 2
    assert max(seen) < IN_FLIGHT


def test_a_shard_that_fails_ends_the_run_and_stops_what_is_at_work(plan, library, client, monkeypatch):
    stopped, failing = threading.Event(), plan.shards[1].key

    def compute(task, _, progress):
        if task.shard.key == failing:
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
        return made(task)

    monkeypatch.setattr(engine, "make_shard", compute)
    monkeypatch.setattr(engine, "write_shard", lambda *_: "digest")
    with pytest.raises(ShardError, match=rf"{failing} failed: ValueError: out of luck"):
        run(plan, library, client)
    assert stopped.wait(10)
