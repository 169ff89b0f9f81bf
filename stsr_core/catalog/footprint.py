"""Where a grid is, in longitude and latitude, by the rules of GeoJSON.

What crosses the antimeridian is cut there, and the west of its box is greater than the east. What holds a pole reaches
round the globe and up to it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from stsr_core.grids import Grid

EDGE_POINTS = 21  # points along an edge of the footprint
WORLD = (-180.0, -90.0, 180.0, 90.0)
TURNS = (-360.0, 0.0, 360.0)  # how far a continued longitude may be from the one between -180 and 180


def footprint(grid: Grid) -> tuple[list[float], dict[str, Any]]:
    """Bounding box and GeoJSON geometry of a grid (WGS 84); the world where the CRS is unknown."""
    import shapely

    if grid.crs_wkt is None:
        return list(WORLD), json.loads(shapely.to_geojson(shapely.box(*WORLD)))
    lon, lat = _outline(grid, grid.crs_wkt)
    if round_a_pole := abs(lon[-1] - lon[0]) > 180:
        pole = 90.0 if lat.mean() > 0 else -90.0
        lon, lat = np.append(lon, [lon[-1], lon[0]]), np.append(lat, [pole, pole])
    parts = _cut(lon, lat)
    shape = parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)
    west, south, east, north = (float(v) for v in shape.bounds)
    if len(parts) > 1 and not round_a_pole and np.ptp(lon) < 360:
        west, east = (round(_wrapped(float(v)), 6) for v in (lon.min(), lon.max()))
    return [west, south, east, north], json.loads(shapely.to_geojson(shape))


def _outline(grid: Grid, wkt: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Closed ring around a grid; its longitudes go on beyond 180, and end a turn further if it goes round a pole."""
    from pyproj import CRS, Transformer

    x, y = grid.x.edges, grid.y.edges
    px = np.concatenate([np.linspace(x[0], x[-1], EDGE_POINTS), np.full(EDGE_POINTS, x[-1]),
                         np.linspace(x[-1], x[0], EDGE_POINTS), np.full(EDGE_POINTS, x[0])])  # fmt: skip
    py = np.concatenate([np.full(EDGE_POINTS, y[0]), np.linspace(y[0], y[-1], EDGE_POINTS),
                         np.full(EDGE_POINTS, y[-1]), np.linspace(y[-1], y[0], EDGE_POINTS)])  # fmt: skip
    lon, lat = Transformer.from_crs(CRS.from_wkt(wkt), 4326, always_xy=True).transform(px, py)
    return np.unwrap(np.append(lon, lon[0]), period=360), np.append(lat, lat[0])


def _cut(lon: NDArray[np.float64], lat: NDArray[np.float64]) -> list[Any]:
    """Polygons between -180 and 180 degrees east that a ring encloses, their corners counter-clockwise."""
    import shapely

    whole = shapely.make_valid(shapely.Polygon(np.column_stack([lon, lat]).round(6)))
    pieces = []
    for turn in TURNS:
        inside = shapely.intersection(whole, shapely.box(turn - 180, -90, turn + 180, 90))
        pieces.append(shapely.transform(inside, lambda c, turn=turn: (c - [turn, 0]).round(6)))
    parts = shapely.get_parts(shapely.union_all(pieces))  # what goes round a pole meets itself where it began
    return [shapely.geometry.polygon.orient(part) for part in parts if part.geom_type == "Polygon"]


def _wrapped(lon: float) -> float:
    return (lon + 180) % 360 - 180


def union(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Box around two boxes; where one crosses the antimeridian the narrower of those that hold both."""
    boxes = (one, other)
    west, east = min(b[0] for b in boxes), max(b[2] for b in boxes)
    if any(b[0] > b[2] for b in boxes):
        widths = {b[0]: max((c[0] - b[0]) % 360 + _width(c) for c in boxes) for b in boxes}
        west = min(widths, key=lambda start: widths[start])
        east = round(_wrapped(west + widths[west]), 6)
        west, east = (west, east) if widths[west] < 360 else (WORLD[0], WORLD[2])
    return [west, min(b[1] for b in boxes), east, max(b[3] for b in boxes)]


def _width(box: Sequence[float]) -> float:
    return box[2] - box[0] if box[0] <= box[2] else box[2] - box[0] + 360
