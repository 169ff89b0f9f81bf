"""Parts of files on servers: which bytes are asked for, and when it is better to ask for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stsr_core.errors import SourceError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

NEAR_BYTES = 1 << 14  # gaps up to this are read with what lies around them: another request would take longer


class WholeFileNeeded(Exception):  # noqa: N818 - asks for another way, no failure
    """This file cannot be read in parts, or not faster than as a whole."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server.

    Attributes:
        filesystem: of the server.
        path: on it.
        size: bytes.
        name: as messages may show it.
    """

    filesystem: AbstractFileSystem
    path: str
    size: int
    name: str

    def read(self, start: int, stop: int) -> bytes:
        """Read bytes start..stop; what lies behind the end of the file is left out.

        Raises:
            SourceError: the server sent fewer.
        """
        (content,) = self.read_all([(start, stop)])
        return content

    def read_all(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read several spans, which increase and do not overlap, at once; raises like `read`."""
        spans = [(start, min(stop, self.size)) for start, stop in spans]
        groups = _near(spans)
        starts, stops = [g[0][0] for g in groups], [g[-1][1] for g in groups]
        found = self.filesystem.cat_ranges([self.path] * len(groups), starts, stops, on_error="raise")
        parts = []
        for group, start, stop, content in zip(groups, starts, stops, found, strict=True):
            if len(content) != stop - start:
                raise SourceError(
                    f"{self.name} gave {len(content)} of {stop - start} bytes from byte {start} on. Has it changed "
                    "meanwhile? Start again."
                )
            parts += [content[a - start : b - start] for a, b in group]
        return parts


def _near(spans: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Spans in groups whose gaps are at most NEAR_BYTES."""
    groups: list[list[tuple[int, int]]] = []
    for span in spans:
        if groups and span[0] - groups[-1][-1][1] <= NEAR_BYTES:
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups
