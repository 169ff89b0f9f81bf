"""Reading at once, as tests like it."""

import xarray as xr

from stsr_core.sources.cube import Coarse, Cube
from stsr_core.sources.declared import NOTHING, Declared
from stsr_core.sources.harmonise import find, read_cube


def read_coarse(dataset: xr.Dataset, variable: str, declared: Declared = NOTHING, **part: object) -> Coarse:
    """Read a variable on whatever cells it has; `part` is what `find` takes of it."""
    return find(dataset, variable, declared, **part).read()


def cube_of(array: xr.DataArray, declared: Declared = NOTHING, *, bounds: xr.DataArray | None = None) -> Cube:
    """Make a coarse cube of an array in memory, and of its time bounds (time, 2) where there are any."""
    dataset = array.rename("precipitation").to_dataset()
    if bounds is not None:
        dataset = dataset.assign(time_bnds=bounds)
        dataset["time"].attrs["bounds"] = "time_bnds"
    return read_cube(dataset, "precipitation", declared)
