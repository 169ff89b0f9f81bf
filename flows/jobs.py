"""From flow parameters and settings to jobs: one product each, with all that its stages need."""

from __future__ import annotations

from pathlib import Path

from flows.parameters import ALL
from flows.tasks import Job
from stsr_core.configuration import Configuration, choose_catalog
from stsr_core.settings import Settings
from stsr_core.statics import configured_sources


def jobs(
    product: str,
    settings: Settings,
    *,
    catalog_file: Path | None = None,
    destination: str | None = None,
    members: int | None = None,
) -> list[Job]:
    """Jobs of one product, or of all.

    Raises:
        ConfigurationError: catalog.yaml is not understood, or has no such product.
    """
    path = choose_catalog(catalog_file or settings.catalog_file)
    configuration = Configuration.load(path)
    names = list(configuration.products) if product == ALL else [product]
    where = destination or settings.destination
    statics = configured_sources(configuration.statics, path.parent, settings.source_options)
    found = []
    for name in names:
        wanted = configuration.product(name)
        if members is not None:
            wanted = wanted.model_copy(update={"members": members})
        source, target = configuration.sources[wanted.source], configuration.grids[wanted.grid]
        options = settings.options_of(where)
        sources = settings.source_s3_options
        found.append(
            Job(
                name, wanted, source, target, path.parent, where, options, sources, statics, configuration.statics
            )
        )  # fmt: skip
    return found
