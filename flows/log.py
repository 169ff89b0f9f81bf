"""The log of runs: events as lines of logfmt, with the run and the product they are about."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prefect import get_run_logger
from prefect.runtime import flow_run

from stsr_core import events


def event(name: str, *, level: int = logging.INFO, **fields: object) -> None:
    """Log an event of this run, in the process and in the UI."""
    get_run_logger().log(level, "%s", events.line(name, run=flow_run.id, **fields))


@contextmanager
def shards_to_stderr() -> Iterator[None]:
    """Let the engine's events reach stderr, by the handler of Prefect's root logger, and nothing else: a line per shard
    is too much for a server's database.
    """
    logger = logging.getLogger("stsr")
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        with events.about(run=flow_run.id):
            yield
    finally:
        logger.setLevel(before)
