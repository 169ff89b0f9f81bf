"""GeoTIFF files of one hour each, loose or in a tar as weather services publish archives, as one lazy dataset."""

from __future__ import annotations

import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from stsr_core.errors import SourceError

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

STARTS = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")  # first bytes of TIFF and BigTIFF
# 2018050106_RR.gtif: the stamp, and what the file holds
STAMPS = {10: "%Y%m%d%H", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}  # by their lengths
NAME = re.compile(r"(?<!\d)(?P<stamp>\d{10}|\d{12}|\d{14})(?:_(?P<variable>[A-Za-z]\w*))?\.g?tiff?$", re.IGNORECASE)
UNNAMED = "band_1"
SAME_PLACE = 1e-3  # cells that lie further apart, in cells, are others


@dataclass(frozen=True)
class Record:
    """One file: where GDAL finds it, when it is, and what it holds."""

    path: str
    time: datetime
    variable: str


def records_in_tar(path: str) -> list[Record]:
    """Find the GeoTIFFs in a tar; nothing is unpacked.

    Raises:
        SourceError: no tar, or no GeoTIFF in it whose name holds a time.
    """
    try:
        with tarfile.open(path) as opened:
            names = [m.name for m in opened if m.isfile() and NAME.search(m.name)]
    except (tarfile.TarError, OSError) as e:
        raise SourceError(f"{path} cannot be read as a tar ({e}). Fetch it again.") from e
    if not names:
        raise SourceError(f"{path} holds no GeoTIFF named YYYYMMDDHH_VARIABLE.tif. Name a tar of hourly GeoTIFFs.")
    return [record_of(f"/vsitar/{path}/{name}") for name in names]


def record_of(path: str) -> Record:
    """Read time and variable off a file's name.

    Raises:
        SourceError: a name without a time.
    """
    name = PurePosixPath(path).name
    found = NAME.search(name)
    if found is None:
        raise SourceError(f"{name} names no time. GeoTIFFs are needed to be named YYYYMMDDHH_VARIABLE.tif.")
    stamp = found["stamp"]
    try:
        time = datetime.strptime(stamp, STAMPS[len(stamp)])
    except ValueError as e:
        raise SourceError(f"{name} names no time: {stamp} is no date and hour. Rename it, or leave it out.") from e
    return Record(path, time, found["variable"] or UNNAMED)


def open_geotiffs(records: Sequence[Record]) -> xr.Dataset:
    """Join files along time, one variable for each name that stands behind the stamp; values are read when used.

    Returns:
        Variables (time, y, x) of float32, scaled as each file says, NaN where it marks no data; time as the names have
        it.

    Raises:
        SourceError: a file that cannot be read, that is rotated or has several bands; when its values are read, one
            that differs from the first in its grid or, of the same variable, its units.
    """
    import xarray as xr

    first = _frame(records[0].path)
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda r: r.time):
        groups[record.variable].append(record)
    arrays = {}
    for name, group in groups.items():
        frame = replace(first, units=_frame(group[0].path).units)
        arrays[name] = xr.DataArray(
            _lazy([q.path for q in group], frame),
            dims=("time", "y", "x"),
            coords={"time": np.array([q.time for q in group], "datetime64[ns]")},
            attrs={"grid_mapping": "crs"} | ({"units": frame.units} if frame.units else {}),
        )
    dataset = xr.Dataset(arrays, coords={"y": ("y", first.y), "x": ("x", first.x)})
    for axis, attributes in _axes(first.wkt).items():
        dataset[axis].attrs |= attributes
    dataset["crs"] = ((), 0, {"crs_wkt": first.wkt})
    return dataset


@dataclass(frozen=True)
class _Frame:
    """What all files of a series share.

    Attributes:
        cells: (Y, X).
        corner: x and y where the first cell begins, in units of the CRS.
        step: signed width and height of a cell.
        wkt: CRS, empty where the file has none.
        units: of the values, empty where the file has none.
    """

    cells: tuple[int, int]
    corner: tuple[float, float]
    step: tuple[float, float]
    wkt: str
    units: str

    @property
    def x(self) -> NDArray[np.float64]:
        """Centres of the columns."""
        return self.corner[0] + self.step[0] * (np.arange(self.cells[1], dtype=np.float64) + 0.5)

    @property
    def y(self) -> NDArray[np.float64]:
        """Centres of the rows."""
        return self.corner[1] + self.step[1] * (np.arange(self.cells[0], dtype=np.float64) + 0.5)

    def lies_on(self, other: _Frame) -> bool:
        """Whether both have the same cells, but for rounding."""
        if self.cells != other.cells:
            return False
        off = np.concatenate((self.x - other.x, self.y - other.y))
        return bool(np.abs(off).max() <= SAME_PLACE * abs(self.step[0]))


def _frame(path: str) -> _Frame:
    with _opened(path) as file:
        return _frame_of(file, path)


def _frame_of(file: Any, path: str) -> _Frame:
    a = file.transform
    if a.b or a.d:
        raise SourceError(f"{path} is rotated. A north-up grid is needed; reproject it.")
    if file.count != 1:
        raise SourceError(f"{path} has {file.count} bands. One is needed: copy that of the precipitation to a file.")
    wkt = file.crs.to_wkt() if file.crs else ""
    return _Frame((file.height, file.width), (a.c, a.f), (a.a, a.e), wkt, (file.units or ("",))[0] or "")


def _check_alike(found: _Frame, first: _Frame, path: str) -> None:
    """Refuse a file whose values would be taken for those of other cells, or for other units."""
    alike = {
        ("cells",): found.cells == first.cells,
        ("corner", "step"): found.lies_on(first),
        ("wkt",): _is_same_crs(found.wkt, first.wkt),
        ("units",): found.units == first.units,
    }
    for names, same in alike.items():
        if not same:
            has, needed = (", ".join(f"{name} {getattr(f, name)!r}" for name in names) for f in (found, first))
            raise SourceError(
                f"{path} has {has}; the first file has {needed}. Files of a series need the same: read those of each "
                "kind by a glob of their own, or convert them."
            )


def _is_same_crs(one: str, other: str) -> bool:
    from rasterio.crs import CRS

    return one == other or bool(one and other and CRS.from_wkt(one) == CRS.from_wkt(other))


def _axes(wkt: str) -> dict[str, dict[str, str]]:
    """CF attributes of y and x; axes without units are in the unit of the CRS."""
    from rasterio.crs import CRS

    crs = CRS.from_wkt(wkt) if wkt else None
    if crs is not None and crs.is_geographic:
        return {
            "y": {"standard_name": "latitude", "units": "degrees_north"},
            "x": {"standard_name": "longitude", "units": "degrees_east"},
        }
    units = {"units": "m"} if crs is None or crs.linear_units_factor[1] == 1.0 else {}
    return {axis: {"standard_name": f"projection_{axis}_coordinate", **units} for axis in ("y", "x")}


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """Open a file, with an error that names it."""
    import rasterio
    from rasterio.errors import RasterioIOError

    try:
        file = rasterio.open(path)
    except RasterioIOError as e:
        raise SourceError(f"{path} cannot be read ({e}). Fetch it again.") from e
    with file:
        yield file


def _lazy(paths: Sequence[str], frame: _Frame) -> Any:
    import dask.array as da
    from dask.delayed import delayed

    read = delayed(_read, pure=True)
    return da.stack([da.from_delayed(read(path, frame), frame.cells, np.float32) for path in paths])


def _read(path: str, frame: _Frame) -> NDArray[np.float32]:
    with _opened(path) as file:
        _check_alike(_frame_of(file, path), frame, path)
        values = np.ma.filled(file.read(1, masked=True).astype(np.float64), np.nan)
        return np.asarray(values * file.scales[0] + file.offsets[0], np.float32)
