"""The command `stsr catalog`: arguments in, one paragraph out."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Annotated, Any

import typer

from stsr_core.errors import ConfigurationError, StoreError

catalog_app = typer.Typer(help="Find, open, check and cite published versions.", no_args_is_help=True)
CatalogOption = Annotated[str, typer.Option("--catalog", help="Folder or URL of the catalogue.")]
VersionOption = Annotated[str, typer.Option("--version", help="v1, v2, ... or latest.")]
GroupOption = Annotated[str, typer.Option(help="ensemble, series, overview or coarse.")]


def _options(url: str) -> dict[str, object]:
    from stsr_core.settings import Settings

    return Settings().s3_options if url.startswith("s3://") else {}


@catalog_app.command("ls")
def catalog_ls(catalog: CatalogOption) -> None:
    """List products and their versions."""
    from stsr_core.catalog import ls

    for product, versions in ls(catalog, storage_options=_options(catalog)).items():
        typer.echo(f"{product}: {', '.join(versions)}")


@catalog_app.command("show")
def catalog_show(product: str, catalog: CatalogOption, version: VersionOption = "latest") -> None:
    """Show what a version is, what it was made from, and that its gates are passed."""
    from stsr_core.catalog.search import find

    found = find(product, version, catalog, storage_options=_options(catalog))
    properties = found.item["properties"]
    typer.echo(f"{properties['title']} ({properties['start_datetime']} to {properties['end_datetime']})")
    typer.echo(f"made from {properties['stsr:source_url']} ({properties['stsr:source_attribution']})")
    for gate in properties["stsr:gates"]:
        typer.echo(f"gate {gate['name']}: {gate['found']} (needed {gate['needed']})")
    for key in found.item["assets"]:
        typer.echo(f"{key}: {found.asset_url(key)}")
    typer.echo(f"properties: {', '.join(properties)}")


@catalog_app.command("open")
def catalog_open(
    product: str, catalog: CatalogOption, version: VersionOption = "latest", group: GroupOption = "ensemble"
) -> None:
    """Open a version and show the dataset."""
    from stsr_core.catalog.search import open_version

    chosen: Any = group
    if chosen not in ("ensemble", "series", "overview", "coarse"):
        raise ConfigurationError(f"There is no group {group!r}; ask for ensemble, series, overview or coarse.")
    typer.echo(str(open_version(product, version, catalog=catalog, group=chosen, storage_options=_options(catalog))))


@catalog_app.command("search")
def catalog_search(
    catalog: CatalogOption,
    product: Annotated[str | None, typer.Option(help="Name of a product; without it all are searched.")] = None,
    bbox: Annotated[str | None, typer.Option(help="WEST,SOUTH,EAST,NORTH in degrees.")] = None,
    datetime: Annotated[str | None, typer.Option(help="A time, a day, or START/END; .. is an open end.")] = None,
    filter_: Annotated[str | None, typer.Option("--filter", help='CQL2 text, as: "stsr:members" >= 8')] = None,
    sortby: Annotated[str | None, typer.Option(help="Properties, by commas; - before those that descend.")] = None,
    limit: Annotated[int, typer.Option(help="Most versions of a product that are shown.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print the items as a GeoJSON FeatureCollection.")] = False,
) -> None:
    """Find versions by place, time and properties."""
    from stsr_core.catalog.index import Query
    from stsr_core.catalog.search import search

    query = Query(_box(bbox), datetime, filter_, tuple(sortby.split(",")) if sortby else (), limit)
    found = search(catalog, query, product=product, storage_options=_options(catalog))
    if as_json:
        typer.echo(json.dumps({"type": "FeatureCollection", "features": [v.item for v in found]}))
        return
    for version in found:
        p = version.item["properties"]
        typer.echo(f"{version.product} {version.version}: {p['start_datetime']} to {p['end_datetime']}, {version.url}")
    if not found:
        typer.echo("No version meets this.")


def _box(text: str | None) -> tuple[float, float, float, float] | None:
    if text is None:
        return None
    try:
        west, south, east, north = (float(part) for part in text.split(","))
    except ValueError as e:
        raise ConfigurationError(f"Box {text!r} is no WEST,SOUTH,EAST,NORTH in degrees; write 4,43,8,46.") from e
    return west, south, east, north


@catalog_app.command("verify")
def catalog_verify(
    where: Annotated[str, typer.Argument(help="Product, with --catalog; or folder or URL of a version or its copy.")],
    catalog: Annotated[str | None, typer.Option("--catalog", help="Folder or URL of the catalogue.")] = None,
    version: VersionOption = "latest",
) -> None:
    """Re-compute every digest, and the closure of every coarse cell, of a published version or of your copy."""
    from stsr_core.catalog.integrity import verify_version
    from stsr_core.catalog.search import find

    url, name = where, None
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
    from stsr_core.catalog.integrity import citation, manifest_digest
    from stsr_core.catalog.search import find

    found = find(product, version, catalog, storage_options=_options(catalog))
    for text in citation(found.item, manifest_digest(found.item), found.url):
        typer.echo(f"{text}\n")


@catalog_app.command("reconcile")
def catalog_reconcile(
    product: str,
    catalog: CatalogOption,
    grace_hours: Annotated[float, typer.Option(help="Silence after which an attempt counts as dead.", min=0)] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
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
