"""What a run shows of itself in the UI. Only the driver writes it, and no run fails for the sake of it."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec
from uuid import UUID

import httpx
from prefect import get_client, get_run_logger
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
)
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.exceptions import MissingContextError, PrefectException
from prefect.logging import get_logger

if TYPE_CHECKING:
    from logging import Logger, LoggerAdapter

    from stsr_core.progress import Advance

UPDATE_EVERY_S = 5.0  # seconds between updates of a progress artifact
MAX_PICTURE_BYTES = 2_000_000  # larger pictures are only linked

P = ParamSpec("P")
Cell = str | int | float


def key_of(*parts: str) -> str:
    """Key of an artifact: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def shown(create: Callable[P, Any], *args: P.args, **kwargs: P.kwargs) -> UUID | None:
    """Create an artifact; without a server that answers, say so in the log and go on."""
    try:
        found = create(*args, **kwargs)
    except (httpx.HTTPError, PrefectException, RuntimeError, OSError) as e:
        _logger().warning("Artifact %s was not written (%s: %s).", kwargs.get("key"), type(e).__name__, e)
        return None
    return found if isinstance(found, UUID) else None


def table(key: str, rows: Sequence[Mapping[str, Cell]], description: str) -> None:
    """Show a table."""
    shown(create_table_artifact, table=[dict(row) for row in rows], key=key, description=description)


def facts(key: str, values: Mapping[str, Cell], description: str) -> None:
    """Show a table of two columns."""
    table(key, [{"what": name, "value": value} for name, value in values.items()], description)


def page(key: str, markdown: str, description: str) -> None:
    """Show a page of Markdown."""
    shown(create_markdown_artifact, markdown=markdown, key=key, description=description)


def link(key: str, url: str, text: str, description: str) -> None:
    """Show a link."""
    shown(create_link_artifact, link=url, link_text=text, key=key, description=description)


def picture(key: str, png: bytes, description: str) -> None:
    """Show a PNG; its bytes travel in the artifact, so that it is seen without access to the catalogue."""
    if len(png) > MAX_PICTURE_BYTES:
        _logger().warning("Picture %s has %d bytes, so it is only linked.", key, len(png))
        return
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    shown(create_image_artifact, image_url=url, key=key, description=description)


@contextmanager
def live_progress(key: str, total: int, description: str) -> Iterator[Advance]:
    """Show progress while the context lasts; yields what is called with the steps just done, from any thread.

    A thread of the driver writes at most every few seconds; calls only count.
    """
    artifact = shown(create_progress_artifact, progress=0.0, key=key, description=description)
    done, stop, lock = 0, threading.Event(), threading.Lock()

    def advance(steps: int, _seconds: float) -> None:
        nonlocal done
        with lock:
            done += steps

    def percent() -> float:
        return round(min(100.0, 100.0 * done / total), 1) if total else 100.0

    def write() -> None:
        said = 0.0
        while not stop.wait(UPDATE_EVERY_S):
            if artifact is not None and percent() != said:
                said = percent()
                shown(_update, artifact, said)

    thread = threading.Thread(target=write, name=f"stsr {key}", daemon=True)
    thread.start()
    try:
        yield advance
        done = total
    finally:
        stop.set()
        thread.join()
        if artifact is not None:
            shown(_update, artifact, percent())


def live_table(key: str, description: str) -> Callable[[str, Mapping[str, Cell]], None]:
    """A table that grows: what is returned shows a row, in place of the one that it showed under the same name."""
    rows: dict[str, dict[str, Cell]] = {}
    artifact: UUID | None = None

    def show(name: str, row: Mapping[str, Cell]) -> None:
        nonlocal artifact
        rows[name] = dict(row)
        table = list(rows.values())
        if artifact is None:
            artifact = shown(create_table_artifact, table=table, key=key, description=description)
        else:
            shown(_update, artifact, json.dumps(table))

    return show


def _update(artifact: UUID, data: float | str) -> None:
    with get_client(sync_client=True) as client:
        client.update_artifact(artifact, ArtifactUpdate(data=data))


def _logger() -> Logger | LoggerAdapter[Logger]:
    try:
        return get_run_logger()
    except MissingContextError:
        return get_logger("stsr")
