"""Progress of long work: a bar with rate and remaining time in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[int, float], None]  # steps just done, and the seconds of work in them
Watch = Callable[[str, int], AbstractContextManager[Advance]]  # of a description and the steps in all
LINE_EVERY_S = 10.0  # seconds between plain lines


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Advance]:
    """Show progress on stderr while the context lasts; yields what is called with the steps just done
    and the seconds they took."""
    if sys.stderr.isatty():
        with _terminal(description, total) as advance:
            yield advance
    else:
        with _lines(description, total) as advance:
            yield advance


@contextmanager
def unwatched(_description: str, _total: int) -> Iterator[Advance]:
    """Show nothing."""
    yield lambda _steps, _seconds: None


@contextmanager
def _terminal(description: str, total: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total, rate="")

        def advance(steps: int, _seconds: float = 0.0) -> None:
            bar.advance(task, steps)
            speed = bar.tasks[0].speed
            bar.update(task, rate=f"{speed:.1f}/s" if speed else "")

        yield advance


@contextmanager
def _lines(description: str, total: int) -> Iterator[Advance]:
    started = said = time.monotonic()
    done = 0

    def advance(steps: int, _seconds: float = 0.0) -> None:
        nonlocal done, said
        done += steps
        now = time.monotonic()
        if now - said >= LINE_EVERY_S:
            said = now
            rate = done / (now - started)
            left = (total - done) / rate if rate else float("inf")
            print(f"{description}: {done}/{total}  {rate:.1f}/s  {left:.0f} s left", file=sys.stderr, flush=True)

    yield advance
    print(f"{description}: {done} done in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
