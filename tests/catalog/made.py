"""A small real version, made of every group and side file that a publication needs."""

from datetime import datetime, timedelta

import numpy as np
from pyproj import CRS

from stsr_core.catalog.items import Description, Entries, Provenance
from stsr_core.catalog.publish import Attempt, Publication, publish, quality_json
from stsr_core.configuration import Product, Source, TargetGrid
from stsr_core.grids import Axis, Grid, TimeAxis
from stsr_core.store.coarse import write_coarse
from stsr_core.store.group import finish
from stsr_core.store.layout import StoreLayout, create_ensemble, write_shard
from stsr_core.store.overview import write_overview
from stsr_core.store.pictures import cog, summary, thumbnail
from stsr_core.store.series import write_series
from stsr_core.store.verify import Gate, GateReport

WKT = CRS.from_epsg(2154).to_wkt()
LAYOUT = StoreLayout(
    members=2,
    times=TimeAxis(datetime(2018, 5, 1), timedelta(hours=1), 2),
    grid=Grid(Axis(6_445_500.0, -1000.0, 4), Axis(850_500.0, 1000.0, 4), WKT),
    member_block=4,
    time_block=2,
    tile=(4, 4),
    attributes={"title": "Rain", "institution": "tests", "source": "tests", "history": "made for a test"},
)
COARSE_GRID = Grid(Axis(6_445_000.0, -2000.0, 2), Axis(851_000.0, 2000.0, 2), WKT)
DESCRIPTION = Description("rain", "Rain", "Rain at 1 km.", "etalab-2.0", "METEO FRANCE", ("rain",))
ENTRIES = Entries(
    product=Product(title="Rain", description="Rain at 1 km.", source="model", grid="box", members=2, seed=1),
    source=Source(
        url="s3://bucket/in.nc", variable="pr", units="mm/h", select={"number": 0}, description="Rain",
        license="etalab-2.0", attribution="METEO FRANCE",
    ),
    grid=TargetGrid(
        crs="EPSG:2154", spacing_m=1000.0, x_min=850_000.0, x_max=854_000.0, y_min=6_442_000.0, y_max=6_446_000.0
    ),
)  # fmt: skip
PROVENANCE = Provenance(
    source_url="s3://bucket/in.nc", source_fingerprint="f" * 64, source_attribution="METEO FRANCE",
    source_license="etalab-2.0", requested_factor=(9.4, 1.0), factor=(2, 1), spacing_km=1, match_distance=0.06,
    beta=0.02, noise={"beside": 0.0, "before": 0.0}, context_length=12,
    conservation={"threshold_mm": 0.05, "limit": None}, conserved=True, checkpoint="small",
    checkpoint_digest="c" * 64, network_evaluations=8, code_version="0.1.0", seed=1, members=2, scores={"crps": 0.5},
    configuration=ENTRIES,
)  # fmt: skip
GOOD = GateReport(gates=(Gate(name="closure", passed=True, found="0 quanta", needed="0 quanta"),))
SIDE_FILES = {
    "quality": "quality.json", "map": "map.tif", "thumbnail": "thumbnail.png", "quicklook": "quicklook.png",
}  # fmt: skip
CHECKPOINT = "checkpoints/cccccccccccccccc/checkpoint.json"


def write_stores(attempt: Attempt, value: int) -> None:
    """Write all groups: every cell of every member holds `value` quanta."""
    options, ensemble = attempt.documents.options, attempt.group_url("ensemble")
    create_ensemble(ensemble, LAYOUT, array="precipitation", options=options)
    region = (slice(0, 2), slice(0, 2), slice(0, 4), slice(0, 4))
    write_shard(ensemble, "precipitation", region, np.full(LAYOUT.shape, value, np.uint16), options)
    finish(ensemble, LAYOUT.attributes, options)
    write_series(ensemble, "precipitation", attempt.group_url("series"), LAYOUT, options)
    write_overview(ensemble, "precipitation", attempt.group_url("overview"), LAYOUT, options)
    coarse = np.full((2, 2, 2), value * 0.01, np.float32)
    write_coarse(attempt.group_url("coarse"), [coarse], LAYOUT.times, COARSE_GRID, LAYOUT.attributes, options)


def prepared(destination: object, value: int = 7, options: dict[str, object] | None = None) -> Attempt:
    attempt = Attempt.begin(str(destination), "rain", options)
    write_stores(attempt, value)
    return attempt


def publication(attempt: Attempt, report: GateReport = GOOD) -> Publication:
    bands = summary(attempt.group_url("overview"), attempt.documents.options)
    write = attempt.write_side_file
    side = {
        "quality": write("quality.json", quality_json(report), "application/json", "Quality report", "metadata"),
        "map": write("map.tif", cog(bands, LAYOUT.grid), "image/tiff", "Maps", "overview"),
        "thumbnail": write("thumbnail.png", thumbnail(bands[0], LAYOUT.grid), "image/png", "Total", "thumbnail"),
        "quicklook": write("quicklook.png", b"png", "image/png", "Quick look", "overview"),
    }
    return Publication(DESCRIPTION, LAYOUT, PROVENANCE, report, side, CHECKPOINT, {})


def publish_one(destination: object, value: int = 7, options: dict[str, object] | None = None) -> str:
    attempt = prepared(destination, value, options)
    return publish(attempt, publication(attempt)).version
