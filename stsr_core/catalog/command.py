"""The command `stsr catalog`: arguments in, one paragraph out."""

from __future__ import annotations

import json
import logging
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stsr_core.errors import ConfigurationError, StoreError
from stsr_core.home import at_home

if TYPE_CHECKING:
    from stsr_core.catalog.search import Version

catalog_app = typer.Typer(help="Find, open, check and cite published versions.", no_args_is_help=True)
CatalogOption = Annotated[str, typer.Option("--catalog", callback=at_home, help="Folder or URL of the catalogue.")]
VersionOption = Annotated[str, typer.Option("--version", help="v1, v2, ... or latest.")]
CENTURY_DAYS = 36_500  # beyond it dates before a number of days come to an end


class Group(StrEnum):
    """A group of a version's store."""

    ensemble = "ensemble"
    series = "series"
    overview = "overview"
    coarse = "coarse"


def _options(url: str) -> dict[str, object]:
    from stsr_core.settings import Settings

    return Settings().options_of(url)


@catalog_app.command("ls")
def catalog_ls(catalog: CatalogOption) -> None:
    """List products and their versions."""
    from stsr_core.catalog import ls, withdrawn

    options = _options(catalog)
    for product, versions in ls(catalog, storage_options=options).items():
        gone = withdrawn(product, catalog, storage_options=options)
        typer.echo(f"{product}: {', '.join(f'{v} (withdrawn)' if v in gone else v for v in versions)}")


@catalog_app.command("show")
def catalog_show(product: str, catalog: CatalogOption, version: VersionOption = "latest") -> None:
    """Show what a version is, what it was made from, and that its gates are passed."""
    from stsr_core.catalog.search import find

    found = find(product, version, catalog, storage_options=_options(catalog))
    properties = found.item["properties"]
    typer.echo(f"{properties['title']} ({properties['start_datetime']} to {properties['end_datetime']})")
    if found.withdrawn:
        typer.echo(f"WITHDRAWN {properties['updated']}: {found.withdrawn}")
    typer.echo(f"made from {properties['stsr:source_url']} ({properties['stsr:source_attribution']})")
    for gate in properties["stsr:gates"]:
        typer.echo(f"gate {gate['name']}: {gate['found']} (needed {gate['needed']})")
    for key in found.item["assets"]:
        typer.echo(f"{key}: {found.asset_url(key)}")
    typer.echo(f"properties: {', '.join(properties)}")


@catalog_app.command("open")
def catalog_open(
    product: str,
    catalog: CatalogOption,
    version: VersionOption = "latest",
    group: Annotated[Group, typer.Option(help="Which group of it.")] = Group.ensemble,
) -> None:
    """Open a version and show the dataset."""
    from stsr_core.catalog.search import open_version

    opened = open_version(product, version, catalog=catalog, group=group.value, storage_options=_options(catalog))
    typer.echo(str(opened))


@catalog_app.command("search")
def catalog_search(
    catalog: CatalogOption,
    product: Annotated[str | None, typer.Option(help="Name of a product; without it all are searched.")] = None,
    bbox: Annotated[str | None, typer.Option(help="WEST,SOUTH,EAST,NORTH in degrees.")] = None,
    datetime: Annotated[str | None, typer.Option(help="A time, a day, or START/END; .. is an open end.")] = None,
    filter_: Annotated[str | None, typer.Option("--filter", help='CQL2 text, as: "stsr:members" >= 8')] = None,
    sortby: Annotated[str | None, typer.Option(help="Properties, by commas; - before those that descend.")] = None,
    limit: Annotated[int, typer.Option(help="Most versions of a product that are shown.", min=1)] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print the items as a GeoJSON FeatureCollection.")] = False,
) -> None:
    """Find versions by place, time and properties."""
    from stsr_core.catalog.index import Query
    from stsr_core.catalog.search import search
    from stsr_core.sources.box import degrees

    box = None if bbox is None else degrees(bbox)
    query = Query(box, datetime, filter_, tuple(sortby.split(",")) if sortby else (), limit)
    found = search(catalog, query, product=product, storage_options=_options(catalog))
    if as_json:
        typer.echo(json.dumps({"type": "FeatureCollection", "features": list(map(_alone, found))}))
        return
    for version in found:
        p = version.item["properties"]
        said = f", WITHDRAWN: {version.withdrawn}" if version.withdrawn else ""
        typer.echo(
            f"{version.product} {version.version}: {p['start_datetime']} to {p['end_datetime']}, {version.url}{said}"
        )
    if not found:
        typer.echo("No version meets this.")


def _alone(version: Version) -> dict[str, Any]:
    """Item as it is read away from its place: with absolute addresses of its files, and of itself for its links."""
    from stsr_core.catalog.snapshot import place_of

    own = {"rel": "self", "href": place_of(version.url), "type": "application/geo+json"}
    files = {k: {**asset, "href": place_of(version.asset_url(k))} for k, asset in version.item["assets"].items()}
    return {**version.item, "links": [own, *version.item["links"]], "assets": files}


@catalog_app.command("verify")
def catalog_verify(
    where: Annotated[
        str,
        typer.Argument(callback=at_home, help="Product, with --catalog; or folder or URL of a version or its copy."),
    ],
    catalog: Annotated[
        str | None, typer.Option("--catalog", callback=at_home, help="Folder or URL of the catalogue.")
    ] = None,
    version: VersionOption = "latest",
) -> None:
    """Re-compute every digest, and the closure of every coarse cell, of a published version or of your copy."""
    from stsr_core.catalog.integrity import verify_version
    from stsr_core.catalog.search import find

    url, name = where, None
    if catalog is None and version != "latest":
        raise ConfigurationError(
            f"--version {version} is of a product, with --catalog; without it, {where} is the folder of one version. "
            "Leave --version out, or name product and catalogue."
        )
    if catalog is not None:
        url, _, name = find(where, version, catalog, storage_options=_options(catalog)).url.rpartition("/")
    verdict = verify_version(url, _options(url), item_name=name)
    if not verdict.sound:
        raise StoreError(f"{verdict.item} at {url} is not as published: {'; '.join(verdict.flaws[:5])}.")
    typer.echo(f"{verdict.item} is as published: {verdict.objects} objects agree with manifest {verdict.digest};")
    typer.echo(f"the largest closure of a coarse total over all members is {verdict.closure_quanta} quanta of 0.01 mm.")


@catalog_app.command("cite")
def catalog_cite(product: str, catalog: CatalogOption, version: VersionOption = "latest") -> None:
    """Print a citation of exactly this version, and the same as BibTeX."""
    from stsr_core.catalog.integrity import citation
    from stsr_core.catalog.search import find

    found = find(product, version, catalog, storage_options=_options(catalog))
    for text in citation(found.item, found.url):
        typer.echo(f"{text}\n")


PublicOption = Annotated[
    str | None, typer.Option(help="Address of the catalogue's files for readers, where it is another.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]


@catalog_app.command("withdraw")
def catalog_withdraw(
    product: str,
    version: str,
    catalog: CatalogOption,
    reason: Annotated[str, typer.Option(help="What is wrong with it, in a sentence for those who used it.")],
    dry_run: DryRun = False,
) -> None:
    """Withdraw a version: it stays listed and says why; `latest` is the newest good one."""
    from stsr_core.catalog.withdrawal import withdraw
    from stsr_core.settings import Settings

    latest = withdraw(
        product, version, reason, catalog, _options(catalog), dry_run=dry_run,
        sole_publisher=Settings().sole_publisher,
    )  # fmt: skip
    _say_latest(f"{product} {version} {'would be' if dry_run else 'is'} withdrawn", latest)


@catalog_app.command("restore")
def catalog_restore(product: str, version: str, catalog: CatalogOption, dry_run: DryRun = False) -> None:
    """Take back a withdrawal."""
    from stsr_core.catalog.withdrawal import restore
    from stsr_core.settings import Settings

    latest = restore(
        product, version, catalog, _options(catalog), dry_run=dry_run, sole_publisher=Settings().sole_publisher
    )
    _say_latest(f"{product} {version} {'would be' if dry_run else 'is'} good again", latest)


def _say_latest(done: str, latest: str | None) -> None:
    typer.echo(f"{done}; {f'latest is {latest}' if latest else 'no good version is left'}.")


@catalog_app.command("retire")
def catalog_retire(
    product: str,
    catalog: CatalogOption,
    keep: Annotated[int, typer.Option(help="Newest good versions that stay, whatever their age.", min=1)],
    days: Annotated[int, typer.Option(help="Versions younger than this stay as well.", min=0, max=CENTURY_DAYS)],
    dry_run: DryRun = False,
) -> None:
    """Let old versions go by a rule; `stsr catalog reconcile` then removes their data."""
    from stsr_core.catalog.retention import expiring, retire
    from stsr_core.settings import Settings

    options = _options(catalog)
    names = expiring(product, catalog, options, keep=keep, age=timedelta(days=days))
    if not dry_run:
        retire(product, names, catalog, options, sole_publisher=Settings().sole_publisher)
    said = "would leave" if dry_run else "left"
    typer.echo(f"{', '.join(names) or 'No version'} {said} the catalogue of {product}.")


@catalog_app.command("export")
def catalog_export(
    catalog: CatalogOption,
    to: Annotated[
        Path, typer.Option(callback=at_home, help="Folder that collections.ndjson and items.ndjson are written in.")
    ],
    public: PublicOption = None,
) -> None:
    """Write collections and items for the loader of a database, as `pypgstac load`."""
    from stsr_core.catalog.documents import Documents
    from stsr_core.catalog.snapshot import Loaded, place_of

    loaded = Loaded(Documents.at(catalog, _options(catalog)))
    snapshot = loaded.current()
    if loaded.failure is not None:
        raise StoreError(f"Nothing is exported. {loaded.failure}")
    count = snapshot.export(to, place_of(public or catalog))
    typer.echo(f"{len(snapshot.products)} collections and {count} items of {catalog} are in {to}.")


@catalog_app.command("serve")
def catalog_serve(
    catalog: CatalogOption,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=1, max=65535)] = 8080,
    public: PublicOption = None,
    every: Annotated[float, typer.Option(help="Seconds after which changes are looked for.", min=0)] = 5.0,
) -> None:
    """Serve the STAC API over a catalogue, read-only, in memory. Needs the extra `serve`."""
    logging.getLogger("stac_fastapi").setLevel(logging.ERROR)  # on import it asks for titles that are given later
    try:
        import uvicorn

        from stsr_core.catalog.server import make_app
    except ImportError as e:
        raise ConfigurationError(f"{e.name} is not installed. Run: pip install 'stsr[serve]'") from e
    from stsr_core.catalog.documents import Documents
    from stsr_core.catalog.snapshot import Loaded

    loaded = Loaded(Documents.at(catalog, _options(catalog)), every)
    try:
        products = loaded.current().products
    except StoreError as e:  # the first version may still be on its way
        typer.echo(f"{e} It is looked for every {every:g} s.", err=True)
        products = {}
    there = f"{len(products)} collection{'s' if len(products) != 1 else ''}"
    typer.echo(f"{there} of {catalog} in memory; the STAC API is at http://{host}:{port}/")
    uvicorn.run(make_app(loaded, public), host=host, port=port, log_level="warning", proxy_headers=True)


@catalog_app.command("reconcile")
def catalog_reconcile(
    product: str,
    catalog: CatalogOption,
    grace_hours: Annotated[
        float, typer.Option(help="Silence after which an attempt counts as dead.", min=0, max=24 * CENTURY_DAYS)
    ] = 24.0,
    dry_run: DryRun = False,
) -> None:
    """Remove what crashes left and mend links between versions; safe beside publishers that are alive."""
    from stsr_core.catalog.reconcile import reconcile
    from stsr_core.settings import Settings

    removed = reconcile(
        catalog,
        product,
        _options(catalog),
        grace=timedelta(hours=grace_hours),
        dry_run=dry_run,
        sole_publisher=Settings().sole_publisher,
    )
    for path in removed:
        typer.echo(f"{'would remove' if dry_run else 'removed'} {path}")
    typer.echo(f"{len(removed)} leftovers of {product}.")
