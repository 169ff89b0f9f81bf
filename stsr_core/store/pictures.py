"""Pictures of the overview for desktop GIS and for listings: a Cloud-Optimised GeoTIFF and a thumbnail."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from stsr_core.store.group import open_array
from stsr_core.store.quicklook import LEVELS_MM, shading

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stsr_core.grids import Grid
    from stsr_core.store.group import Options

BANDS = (
    "ensemble mean, total of the period [mm]",
    "ensemble mean, largest amount of a step [mm]",
)
THUMBNAIL_PIXELS = 256


def summary(overview_url: str, options: Options | None = None) -> NDArray[np.float32]:
    """Total and largest step of the ensemble mean, (2, Y, X) [mm], NaN where every step is missing."""
    mean = open_array(overview_url, "mean", options, mode="r")
    total = np.zeros(mean.shape[1:], np.float64)
    most = np.full(mean.shape[1:], -np.inf)
    steps = mean.chunks[0]
    for start in range(0, mean.shape[0], steps):
        part = np.asarray(mean[start : start + steps], dtype=np.float64)
        total += np.nansum(part, axis=0)
        most = np.fmax(most, np.where(np.isnan(part), -np.inf, part).max(axis=0))
    seen = np.isfinite(most)
    return np.where(seen, np.stack([total, most]), np.nan).astype(np.float32)


def cog(bands: NDArray[np.float32], grid: Grid) -> bytes:
    """Encode bands as a Cloud-Optimised GeoTIFF, first row in the north.

    Args:
        bands: (2, Y, X) [mm], NaN where missing.
        grid: their grid.
    """
    from affine import Affine
    from rasterio.io import MemoryFile
    from rasterio.shutil import copy

    data, y = (bands[:, ::-1], grid.y.edges[::-1]) if grid.y.step > 0 else (bands, grid.y.edges)
    transform = Affine(grid.x.step, 0, float(grid.x.edges[0]), 0, -abs(grid.y.step), float(y[0]))
    profile = {
        "driver": "GTiff", "dtype": "float32", "count": len(bands), "height": grid.y.size, "width": grid.x.size,
        "transform": transform, "crs": grid.crs_wkt, "nodata": np.nan,
    }  # fmt: skip
    with MemoryFile() as plain, MemoryFile() as optimised:
        with plain.open(**profile) as dataset:
            dataset.write(data)
            for number, text in enumerate(BANDS, 1):
                dataset.set_band_description(number, text)
        copy(plain.name, optimised.name, driver="COG", compress="DEFLATE", overview_resampling="AVERAGE")
        return bytes(optimised.read())


def thumbnail(total: NDArray[np.float32], grid: Grid) -> bytes:
    """Draw the total as a PNG of at most 256 pixels along an edge, north at the top."""
    from matplotlib.image import imsave

    every = -(-max(total.shape) // THUMBNAIL_PIXELS)
    image = (total[::-1] if grid.y.step > 0 else total)[::every, ::every]
    colours, norm = shading([level * 5 for level in LEVELS_MM])  # totals are larger than amounts of a step
    buffer = io.BytesIO()
    imsave(buffer, colours(norm(np.ma.masked_invalid(image))), format="png")
    return buffer.getvalue()
