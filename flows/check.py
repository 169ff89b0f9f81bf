"""The check flow: is the code that is at work here fit for work?"""

from __future__ import annotations

import asyncio
from pathlib import Path

from prefect import flow

from flows.declared import Declared, shipped_declaration
from flows.deploy import Release, deploy
from flows.parameters import ALL, ProductName, SmokeMembers
from flows.redeploy import examine, smoke_run


@flow(name="check", flow_run_name="check {products}", validate_parameters=True)
def check(products: ProductName = ALL, smoke_members: SmokeMembers = 2, release: Release | None = None) -> None:
    """Run `stsr doctor`, and publish the shipped sample in a folder that is thrown away.

    The flow `redeploy` runs it in an image before that is deployed, and once more to register the deployments by the
    image's own code.

    Args:
        products: product whose source must be read and matched, or "all".
        smoke_members: members of the smoke run.
        release: what to register instead of checking; for `redeploy`.
    """
    if release is not None:
        asyncio.run(deploy(Declared.load(shipped_declaration()), release))
        return
    folder = Path(__file__).parents[1]
    examine(folder, Path.cwd(), products)
    smoke_run(folder, smoke_members)
