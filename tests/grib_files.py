"""GRIB files as producers write them."""

from collections.abc import Mapping
from pathlib import Path

import eccodes
import numpy as np
from numpy.typing import ArrayLike

REGULAR = "regular_ll_sfc_grib2"  # sample of eccodes that messages on a regular latitude-longitude grid begin as


def write_grib(path: Path, *messages: tuple[str, Mapping[str, object], ArrayLike]) -> str:
    """Write messages: a sample of eccodes, the keys that differ from it, and the values; return the path."""
    with path.open("wb") as file:
        for sample, settings, values in messages:
            handle = eccodes.codes_grib_new_from_samples(sample)
            for key, value in settings.items():
                (eccodes.codes_set_array if np.ndim(value) else eccodes.codes_set)(handle, key, value)
            eccodes.codes_set_values(handle, np.ravel(values).astype(np.float64))
            eccodes.codes_write(handle, file)
            eccodes.codes_release(handle)
    return str(path)
