"""Readers over plain http from a real S3 server: without our code, in a handful of requests."""

import subprocess
import sysconfig
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pystac
import pytest
import rasterio
import xarray as xr
from zarr.storage import FsspecStore, WrapperStore

import stsr_core.catalog
from stsr_core.catalog import Query
from stsr_core.catalog.documents import Documents
from stsr_core.catalog.integrity import verify_version
from stsr_core.catalog.server import make_app
from stsr_core.catalog.snapshot import Loaded
from stsr_core.grids import Axis, Grid, TimeAxis
from stsr_core.store.group import finish
from stsr_core.store.layout import StoreLayout, create_ensemble, write_shard
from stsr_core.store.overview import write_overview
from stsr_core.store.series import write_series
from tests.catalog.made import WKT, publish_one
from tests.real import seaweed
from tests.real.listening import listening

CHECKER = Path(sysconfig.get_path("scripts")) / "compliance-checker"


@pytest.fixture(scope="module")
def web(s3):
    """Catalogue on S3, read without keys over plain http; yields its http address."""
    url = s3.make_bucket(seaweed.PUBLIC)
    publish_one(url, 7, s3.options)
    return f"{s3.endpoint}/{seaweed.PUBLIC}"


def item_of(web):
    """Latest item, found with pystac alone."""
    catalog = pystac.Catalog.from_file(f"{web}/catalog.json")
    return max(catalog.get_items(recursive=True), key=lambda item: item.properties["created"])


def test_pystac_and_xarray_open_a_version_over_http(web):
    item = item_of(web)
    assert item.id == "rain-v1"
    data = xr.open_zarr(item.assets["ensemble"].get_absolute_href(), chunks=None)
    assert data["precipitation"].values == pytest.approx(np.full((2, 2, 4, 4), 0.07))
    for group in ("series", "overview", "coarse"):
        assert xr.open_zarr(item.assets[group].get_absolute_href(), chunks=None).sizes["time"] == 2


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("group", "variable"), [(g, "precipitation") for g in ("ensemble", "series")] + [("overview", "mean")]
)
def test_xpystac_opens_the_assets(web, group, variable):
    item = item_of(web)
    item.make_asset_hrefs_absolute()
    assert float(xr.open_dataset(item.assets[group], engine="stac")[variable].max()) == pytest.approx(0.07)


def test_pystac_client_walks_the_static_catalogue(web):
    from pystac_client import Client
    from pystac_client.warnings import FallbackToPystac, NoConformsTo

    with pytest.warns((NoConformsTo, FallbackToPystac)):  # it is no API, and it says so
        client = Client.open(f"{web}/catalog.json")
        items = list(client.get_items(recursive=True))
    assert [i.id for i in items] == ["rain-v1"]


def test_pystac_client_searches_the_api_and_the_assets_it_names_open(s3, web):
    """As in the README: `stsr catalog serve` on the bucket, and assets by their address for everybody."""
    from pystac_client import Client

    bucket = Loaded(Documents(f"s3://{seaweed.PUBLIC}", s3.options))
    with listening(make_app(bucket, public=web)) as url:
        found = Client.open(url).search(collections=["rain"], bbox=(4, 44, 6, 46), filter="deprecated = false")
        [item] = found.items()
    data = xr.open_zarr(item.assets["ensemble"].href, chunks=None)
    assert float(data["precipitation"].max()) == pytest.approx(0.07)


def test_gdal_reads_the_map_over_http(web):
    with rasterio.open(item_of(web).assets["map"].get_absolute_href()) as data:
        assert data.read(1).mean() == pytest.approx(0.14)


def test_our_reader_searches_opens_and_verifies_over_http(web):
    [hit] = stsr_core.catalog.search(web, Query(bbox=(4, 44, 6, 46)))
    assert hit.version == "v1"
    assert float(stsr_core.catalog.open("rain", catalog=web)["precipitation"].max()) == pytest.approx(0.07)
    folder, _, name = hit.url.rpartition("/")
    assert verify_version(folder, item_name=name).sound


YEAR = StoreLayout(
    members=16,
    times=TimeAxis(datetime(2018, 1, 1), timedelta(hours=1), 8760),
    grid=Grid(Axis(6_445_500.0, -1000.0, 4), Axis(850_500.0, 1000.0, 4), WKT),
    member_block=16,
    time_block=8760,
    tile=(4, 4),
    attributes={"title": "A year"},
)


class Counting(WrapperStore):
    """Count the requests of a reader, and the bytes that answer them."""

    requests = 0
    bytes = 0

    async def get(self, key, prototype, byte_range=None):
        found = await super().get(key, prototype, byte_range)
        Counting.requests += 1
        Counting.bytes += len(found) if found is not None else 0
        return found


@pytest.fixture(scope="module")
def year(s3, web, tmp_path_factory):
    """A year of 16 members as series and overview on the server, and the values."""
    local = str(tmp_path_factory.mktemp("year"))
    rng = np.random.default_rng(1)
    values = np.maximum(0, rng.normal(-500, 400, YEAR.shape)).astype(np.uint16)  # one hour in ten is wet
    create_ensemble(local, YEAR, array="precipitation")
    write_shard(local, "precipitation", tuple(slice(0, n) for n in YEAR.shape), values)
    finish(local, {})
    target = f"s3://{seaweed.PUBLIC}/year"
    write_series(local, "precipitation", f"{target}/series", YEAR, s3.options)
    write_overview(local, "precipitation", f"{target}/overview", replace(YEAR, time_block=730), s3.options)
    return f"{s3.endpoint}/{seaweed.PUBLIC}/year", values


def counted(url, read):
    """Value that `read` makes of the dataset at a URL, and what it took after the dataset was opened."""
    data = xr.open_dataset(Counting(FsspecStore.from_url(url)), engine="zarr", chunks=None)
    Counting.requests = Counting.bytes = 0
    return read(data), Counting.requests, Counting.bytes


def test_a_year_at_a_point_and_a_map_are_a_handful_of_requests(year):
    url, values = year
    point, requests, size = counted(f"{url}/series", lambda d: d["precipitation"].isel(y=3, x=2).values)
    np.testing.assert_allclose(point, values[:, :, 3, 2] * 0.01, atol=1e-4)
    print(f"a year of 16 members at a point: {requests} requests, {size} bytes;", end=" ")
    assert requests <= 3
    assert size < 4_000_000
    drawn, requests, size = counted(f"{url}/overview", lambda d: d["mean"].isel(time=17).values)
    np.testing.assert_allclose(drawn, values[:, 17].mean(axis=0) * 0.01, atol=1e-4)
    print(f"a map: {requests} requests, {size} bytes")
    assert requests <= 3


@pytest.mark.parametrize("group", ["ensemble", "series", "overview", "coarse"])
def test_groups_meet_the_cf_conventions(web, tmp_path, group):
    """The compliance checker reads NetCDF, so each group is written as one, with nothing added."""
    data = xr.open_zarr(item_of(web).assets[group].get_absolute_href(), decode_cf=False, chunks=None)
    path = tmp_path / f"{group}.nc"
    for variable in data.variables.values():
        variable.encoding = {"_FillValue": variable.attrs.pop("_FillValue", None)}  # else xarray adds NaN
    data.to_netcdf(path)
    command = [str(CHECKER), "--test=cf:1.11", "--format=text", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    issues = [line for line in done.stdout.splitlines() if line.startswith("* ") and "not of type byte" not in line]
    assert "Compliance Checker Report" in done.stdout, done.stderr
    assert not issues  # packing into unsigned short is allowed since CF 1.9, which the checker does not know
