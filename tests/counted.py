"""The memory of this process as a server that counts what is asked of it."""

from collections.abc import Sequence

import fsspec

from stsr_core.sources.ranges import RemoteFile


class Counted:
    """A file on that server, and the bytes and requests that were needed of it."""

    def __init__(self, content: bytes) -> None:
        self.memory, self.bytes, self.requests = fsspec.filesystem("memory"), 0, 0
        self.replace(content)
        self.file = RemoteFile(self, "/file", len(content), "memory://file")

    def replace(self, content: bytes) -> None:
        """Put another file in its place."""
        self.memory.pipe_file("/file", content)

    def cat_ranges(
        self, paths: Sequence[str], starts: Sequence[int], stops: Sequence[int], **options: object
    ) -> list[bytes]:
        """Read as fsspec does."""
        self.bytes += sum(b - a for a, b in zip(starts, stops, strict=True))
        self.requests += len(starts)
        found: list[bytes] = self.memory.cat_ranges(paths, starts, stops, **options)
        return found
