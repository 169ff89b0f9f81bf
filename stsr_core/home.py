"""A leading ~: expanded where a path enters, once, for of the libraries that read and write some expand it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

Place = TypeVar("Place", str, Path, str | None, Path | None, str | Path | None)


def at_home(place: Place) -> Place:
    """Return a path with a leading ~ expanded, and a URL or None as it is."""
    if isinstance(place, Path):
        return place.expanduser()
    return place if place is None else os.path.expanduser(place)  # noqa: PTH111  it may be a URL
