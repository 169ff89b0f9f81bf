import subprocess
import sys

import pytest


def imported_by(module: str) -> set[str]:
    code = f"import sys, {module}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "stsr_core.catalog",
        "stsr_core.store.verify",
        "stsr_core.sources.harmonise",
        "stsr_core.sources.open",
        "stsr_core.regrid",
        "stsr_core.inspection",
        "stsr_core.ensemble.plan",
        "stsr_core.checkpoint",
    ],
)
def test_modules_for_readers_and_planners_need_neither_torch_nor_prefect(module):
    assert not {"torch", "prefect"} & imported_by(module)


@pytest.mark.parametrize("module", ["stsr_core.cli", "stsr_core.ensemble.downscale", "stsr_core.training.command"])
def test_nothing_in_the_core_needs_prefect(module):
    assert "prefect" not in imported_by(module)


def test_workers_on_cpus_do_without_triton():
    assert "triton" not in imported_by("stsr_core.ensemble.generate")


def test_importing_the_catalogue_is_cheap():
    assert not {"xarray", "zarr", "pystac", "dask", "pyarrow", "obstore"} & imported_by("stsr_core.catalog")
    assert processor_seconds("import stsr_core.catalog") - processor_seconds("pass") < 1


def processor_seconds(code: str) -> float:
    """Time of the processor, which others on the machine do not lengthen as they do the clock's; best of three."""
    script = f"import time; {code}; print(time.process_time())"
    runs = [subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True) for _ in "123"]
    return min(float(run.stdout) for run in runs)
