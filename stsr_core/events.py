"""Events in the log: one line each that people and machines read, `name key=value key="a value"` (logfmt)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

PLAIN = re.compile(r"^[^\s\"=]+$")
NOTHING: Mapping[str, object] = MappingProxyType({})
_about: ContextVar[Mapping[str, object]] = ContextVar("about", default=NOTHING)


@contextmanager
def about(**fields: object) -> Iterator[None]:
    """Name what all events in the block are about: run, product, version."""
    token = _about.set({**_about.get(), **fields})
    try:
        yield
    finally:
        _about.reset(token)


def line(event: str, **fields: object) -> str:
    """One event as a line: its name, what it is about, its own fields; fields that are None are left out."""
    values = {**_about.get(), **fields}
    return " ".join([event, *(f"{key}={_quoted(value)}" for key, value in values.items() if value is not None)])


def _quoted(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if PLAIN.match(text) else json.dumps(text, ensure_ascii=False)
