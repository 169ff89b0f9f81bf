"""NetCDF3 on servers: the header says which bytes hold which values, and only those that are needed are read.

No library reads parts of such files from a server; their format is fixed for good (NetCDF Users Guide, appendix B,
"The NetCDF Classic Format Specification", with CDF-2 and CDF-5).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from xarray.backends import BackendArray
from xarray.core import indexing

from stsr_core.errors import SourceError
from stsr_core.sources.ranges import RemoteFile

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

HEADER_BYTES = 1 << 18  # asked for at once; of longer headers twice as much, until they are whole
LONGEST = 1 << 24  # dimension of a variable without values
CHARACTERS = 2  # number of the type ...
TYPES = dict(
    enumerate((">i1", "S1", ">i2", ">i4", ">f4", ">f8", "u1", ">u2", ">u4", ">i8", ">u8"), start=1)
)  # ... of all
DIMENSION, VARIABLE, ATTRIBUTE = 10, 11, 12  # what a list holds
CDF1, CDF2, CDF5 = 1, 2, 5  # versions


class _Cut(Exception):  # noqa: N818
    """The header goes on behind the bytes that were read."""


@dataclass(frozen=True)
class _Layout:
    """Where the values of a variable are: records of `shape[1:]`, `stride` bytes apart; scalars are one record."""

    offset: int
    stride: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def stop(self) -> int:
        """Where the last value ends; 0 where there is none."""
        if 0 in self.shape:
            return 0
        records = self.shape[0] if self.shape else 1
        return self.offset + (records - 1) * self.stride + math.prod(self.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True)
class _Variable:
    """What the header says of a variable."""

    name: str
    dims: tuple[int, ...]
    attributes: dict[str, Any]
    dtype: np.dtype[Any]
    begin: int


class _Header:
    """A reader of the header, which goes from its start to its end once."""

    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 4
        self.version = content[3]
        if self.version not in (CDF1, CDF2, CDF5):
            raise ValueError(f"version {self.version}")

    def _take(self, count: int) -> bytes:
        """Take bytes, and what fills them up to four."""
        if count < 0:
            raise ValueError(f"{count} bytes")
        start, self.at = self.at, self.at + count + -count % 4
        if self.at > len(self.content):
            raise _Cut
        return self.content[start : start + count]

    def number(self) -> int:
        """A count, of 8 bytes in CDF-5; -1 is that of records that nobody counted."""
        return int.from_bytes(self._take(8 if self.version == CDF5 else 4), signed=True)

    def _name(self) -> str:
        return self._take(self.number()).decode()

    def _list(self, tag: int) -> range:
        """Begin a list, which may be absent."""
        found, count = int.from_bytes(self._take(4)), self.number()
        if found not in (0, tag) or count < 0 or (found == 0 and count):
            raise ValueError(f"a list of {tag} begins with {found}")
        return range(count)

    def dimensions(self) -> list[tuple[str, int]]:
        """Names and lengths; 0 is that along records."""
        return [(self._name(), self.number()) for _ in self._list(DIMENSION)]

    def attributes(self) -> dict[str, Any]:
        """Attributes by name: text, a number, or an array."""
        return {self._name(): self._value() for _ in self._list(ATTRIBUTE)}

    def _value(self) -> Any:
        kind, count = int.from_bytes(self._take(4)), self.number()
        dtype = np.dtype(TYPES[kind])
        content = self._take(count * dtype.itemsize)
        if kind == CHARACTERS:
            return content.decode(errors="replace").replace("\0", "")
        values = np.frombuffer(content, dtype).astype(dtype.newbyteorder("="))
        return values[0] if count == 1 else values

    def variables(self) -> Iterator[_Variable]:
        """What is said of each variable."""
        for _ in self._list(VARIABLE):
            name, dims = self._name(), tuple(self.number() for _ in range(self.number()))
            attributes, dtype = self.attributes(), np.dtype(TYPES[int.from_bytes(self._take(4))])
            if dims and min(dims) < 0:
                raise ValueError(f"dimension {min(dims)} of {name}")
            self.number()  # the size of it, which follows from its shape, and is not true where it is large
            yield _Variable(name, dims, attributes, dtype, int.from_bytes(self._take(4 if self.version == CDF1 else 8)))


def open_netcdf3(file: RemoteFile) -> xr.Dataset:
    """Open a NetCDF3 file on a server, undecoded; values are read when they are asked for.

    Raises:
        SourceError: the header is damaged, or the file shorter than it says.
    """
    size = HEADER_BYTES
    while True:
        try:
            return _opened(file, _Header(file.read(0, size)))
        except _Cut:
            if size >= file.size:
                raise SourceError(f"{file.name} ends within its header. Fetch it again.") from None
            size *= 2
        except (ValueError, KeyError, IndexError) as e:
            raise SourceError(f"{file.name} has a header that makes no sense ({e!r}). Fetch it again.") from None


def _opened(file: RemoteFile, header: _Header) -> xr.Dataset:
    import xarray as xr

    records = header.number()
    dimensions, attributes, variables = header.dimensions(), header.attributes(), list(header.variables())
    sizes = [length for _, length in dimensions]
    recorded = [bool(v.dims) and sizes[v.dims[0]] == 0 for v in variables]
    along = [v for v, is_recorded in zip(variables, recorded, strict=True) if is_recorded]
    lengths = [math.prod(sizes[d] for d in v.dims[1:]) * v.dtype.itemsize for v in along]
    stride = lengths[0] if len(along) == 1 else sum(n + -n % 4 for n in lengths)
    if records < 0 and along:
        records = (file.size - min(v.begin for v in along)) // max(1, stride)
    found = {}
    for variable, is_recorded in zip(variables, recorded, strict=True):
        shape = tuple(sizes[d] or records for d in variable.dims)
        apart = stride if is_recorded else math.prod(shape[1:]) * variable.dtype.itemsize
        layout = _Layout(variable.begin, apart, shape, variable.dtype)
        if layout.stop > file.size or max(shape, default=0) > max(LONGEST, file.size):
            raise SourceError(
                f"{file.name} has {file.size} bytes, but {variable.name!r} the shape {shape} and its end at byte "
                f"{layout.stop}. Fetch it again."
            )
        lazy = indexing.LazilyIndexedArray(_Values(file, layout))
        names = tuple(dimensions[d][0] for d in variable.dims)
        found[variable.name] = xr.Variable(names, lazy, variable.attributes)
    return xr.Dataset(found, attrs=attributes)


class _Values(BackendArray):
    """Values of a variable, of which those records and rows are read that are indexed."""

    def __init__(self, file: RemoteFile, layout: _Layout) -> None:
        self.file, self.layout, self.shape = file, layout, layout.shape
        self.dtype = layout.dtype.newbyteorder("=")

    def __getitem__(self, key: indexing.ExplicitIndexer) -> NDArray[Any]:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> NDArray[Any]:
        if not self.shape:
            return self._records(np.array([0]), 0, 1, ())[0]
        record, *rest = (np.arange(n)[part] for n, part in zip(self.shape, key, strict=True))
        records = np.unique(record)
        low, high = (int(f(rest[0])) if rest and np.size(rest[0]) else 0 for f in (np.min, np.max))
        values = self._records(records, low, high + 1, self.shape[1:])
        values = values[np.searchsorted(records, record)]
        lead = np.ndim(record)
        for axis, part in reversed(list(enumerate(rest))):  # from the last, for a number takes its axis away
            at = part - low if axis == 0 else part
            values = values[(slice(None),) * (lead + axis) + (at,)]
        return values

    def _records(self, records: NDArray[np.int64], first: int, stop: int, shape: tuple[int, ...]) -> NDArray[Any]:
        """Rows first..stop of some records, (records, stop - first, ...); of shape (records,) where they have none."""
        layout, row, rows = self.layout, math.prod(shape[1:]) * self.dtype.itemsize, shape[0] if shape else 1
        kept = (stop - first, *shape[1:]) if shape else ()
        if 0 in (len(records), *kept):
            return np.empty((len(records), *kept), self.dtype)
        # What follows on in the file is asked for as one: there are meshes of a million cells.
        follows = (np.diff(records) == 1) & (layout.stride == rows * row) & (stop - first == rows)
        starts, ends = records[np.r_[True, ~follows]], records[np.r_[~follows, True]]
        at, until = (layout.offset + row * n + layout.stride * r for n, r in ((first, starts), (stop, ends)))
        content = b"".join(self.file.read_all(list(zip(at.tolist(), until.tolist(), strict=True))))
        return np.frombuffer(content, layout.dtype).astype(self.dtype).reshape(len(records), *kept)
