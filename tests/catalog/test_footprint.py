"""Footprints of grids in places where longitudes jump, and boxes around two of them."""

import json
from dataclasses import replace

import pytest
import shapely
from pyproj import CRS, Transformer

from stsr_core.catalog.documents import Documents
from stsr_core.catalog.footprint import footprint, union
from stsr_core.catalog.index import Query
from stsr_core.catalog.publish import publish
from stsr_core.catalog.search import search
from stsr_core.catalog.snapshot import Loaded
from stsr_core.grids import Axis, Grid
from tests.catalog.made import LAYOUT, prepared, publication, publish_one


def grid(epsg, x_min, y_min, cells, step):
    wkt = CRS.from_epsg(epsg).to_wkt() if epsg else None
    return Grid(Axis(y_min + step / 2, step, cells), Axis(x_min + step / 2, step, cells), wkt)


PROVENCE = grid(2154, 850_000, 6_200_000, 250, 1000.0)
FIJI = grid(3832, 3_050_000, -2_300_000, 300, 2000.0)
ARCTIC = grid(3413, -1_000_000, -1_000_000, 200, 10_000.0)
ANTARCTIC = grid(3031, -900_000, -1_100_000, 200, 10_000.0)
EAST = grid(4326, 170, -20, 20, 0.5)  # ends at 180 degrees, and does not cross


@pytest.mark.parametrize(
    ("where", "kind", "box"),
    [
        (PROVENCE, "Polygon", (4.8, 42.8, 8.1, 45.1)),
        (FIJI, "MultiPolygon", (177.4, -20.4, -177.2, -15.2)),
        (ARCTIC, "Polygon", (-180.0, 77.0, 180.0, 90.0)),
        (ANTARCTIC, "Polygon", (-180.0, -90.0, 180.0, -75.75)),
        (EAST, "Polygon", (170.0, -20.0, 180.0, -10.0)),
        (grid(None, 0, 0, 2, 1.0), "Polygon", (-180.0, -90.0, 180.0, 90.0)),
    ],
)
def test_a_footprint_is_valid_and_its_box_holds_it(where, kind, box):
    found, geometry = footprint(where)
    shape = shapely.from_geojson(json.dumps(geometry))
    assert found == pytest.approx(box, abs=0.06)
    assert geometry["type"] == kind
    assert shape.is_valid
    assert all(part.exterior.is_ccw for part in shapely.get_parts(shape))


@pytest.mark.parametrize("where", [PROVENCE, FIJI, ARCTIC, ANTARCTIC])
def test_a_footprint_holds_the_cells_of_its_grid_and_no_others(where):
    shape = shapely.from_geojson(json.dumps(footprint(where)[1]))
    to_degrees = Transformer.from_crs(CRS.from_wkt(where.crs_wkt), 4326, always_xy=True).transform
    (x0, x1), (y0, y1) = ((axis.edges[0], axis.edges[-1]) for axis in (where.x, where.y))
    for share, inside in ((0.5, True), (0.02, True), (0.98, True), (-0.05, False), (1.05, False)):
        point = shapely.Point(*to_degrees(x0 + share * (x1 - x0), y0 + 0.5 * (y1 - y0)))
        assert shape.intersects(point) == inside  # the pole lies on the edge of the map


@pytest.mark.parametrize(
    ("one", "other", "around"),
    [
        ((1, 2, 3, 4), (2, 0, 5, 3), (1, 0, 5, 4)),
        ((177, -20, -177, -15), (177, -20, -177, -15), (177, -20, -177, -15)),
        ((177, -20, -177, -15), (-179, 0, -170, 1), (177, -20, -170, 1)),
        ((170, 0, -170, 1), (160, 0, 165, 1), (160, 0, -170, 1)),
        ((170, 0, -170, 1), (-180, 0, 180, 1), (-180, 0, 180, 1)),
    ],
)
def test_the_box_around_two_may_cross_the_antimeridian(one, other, around):
    assert union(one, other) == list(around)
    assert union(other, one) == list(around)


def test_what_crosses_the_antimeridian_is_published_found_and_served(tmp_path):
    publish_one(tmp_path)
    attempt = prepared(tmp_path)
    publish(attempt, replace(publication(attempt), layout=replace(LAYOUT, grid=FIJI)))

    def found(*bbox):
        return {v.version for v in search(str(tmp_path), Query(bbox=bbox))}

    assert found(178, -18, 179, -17) == found(-179, -18, -178, -17) == found(179, -18, -179, -17) == {"v2"}
    assert found(170, -90, -177.5, 90) == found(179.9, -18, -179.9, -17) == {"v2"}
    assert found(0, -90, 100, 90) == {"v1"}
    assert found(-176, -18, 170, -17) == set()
    served, _ = Loaded(Documents(str(tmp_path))).current().search(Query(bbox=(178, -18, 179, -17)))
    west, _, east, _ = served[0]["bbox"]
    assert west > east
    assert shapely.geometry.shape(served[0]["geometry"]).geom_type == "MultiPolygon"
