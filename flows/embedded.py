"""The nightly flow on a laptop: an ephemeral Prefect API, a local Dask cluster, a folder as object store."""

from __future__ import annotations

import os
from contextlib import chdir
from pathlib import Path
from typing import TYPE_CHECKING

from stsr_core.configuration import Configuration, shipped_catalog
from stsr_core.errors import ConfigurationError
from stsr_core.settings import Settings

if TYPE_CHECKING:
    from flows.versions import NewVersion


def run_embedded(to: Path, *, force: bool, members: int | None, settings: Settings) -> NewVersion | None:
    """Run the nightly flow of the shipped product in this process, whatever server the user is logged in to.

    Args:
        to: folder of the catalogue; Prefect's own state goes below it.
        force: publish though nothing is new.
        members: number of members, None for the product's.
        settings: of which those count that say how members are made: checkpoints, device, precision and workers.
    """
    home = to.resolve() / ".prefect"
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigurationError(f"{to} cannot be written ({e.strerror}). Name another folder with --to.") from e
    _set_environment(home, settings)
    destination, path = str(to.resolve()), shipped_catalog()
    product = next(iter(Configuration.load(path).products))
    with chdir(home):  # an operator's .env is elsewhere then, of which both Prefect and its server read settings too
        from flows.nightly import nightly

        published = nightly(product=product, force=force, members=members, catalog_file=path, destination=destination)
    return published[0] if published else None


def _set_environment(home: Path, settings: Settings) -> None:
    """Leave nothing in the environment that leads to a server, a scheduler or a store of the user."""
    for name in list(os.environ):
        if name.startswith("PREFECT_") and not name.startswith("PREFECT_LOGGING_"):
            del os.environ[name]
    for field in Settings.model_fields:
        os.environ.pop(f"STSR_{field.upper()}", None)
    os.environ |= {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": os.environ.get("PREFECT_LOGGING_LEVEL", "INFO"),
        "STSR_CHECKPOINTS": str(Path(settings.checkpoints).resolve()) if settings.checkpoints else "",
        "STSR_DEVICE": settings.device,
        "STSR_PRECISION": settings.precision,
        "STSR_WORKERS": str(settings.workers),
        "DO_NOT_TRACK": "1",
    }
