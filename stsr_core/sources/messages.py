"""Where GRIB messages are in a file, and how they are fetched: from a disk, or one by one from a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Protocol

from stsr_core.errors import SourceError
from stsr_core.sources.ranges import RemoteFile, WholeFileNeeded

MAGIC, END = b"GRIB", b"7777"
DECODING = Lock()  # not every build of ecCodes is made for threads
HEAD_BYTES = 1 << 14  # asked for to see what a message holds
WORTH_BYTES = 16 * HEAD_BYTES  # messages that are shorter are faster read with their neighbours
LONG_GRIB1 = 1 << 23  # lengths from this on are encoded in a way of their own
BITMAP, DATA = 6, 7  # sections of GRIB 2
GRIB1_SECTIONS = ((0x80, "grid"), (0x40, "bitmap"))  # by bits of the eighth byte of the first section
GRIB1_DATA_HEAD = 11  # bytes before the packed values


class MessageFile(Protocol):
    """A GRIB file."""

    @property
    def name(self) -> str:
        """As messages may show it."""

    def headers(self) -> Iterator[tuple[int, int]]:
        """Yield where each message starts, and an ecCodes handle without its values, which is released behind it."""

    def message(self, offset: int, length: int) -> AbstractContextManager[int]:
        """Return an ecCodes handle of a whole message; no other thread decodes meanwhile."""


@contextmanager
def _released(handle: int) -> Iterator[int]:
    import eccodes

    try:
        yield handle
    finally:
        eccodes.codes_release(handle)


@dataclass(frozen=True)
class OnDisk:
    """A GRIB file on a disk of this machine."""

    name: str

    def headers(self) -> Iterator[tuple[int, int]]:
        """See `MessageFile`."""
        import eccodes

        with Path(self.name).open("rb") as file:
            while (handle := eccodes.codes_grib_new_from_file(file, headers_only=True)) is not None:
                with _released(handle):
                    yield int(eccodes.codes_get(handle, "offset")), handle

    @contextmanager
    def message(self, offset: int, length: int) -> Iterator[int]:
        """See `MessageFile`."""
        import eccodes

        del length
        with DECODING, Path(self.name).open("rb") as file:
            file.seek(offset)
            with _released(eccodes.codes_grib_new_from_file(file)) as handle:
                yield handle


@dataclass(frozen=True)
class OnServer:
    """A GRIB file on a server, of which the heads of all messages are read, and those messages that are needed.

    `least` is the length of a first message from which on this is faster than to read all.
    """

    file: RemoteFile
    least: int = WORTH_BYTES

    @property
    def name(self) -> str:
        """As messages may show it."""
        return self.file.name

    def headers(self) -> Iterator[tuple[int, int]]:
        """See `MessageFile`.

        Raises:
            WholeFileNeeded: messages are short, or follow each other in a way that only ecCodes understands.
        """
        import eccodes

        offset = 0
        while offset < self.file.size:
            head = self.file.read(offset, offset + HEAD_BYTES)
            length = _length(head)
            if (offset == 0 and length < self.least) or offset + length > self.file.size:
                raise WholeFileNeeded
            with _released(eccodes.codes_new_from_message(self._without_values(offset, head, length))) as handle:
                yield offset, handle
            offset += length

    def _without_values(self, offset: int, head: bytes, length: int) -> bytes:
        """Return a message whose bitmap and packed values, and what `head` does not hold of it else, are 0."""
        message = bytearray(length)
        message[: len(head)] = head[:length]
        message[-len(END) :] = END

        def need(start: int, size: int) -> None:
            if start + size > min(len(head), length):
                message[start : start + size] = self.file.read(offset + start, offset + start + size)

        (_fill2 if head[7] == 2 else _fill1)(message, need)
        return bytes(message)

    @contextmanager
    def message(self, offset: int, length: int) -> Iterator[int]:
        """See `MessageFile`.

        Raises:
            SourceError: there is another message now, or none.
        """
        import eccodes

        content = self.file.read(offset, offset + length)
        if content[:4] != MAGIC or content[-4:] != END:
            raise SourceError(f"{self.name} has no GRIB message at byte {offset} any more. Start again.")
        with DECODING, _released(eccodes.codes_new_from_message(content)) as handle:
            yield handle


def _length(head: bytes) -> int:
    """Length of a message by its first bytes."""
    if head[:4] != MAGIC or len(head) < 16 or head[7] not in (1, 2):
        raise WholeFileNeeded
    length = int.from_bytes(head[4:7] if head[7] == 1 else head[8:16])
    if length < 16 or (head[7] == 1 and length >= LONG_GRIB1):
        raise WholeFileNeeded
    return length


def _fill2(message: bytearray, need: Callable[[int, int], None]) -> None:
    """Get what says what a GRIB 2 message holds: its sections up to the values; `need` puts a span into the message."""
    start = 16
    while True:
        need(start, 5)
        size, number = int.from_bytes(message[start : start + 4]), message[start + 4]
        if size < 5 or start + size > len(message):
            raise WholeFileNeeded
        if number == DATA:
            return
        need(start, 6 if number == BITMAP else size)
        start += size


def _fill1(message: bytearray, need: Callable[[int, int], None]) -> None:
    """Likewise of a GRIB 1 message."""
    start = 8
    need(start, 8)
    flags = message[start + 7]
    for name in ("product", *(name for bit, name in GRIB1_SECTIONS if flags & bit)):
        need(start, 6)
        size = int.from_bytes(message[start : start + 3])
        if size < 6 or start + size > len(message):
            raise WholeFileNeeded
        need(start, 6 if name == "bitmap" else size)
        start += size
    need(start, GRIB1_DATA_HEAD)
