"""GeoTIFF files of one hour each, loose or in a tar as weather services publish archives, as one lazy dataset."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
NAME = re.compile(r"(?P<stamp>\d{12}|\d{10})(?:_(?P<variable>[A-Za-z]\w*))?\.g?tiff?$", re.IGNORECASE)
UNNAMED = "band_1"


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
        time = datetime.strptime(stamp, "%Y%m%d%H" if len(stamp) == 10 else "%Y%m%d%H%M")
    except ValueError as e:
        raise SourceError(f"{name} names no time: {stamp} is no date and hour. Rename it, or leave it out.") from e
    return Record(path, time, found["variable"] or UNNAMED)


def open_geotiffs(records: Sequence[Record]) -> xr.Dataset:
    """Join files along time, one variable for each name that stands behind the stamp; values are read when used.

    Returns:
        Variables (time, y, x) of float32, NaN where the file marks no data; time as the names have it.

    Raises:
        SourceError: a file that cannot be read, that is rotated, or that differs from the others in its grid.
    """
    import xarray as xr

    frame = _frame(records[0].path)
    groups = {r.variable: sorted((q for q in records if q.variable == r.variable), key=_time) for r in records}
    arrays = {
        name: xr.DataArray(
            _lazy([q.path for q in group], frame),
            dims=("time", "y", "x"),
            coords={"time": np.array([q.time for q in group], "datetime64[ns]")},
            attrs={"grid_mapping": "crs"} | ({"units": frame.units} if frame.units else {}),
        )
        for name, group in groups.items()
    }
    dataset = xr.Dataset(arrays, coords={"y": ("y", frame.y), "x": ("x", frame.x)})
    for name, standard in (("y", "projection_y_coordinate"), ("x", "projection_x_coordinate")):
        dataset[name].attrs |= {"standard_name": standard, "units": "m"}
    dataset["crs"] = ((), 0, {"crs_wkt": frame.wkt})
    return dataset


def _time(record: Record) -> datetime:
    return record.time


@dataclass(frozen=True)
class _Frame:
    """What all files of a series share."""

    y: NDArray[np.float64]
    x: NDArray[np.float64]
    wkt: str
    units: str


def _frame(path: str) -> _Frame:
    with _opened(path) as file:
        a = file.transform
        if a.b or a.d:
            raise SourceError(f"{path} is rotated. A north-up grid is needed; reproject it.")
        x = a.c + a.a * (np.arange(file.width) + 0.5)
        y = a.f + a.e * (np.arange(file.height) + 0.5)
        return _Frame(y, x, file.crs.to_wkt() if file.crs else "", (file.units or ("",))[0] or "")


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

    shape = (len(frame.y), len(frame.x))
    read = delayed(_read, pure=True)
    return da.stack([da.from_delayed(read(path, shape), shape, np.float32) for path in paths])


def _read(path: str, shape: tuple[int, int]) -> NDArray[np.float32]:
    with _opened(path) as file:
        if (file.height, file.width) != shape:
            raise SourceError(f"{path} has {file.height} x {file.width} cells; the first file has {shape}.")
        values: NDArray[np.float32] = np.ma.filled(file.read(1, masked=True).astype(np.float32), np.nan)
        return values
