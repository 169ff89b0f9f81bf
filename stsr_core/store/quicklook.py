"""The quick-look picture: what went in, the ensemble mean, and three members at the wettest step."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEVELS_MM = (0.1, 0.2, 0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30)  # amount per fine step
MEMBERS = 3


def wettest_step(coarse: NDArray[np.float32]) -> int:
    """Index of the coarse step with the largest total, over (T, Y, X)."""
    return int(np.nansum(coarse, axis=(1, 2)).argmax())


def shading(levels: Sequence[float]) -> tuple[Any, Any]:
    """Colour map of amounts and the norm that lays it over levels; white below the first, grey where missing."""
    import matplotlib as mpl
    from matplotlib.colors import BoundaryNorm

    colours = mpl.colormaps["turbo"].with_extremes(under="white", bad="lightgrey")
    return colours, BoundaryNorm(levels, colours.N, extend="max")


def quicklook(coarse: NDArray[np.float32], ensemble: NDArray[np.float32], *, title: str, km_per_cell: float) -> bytes:
    """Draw coarse input, ensemble mean and three members of one fine step.

    Args:
        coarse: amount of one coarse step as mm per fine step, (Y, X), first row at the top.
        ensemble: amount [mm per fine step], (M, Y*s, X*s), first row at the top.
        title: heading of the picture.
        km_per_cell: size of a fine cell.

    Returns:
        A PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours, norm = shading(LEVELS_MM)
    height, width = (n * km_per_cell for n in ensemble.shape[1:])
    panels = [("coarse input", coarse), ("ensemble mean", ensemble.mean(axis=0))]
    panels += [(f"member {i}", ensemble[i]) for i in range(min(MEMBERS, len(ensemble)))]
    figure = Figure(figsize=(3.4 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axis, (name, field) in zip(axes, panels, strict=True):
        image = axis.imshow(field, cmap=colours, norm=norm, extent=(0, width, 0, height), interpolation="nearest")
        axis.set_title(name, fontsize=11)
        axis.set_xlabel("km")
    axes[0].set_ylabel("km")
    figure.colorbar(image, ax=axes, label="mm per step", ticks=LEVELS_MM, shrink=0.85)
    figure.suptitle(title, fontsize=12)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()
