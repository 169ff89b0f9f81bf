"""The nightly flow on a laptop: an ephemeral Prefect API, a local Dask cluster, a folder as object store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from stsr_core.configuration import Configuration, shipped_catalog
from stsr_core.errors import ConfigurationError

if TYPE_CHECKING:
    from flows.versions import NewVersion


def run_embedded(to: Path, *, force: bool, members: int | None, device: str, workers: int) -> NewVersion | None:
    """Run the nightly flow of the shipped product in this process, whatever server the user is logged in to.

    Args:
        to: folder of the catalogue; Prefect's own state goes below it.
        force: publish though nothing is new.
        members: number of members, None for the product's.
        device: auto, cpu or cuda.
        workers: Dask workers, 0 for one per core or GPU.
    """
    home = to.resolve() / ".prefect"
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigurationError(f"{to} cannot be written ({e.strerror}). Name another folder with --to.") from e
    os.environ.pop("PREFECT_API_URL", None)
    os.environ |= {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": os.environ.get("PREFECT_LOGGING_LEVEL", "INFO"),
        "STSR_DEVICE": device,
        "STSR_WORKERS": str(workers),
        "STSR_SCHEDULER_ADDRESS": "",
        "DO_NOT_TRACK": "1",
    }
    from flows.nightly import nightly

    path = shipped_catalog()
    product = next(iter(Configuration.load(path).products))
    published = nightly(product=product, force=force, members=members, catalog_file=path, destination=str(to))
    return published[0] if published else None
