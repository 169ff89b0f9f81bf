"""Places: which dimensions are horizontal, and the grid or the cells that their coordinates make."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stsr_core.errors import GridError, SourceError
from stsr_core.grids import Axis, Cells, Grid, around_nodes
from stsr_core.sources.bounds import bounds_of
from stsr_core.sources.units import length_in, radians_in

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray
    from pyproj import CRS

Y_NAMES = ("y", "lat", "latitude", "rlat", "projection_y_coordinate", "northing", "south_north", "nlat", "j")
X_NAMES = ("x", "lon", "longitude", "rlon", "projection_x_coordinate", "easting", "west_east", "nlon", "i")
Y_STANDARD = ("latitude", "grid_latitude", "projection_y_coordinate", "projection_y_angular_coordinate")
X_STANDARD = ("longitude", "grid_longitude", "projection_x_coordinate", "projection_x_angular_coordinate")
LATITUDES, LONGITUDES = ("lat", "latitude", "rlat"), ("lon", "longitude", "rlon")
LATITUDE_UNITS = ("degrees_north", "degree_north", "degree_n", "degrees_n")
LONGITUDE_UNITS = ("degrees_east", "degree_east", "degree_e", "degrees_e")
REGULARITY = 1e-3  # largest deviation of a regular axis, in steps
REPEATED = 0.01  # distance of places that are the same, in steps of their axis
GEOGRAPHIC = 4326
CRS_DEGREES = f"EPSG:{GEOGRAPHIC}"
POLE = 90.0 + 1e-6
SATELLITE_HEIGHT = "satellite height"  # the parameter of geostationary projections, as PROJ names it


@dataclass(frozen=True)
class Place:
    """Horizontal dimensions of an array, in its order (y, x) or (cell,), and where its cells are."""

    dims: tuple[str, ...]
    grid: Grid | Cells


def place_of(dataset: xr.Dataset, array: xr.DataArray, dims: tuple[str, ...], declared: str | None) -> Place:
    """Find the cells of an array.

    Args:
        dataset: holds coordinates, bounds, grid mapping and mesh.
        array: the precipitation.
        dims: its dimensions besides time: (y, x) in any order, or one that runs over cells.
        declared: declared CRS.

    Raises:
        SourceError: no coordinates that say where the cells are.
        GridError: coordinates or a CRS that make no cells.
    """
    if len(dims) == 1:
        return Place(dims, _mesh(dataset, array, dims[0]))
    y, x = _ordered(dataset, dims)
    stated = _stated_crs(dataset, array, declared)
    dataset = _with_axis(_with_axis(dataset, y, _is_latitude, stated), x, _is_longitude, stated)
    flat = _latitude_longitude(dataset, array, (y, x))
    crs = _crs_of_axes(dataset, y, x) if stated is None else stated
    if y in dataset.coords and x in dataset.coords and (crs is not None or flat is None):
        grid = _rectilinear(dataset, y, x, crs)
        if crs is not None and flat is not None and declared is None:
            _check_agreement(dataset, (y, x), crs, flat)
        return Place((y, x), grid)
    if flat is not None:
        return Place((y, x), _curvilinear(dataset, *flat, (y, x)))
    lacking = y if y not in dataset.coords else x
    raise SourceError(f"Dimension {lacking} has no coordinate. Cell centres are needed; add them.")


def repeating(dataset: xr.Dataset, dims: tuple[str, ...]) -> str | None:
    """Return the dimension whose last cells lie on its first, as longitudes from 0 to 360 do; None where none does."""
    for dim in dims:
        along = (dataset[name] for name in dataset.variables)
        for coordinate in (c for c in along if c.dims == (dim,) and c.dtype.kind in "fiu"):
            if _is_longitude(coordinate) or coordinate.attrs.get("standard_name") == "grid_longitude":
                turned = np.unwrap(_degrees(coordinate, coordinate), period=360.0)
                turn = abs(turned[-1] - turned[0])
                if abs(turn - 360.0) < REPEATED * turn / max(1, len(turned) - 1):
                    return dim
    return None


def _with_axis(dataset: xr.Dataset, dim: str, is_axis: Callable[[xr.DataArray], bool], crs: CRS | None) -> xr.Dataset:
    """Give a dimension the latitude or longitude that lies along it under another name, where it has no coordinate.

    A coordinate that does not say what it is, as numbers of rows do not, is none where the CRS is not projected.

    Raises:
        GridError: one that says so puts cells elsewhere.
    """
    along = (dataset[n] for n in dataset.variables if n != dim and dataset[n].dims == (dim,))
    found = [c for c in along if c.dtype.kind in "fiu" and is_axis(c)]
    if len(found) != 1:
        return dataset
    if dim in dataset.coords and dataset[dim].dtype.kind in "fiu":
        attributes = dataset[dim].attrs
        if _is_length(str(attributes.get("units", ""))) or (crs is not None and crs.is_projected):
            return dataset
        if attributes.keys() & {"units", "standard_name", "axis"}:
            _check_beside(dataset[dim], found[0])
            return dataset
    return dataset.assign_coords({dim: found[0].variable})


def _is_length(units: str) -> bool:
    return length_in(units, 1.0) is not None


def _check_beside(axis: xr.DataArray, beside: xr.DataArray) -> None:
    """Refuse an axis that is half a cell off the latitudes or longitudes that lie along it under another name."""
    own, other = _degrees(axis, axis), _degrees(beside, beside)
    off = np.abs((other - own + 180.0) % 360.0 - 180.0).max()
    if off > np.abs(np.diff(own)).min(initial=np.inf) / 2:
        raise GridError(
            f"Axis {axis.name} runs from {own[0]:.6g} to {own[-1]:.6g}, and {beside.name} along it from "
            f"{other[0]:.6g} to {other[-1]:.6g}. Remove the wrong one of the two."
        )


def _ordered(dataset: xr.Dataset, dims: tuple[str, ...]) -> tuple[str, str]:
    ys, xs = [d for d in dims if _is_axis(dataset, d, "Y")], [d for d in dims if _is_axis(dataset, d, "X")]
    for found, named in ((ys, LONGITUDES), (xs, LATITUDES)):
        for dim in found:
            if dim.lower() in named:
                raise GridError(
                    f"Axis {dim} has the units or attributes of the other axis; one is wrong. Mend the file."
                )
    if len(ys) == 1 and len(xs) == 1 and ys != xs:
        return ys[0], xs[0]
    raise SourceError(
        f"Dimensions {dims} were found beside time; y and x are needed, under their names, as lat and lon, or with "
        "the attribute `axis`. Declare `select:` of the source in catalog.yaml, or by --declare, for others, as "
        "`select: {level: 0}`."
    )


def is_horizontal(dataset: xr.Dataset, dim: str) -> bool:
    """Whether a dimension is known to be y or x."""
    return _is_axis(dataset, dim, "Y") or _is_axis(dataset, dim, "X")


def _is_axis(dataset: xr.Dataset, name: str, axis: str) -> bool:
    attributes: Mapping[str, object] = dataset[name].attrs if name in dataset.coords else {}
    if attributes.get("axis") in ("X", "Y"):
        return attributes["axis"] == axis
    if "standard_name" in attributes or "units" in attributes:
        for found, standard, units in (("Y", Y_STANDARD, LATITUDE_UNITS), ("X", X_STANDARD, LONGITUDE_UNITS)):
            if attributes.get("standard_name") in standard or str(attributes.get("units")).lower() in units:
                return axis == found
    return name.lower() in (Y_NAMES if axis == "Y" else X_NAMES)


def _is_latitude(coordinate: xr.DataArray) -> bool:
    return _named(coordinate, "latitude", ("lat", "latitude", "xlat", "nav_lat"), LATITUDE_UNITS)


def _is_longitude(coordinate: xr.DataArray) -> bool:
    return _named(coordinate, "longitude", ("lon", "longitude", "xlong", "nav_lon"), LONGITUDE_UNITS)


def _named(coordinate: xr.DataArray, standard: str, names: tuple[str, ...], units: tuple[str, ...]) -> bool:
    stated = coordinate.attrs.get("standard_name")
    if stated is not None:
        return str(stated) == standard
    return str(coordinate.attrs.get("units", "")).lower() in units or str(coordinate.name).lower() in names


def _latitude_longitude(
    dataset: xr.Dataset, array: xr.DataArray, dims: tuple[str, ...]
) -> tuple[xr.DataArray, xr.DataArray] | None:
    """Latitude and longitude over all of `dims`, if the file has them: named coordinates first."""
    wanted = set(dims)
    listed = str(array.encoding.get("coordinates", array.attrs.get("coordinates", ""))).split()
    names = [n for n in listed if n in dataset.variables] + [n for n in map(str, dataset.variables) if n not in listed]
    spread = [dataset[n] for n in names if wanted <= set(map(str, dataset[n].dims)) and n != array.name]
    spread.sort(key=lambda c: c.ndim)
    latitudes = [c for c in spread if _is_latitude(c)]
    longitudes = [c for c in spread if _is_longitude(c)]
    if not latitudes or not longitudes:
        return None
    return _still(latitudes[0], dims), _still(longitudes[0], dims)


def _still(coordinate: xr.DataArray, dims: tuple[str, ...]) -> xr.DataArray:
    """A coordinate over `dims` only: others, such as the time of WRF files, are dropped where the places do not move.

    Raises:
        GridError: they do.
    """
    first = coordinate.isel({d: 0 for d in coordinate.dims if d not in dims})
    last = coordinate.isel({d: -1 for d in coordinate.dims if d not in dims})
    if not np.array_equal(first.values, last.values, equal_nan=True):
        raise GridError(f"{coordinate.name} {coordinate.dims} moves with time. Read a part in which it does not.")
    return first.transpose(*dims)


def _stated_crs(dataset: xr.Dataset, array: xr.DataArray, declared: str | None) -> CRS | None:
    """The CRS that is declared, else that of the grid mapping."""
    from pyproj import CRS
    from pyproj.exceptions import CRSError

    named = array.attrs.get("grid_mapping") or array.encoding.get("grid_mapping")
    mapping = str(named).split(":")[0].strip() if named else ""
    try:
        if declared is not None:
            return CRS.from_user_input(declared)
        if mapping in dataset.variables:
            attributes = dict(dataset[mapping].attrs)
            if "spatial_ref" in attributes and "crs_wkt" not in attributes:
                attributes["crs_wkt"] = attributes["spatial_ref"]
            if "crs_wkt" in attributes or "grid_mapping_name" in attributes:
                return CRS.from_cf({k: _single(v) for k, v in attributes.items()})
    except (CRSError, KeyError, ValueError, TypeError) as e:
        what = f"The declared CRS {declared!r}" if declared is not None else f"The grid mapping {mapping!r}"
        why = f"it lacks {e}" if isinstance(e, KeyError) else str(e)
        raise GridError(
            f"{what} is not understood ({why}). Declare `crs:` of the source in catalog.yaml, or by --declare."
        ) from e
    return None


def _crs_of_axes(dataset: xr.Dataset, y: str, x: str) -> CRS | None:
    """The CRS of axes that are latitude and longitude."""
    from pyproj import CRS

    if y in dataset.coords and x in dataset.coords and _is_latitude(dataset[y]) and _is_longitude(dataset[x]):
        return CRS.from_epsg(GEOGRAPHIC)
    return None


def _single(value: object) -> object:
    """A number for a list of one, which some libraries write and pyproj does not take."""
    return value[0] if isinstance(value, list | tuple | np.ndarray) and np.ndim(value) and len(value) == 1 else value


def _rectilinear(dataset: xr.Dataset, y: str, x: str, crs: CRS | None) -> Grid | Cells:
    """A regular grid where both axes are regular and their bounds, if any, agree; else the cells of the bounds."""
    centres = [_coordinate(dataset, name, crs) for name in (y, x)]
    axes, pairs = [], []
    for name, along in zip((y, x), centres, strict=True):
        pair = _pairs(dataset, name, along, crs)
        axis = _regular(along, dataset[name].dtype == np.float32, pair, name)
        is_longitude = crs is not None and crs.is_geographic and not _is_latitude(dataset[name])
        axes.append(_closed(axis, along) if axis is not None and is_longitude else axis)
        pairs.append(pair)
    if crs is not None and crs.is_geographic:
        _check_latitudes(centres[0])
    if axes[0] is not None and axes[1] is not None:
        return Grid(axes[0], axes[1], None if crs is None else crs.to_wkt())
    if crs is None:
        raise GridError(
            f"Axis {y if axes[0] is None else x} is not regular, and the file has no CRS. Declare `crs:` of the source."
        )
    ys, xs = (_pairs_between(c) if p is None else p for c, p in zip(centres, pairs, strict=True))
    if crs.is_geographic:
        ys = np.clip(ys, -90.0, 90.0)
    corners = [np.stack(np.meshgrid(xs[:, i], ys[:, j]), axis=-1) for j, i in ((0, 0), (0, 1), (1, 1), (1, 0))]
    return Cells(np.stack(corners, axis=-2).reshape(-1, 4, 2), crs.to_wkt())


def _check_agreement(
    dataset: xr.Dataset, dims: tuple[str, str], crs: CRS, flat: tuple[xr.DataArray, xr.DataArray]
) -> None:
    """Refuse axes and a grid mapping that put cells elsewhere than the latitudes and longitudes of the same file.

    Compared are the corners and the middle of the grid, to half a cell.
    """
    from pyproj import Geod, Transformer

    y, x = (_coordinate(dataset, name, crs) for name in dims)
    if len(y) < 2 or len(x) < 2:
        return
    rows, columns = np.array([[0, 0], [0, -1], [-1, 0], [-1, -1], [len(y) // 2, len(x) // 2]]).T
    to_degrees = Transformer.from_crs(crs, CRS_DEGREES, always_xy=True)
    longitude, latitude = to_degrees.transform(x[columns], y[rows])
    stated = [np.asarray(c.values, np.float64)[rows, columns] for c in flat]
    known = np.isfinite([*stated, longitude, latitude]).all(axis=0)
    if not known.any():
        return
    ground = Geod(ellps="WGS84")
    off = ground.inv(longitude[known], latitude[known], stated[1][known], stated[0][known])[2]
    near = np.array([len(y) // 2, len(y) // 2 - 1]), np.array([len(x) // 2, len(x) // 2 - 1])
    east, north = to_degrees.transform(x[near[1]], y[near[0]])
    cell = ground.inv(east[0], north[0], east[1], north[1])[2] / math.sqrt(2)
    if off.max() > cell / 2:
        raise GridError(
            f"The grid mapping and axes of the file put a cell {off.max() / 1000:.1f} km from where its {flat[0].name} "
            f"and {flat[1].name} say it is. Declare `crs:` of the source in catalog.yaml, or by --declare: the right "
            "projection of its axes."
        )


def _coordinate(dataset: xr.Dataset, name: str, crs: CRS | None) -> NDArray[np.float64]:
    """Centres along an axis in units of the CRS; longitudes that jump are made to run on."""
    coordinate = dataset[name]
    if coordinate.ndim != 1 or not np.issubdtype(coordinate.dtype, np.number):
        raise SourceError(f"Coordinate {name} is no list of numbers, but {coordinate.dtype} {coordinate.shape}.")
    values = _in_crs(coordinate, coordinate, crs)
    if not np.isfinite(values).all():
        raise GridError(f"Axis {name} holds missing or infinite values. Every cell needs its place.")
    if crs is not None and crs.is_geographic and not _is_latitude(coordinate):
        return np.asarray(np.unwrap(values, period=360.0), dtype=np.float64) if values.size > 1 else values
    return values


def _in_crs(values: xr.DataArray, coordinate: xr.DataArray, crs: CRS | None) -> NDArray[np.float64]:
    """Values in the units of a coordinate as numbers in those of the CRS, in degrees without one."""
    if crs is None or not crs.is_projected:
        return _degrees(values, coordinate)
    return np.asarray(values.values, dtype=np.float64) * _axis_scale(coordinate, crs)


def _axis_scale(coordinate: xr.DataArray, crs: CRS) -> float:
    """What one unit of the coordinate is in units of a projected CRS; coordinates without units are in those.

    Angles that a geostationary satellite scans, as CF has them, are lengths over its height.
    """
    units = str(coordinate.attrs.get("units", ""))
    if not units:
        return 1.0
    metres, height, angle = float(crs.axis_info[0].unit_conversion_factor), _satellite_height_m(crs), radians_in(units)
    if height is not None and angle is not None:
        return angle * height / metres
    scale = length_in(units, metres)
    if scale is None:
        raise GridError(f"Axis {coordinate.name} is in {units!r}, which is no length, but its CRS is projected.")
    return scale


def _satellite_height_m(crs: CRS) -> float | None:
    """Height of the satellite of a geostationary projection [m]; None of other projections."""
    parameters = [] if crs.coordinate_operation is None else crs.coordinate_operation.params
    found = [float(p.value) * p.unit_conversion_factor for p in parameters if p.name.lower() == SATELLITE_HEIGHT]
    return found[0] if found else None


def _pairs(dataset: xr.Dataset, name: str, centres: NDArray[np.float64], crs: CRS | None) -> NDArray[np.float64] | None:
    """Bounds of the cells of an axis, (n, 2), None where the file has none."""
    bounds = bounds_of(dataset[name])
    if bounds not in dataset.variables or dataset[bounds].ndim != 2 or name not in dataset[bounds].dims:
        return None
    pairs = dataset[bounds].transpose(name, ...)
    if pairs.shape[1] != 2:
        return None
    values = _in_crs(pairs, dataset[name], crs)
    if crs is not None and crs.is_geographic and not _is_latitude(dataset[name]):
        values = centres[:, None] + (values - centres[:, None] + 180.0) % 360.0 - 180.0
        if centres.size == 1 or np.any(values[:, 1] == values[:, 0]):
            values = _degrees(pairs, dataset[name])
    slack = 1e-6 * np.abs(values).max()
    low, high = values.min(axis=1), values.max(axis=1)
    if not np.isfinite(values).all() or (low > centres + slack).any() or (high < centres - slack).any():
        raise GridError(f"Bounds {bounds} do not hold the centres of axis {name}. Mend or remove them.")
    return values


def _regular(centres: NDArray[np.float64], single: bool, pairs: NDArray[np.float64] | None, name: str) -> Axis | None:
    """The regular axis of centres whose bounds agree; None where they make none."""
    if centres.size == 1:
        if pairs is None:
            raise GridError(f"Axis {name} has one cell, so its spacing is unknown. At least two cells are needed.")
        step, first = float(pairs[0, 1] - pairs[0, 0]), float(centres[0])
        return Axis(first, step, 1) if abs(pairs[0].mean() - first) <= REGULARITY * abs(step) else None
    step = float((centres[-1] - centres[0]) / (centres.size - 1))
    off = np.abs(centres - (centres[0] + step * np.arange(centres.size)))
    direction = np.diff(centres)
    if not ((direction > 0).all() or (direction < 0).all()):
        raise GridError(f"Axis {name} runs neither up nor down all the way. Sort it.")
    if off.max() > REGULARITY * abs(step):
        return None
    first = float(centres[0])
    if single:  # noise in its last digits, which a lattice in absolute place must not see
        first, step = float(f"{first:.7g}"), float(f"{step:.6g}")
    axis = Axis(first, step, int(centres.size))
    if pairs is not None and not _agree(axis, pairs):
        return None
    return axis


def _closed(axis: Axis, centres: NDArray[np.float64]) -> Axis:
    """The axis with steps that make a full circle exactly where its longitudes do, but for the digits they have."""
    if axis.size < 2:
        return axis
    turn = axis.size * abs(float(centres[-1] - centres[0])) / (axis.size - 1)
    if abs(turn - 360.0) > REPEATED * abs(axis.step):
        return axis
    return Axis(axis.first, math.copysign(360.0 / axis.size, axis.step), axis.size)


def _agree(axis: Axis, pairs: NDArray[np.float64]) -> bool:
    edges = np.sort(np.stack((axis.edges[:-1], axis.edges[1:]), axis=1), axis=1)
    return bool((np.abs(np.sort(pairs, axis=1) - edges) <= 10 * REGULARITY * abs(axis.step)).all())


def _pairs_between(centres: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bounds half way between centres, (n, 2); the outer ones as far out as their neighbours are in."""
    middle = (centres[:-1] + centres[1:]) / 2
    edges = np.concatenate(([2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]))
    return np.stack((edges[:-1], edges[1:]), axis=1)


def _curvilinear(dataset: xr.Dataset, latitude: xr.DataArray, longitude: xr.DataArray, dims: tuple[str, ...]) -> Cells:
    """Cells of 2-D latitudes and longitudes: their bounds, else corners half way between centres."""
    corners = _vertices(dataset, latitude, longitude, dims)
    if corners is None:
        if min(latitude.shape) < 2:
            raise GridError(f"A grid of {latitude.shape} centres without bounds has no known cell size.")
        _check_latitudes(np.asarray(latitude.values, np.float64))
        corners = _corners_between(np.asarray(latitude.values, np.float64), np.asarray(longitude.values, np.float64))
    return _cells(corners)


def _vertices(
    dataset: xr.Dataset, latitude: xr.DataArray, longitude: xr.DataArray, dims: tuple[str, ...]
) -> NDArray[np.float64] | None:
    """Corners (N, V, 2) that the bounds of latitude and longitude give, None where there are none."""
    found = []
    for coordinate in (longitude, latitude):
        name = bounds_of(coordinate)
        if name not in dataset.variables or dataset[name].ndim != len(dims) + 1:
            return None
        bounds = dataset[name].transpose(*dims, ...)
        found.append(_degrees(bounds, coordinate).reshape(-1, bounds.shape[-1]))
    if found[0].shape != found[1].shape:
        raise GridError("Bounds of latitude and longitude have different numbers of corners. Mend or remove them.")
    return np.stack(found, axis=-1)


def _degrees(values: xr.DataArray, coordinate: xr.DataArray) -> NDArray[np.float64]:
    """Values in degrees where they are in radians, else as they are."""
    radians = str(coordinate.attrs.get("units", values.attrs.get("units", ""))).lower().startswith("rad")
    numbers = np.asarray(values.values, dtype=np.float64)
    return np.asarray(np.rad2deg(numbers)) if radians else numbers


def _corners_between(latitude: NDArray[np.float64], longitude: NDArray[np.float64]) -> NDArray[np.float64]:
    """Corners (N, 4, 2) half way between centres (Y, X), on the sphere, so that no meridian is special."""
    lat, lon = np.deg2rad(latitude), np.deg2rad(longitude)
    centre = np.stack((np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)), axis=-1)
    for axis in (0, 1):
        first, second, butlast, last = (centre.take([i], axis) for i in (0, 1, -2, -1))
        centre = np.concatenate((2 * first - second, centre, 2 * last - butlast), axis=axis)
    node = (centre[:-1, :-1] + centre[:-1, 1:] + centre[1:, 1:] + centre[1:, :-1]) / 4
    x, y, z = np.moveaxis(node, -1, 0)
    return around_nodes(np.rad2deg(np.stack((np.arctan2(y, x), np.arctan2(z, np.hypot(x, y))), axis=-1)))


def _cells(corners: NDArray[np.float64]) -> Cells:
    """Cells in longitude and latitude; every ring is unwrapped around its first corner, latitudes are checked."""
    from pyproj import CRS

    first = corners[:, :1, 0]
    unwrapped = corners.copy()
    unwrapped[..., 0] = first + (corners[..., 0] - first + 180.0) % 360.0 - 180.0
    _check_latitudes(unwrapped[..., 1])
    return Cells(unwrapped, CRS.from_epsg(GEOGRAPHIC).to_wkt())


def _check_latitudes(latitude: NDArray[np.float64]) -> None:
    largest = float(np.nanmax(np.abs(latitude), initial=0.0))
    if largest > POLE:
        raise GridError(f"Latitudes reach {largest:.4g} degrees. Are latitude and longitude swapped?")


def _mesh(dataset: xr.Dataset, array: xr.DataArray, dim: str) -> Cells:
    """Cells of an unstructured mesh: by UGRID topology, or by bounds of latitude and longitude."""
    for name in map(str, dataset.variables):
        topology = dataset[name].attrs
        if topology.get("cf_role") == "mesh_topology" and topology.get("face_node_connectivity") in dataset.variables:
            faces = dataset[topology["face_node_connectivity"]]
            if dim in faces.dims:
                return _cells(_ugrid(dataset, topology, faces.transpose(dim, ...)))
    flat = _latitude_longitude(dataset, array, (dim,))
    corners = None if flat is None else _vertices(dataset, flat[0], flat[1], (dim,))
    if corners is None:
        raise SourceError(
            f"Cells along {dim!r} have no outlines: a UGRID mesh, or latitude and longitude with bounds, are needed; "
            "numbers of cells alone, as of HEALPix, are not read. Add them, or regrid the file first."
        )
    return _cells(corners)


def _ugrid(dataset: xr.Dataset, topology: Mapping[str, object], faces: xr.DataArray) -> NDArray[np.float64]:
    names = str(topology.get("node_coordinates", "")).split()
    nodes = [dataset[n] for n in names if n in dataset.variables]
    longitudes, latitudes = [n for n in nodes if _is_longitude(n)], [n for n in nodes if _is_latitude(n)]
    if not longitudes or not latitudes:
        raise SourceError(f"The mesh names node coordinates {names}; longitude and latitude of its nodes are needed.")
    index = np.asarray(faces.values, dtype=np.float64)
    missing = ~np.isfinite(index) | (index < 0)
    raw_fill = faces.attrs.get("_FillValue", faces.encoding.get("_FillValue"))
    if raw_fill is not None:
        missing |= index == float(raw_fill)
    start = int(faces.attrs.get("start_index", 0))
    position = np.where(missing, 0, index - start).astype(np.int64)
    if position.min(initial=0) < 0 or position.max(initial=0) >= nodes[0].size:
        raise SourceError(
            f"The mesh names node {int(position.max()) + start}, but has {nodes[0].size} nodes counted from {start}. "
            "Mend its connectivity or `start_index`."
        )
    corners = np.stack([_degrees(c, c)[position] for c in (longitudes[0], latitudes[0])], axis=-1)
    corners[missing] = np.nan
    return corners
