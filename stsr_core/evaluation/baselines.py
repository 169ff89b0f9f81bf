"""What every checkpoint must beat: even spreading, linear interpolation, and RainFARM with conservation."""

from __future__ import annotations

import importlib.util
import sys
import time
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

import numpy as np
import torch

from stsr_core.conservation import conserve
from stsr_core.factors import ConservationFunction, Factor
from stsr_core.networks.transform import linear_interpolation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from stsr_core.progress import Advance


SMOOTH = {"spectral_fusion": True, "kernel_type": "tophat"}  # options of pysteps, see `rainfarm`
RAINFARMS = {"rainfarm": False, "rainfarm_smooth": True}  # whether it is smoothed
BASELINES = ("even", "linear", *RAINFARMS)
RAINFARM_CELLS = 4  # coarse cells along the longer side that pysteps needs to fit a slope


def even_spreading(coarse: NDArray[np.float32], factor: Factor) -> NDArray[np.float32]:
    """Spread every coarse amount (T, Y, X) evenly over its block; one member (1, T*t, Y*s, X*s)."""
    s, t = factor.space, factor.time
    return (coarse / np.float32(t)).repeat(t, 0).repeat(s, 1).repeat(s, 2)[None]


def linear(coarse: NDArray[np.float32], factor: Factor) -> NDArray[np.float32]:
    """Interpolate coarse amounts (T, Y, X) linearly in t, y and x; one member (1, T*t, Y*s, X*s)."""
    padded = torch.from_numpy(np.pad(np.nan_to_num(coarse), 1, mode="edge"))
    return linear_interpolation(padded[None], factor).numpy()


def without_rainfarm(coarse_shape: tuple[int, ...], *, smooth: bool = False) -> str | None:
    """Why RainFARM cannot be run on a coarse grid (..., Y, X), and what to do; None where it can."""
    if importlib.util.find_spec("pysteps") is None:
        return "install it with pip install 'stsr[evaluate]'."
    rows, columns = coarse_shape[-2:]
    if max(rows, columns) < RAINFARM_CELLS or min(rows, columns) < 2:
        return (
            f"it fits the slope of a spectrum, and {rows} x {columns} coarse cells have none; {RAINFARM_CELLS} along "
            "one side and 2 along the other are needed. Ask for more cells."
        )
    if smooth and rows != columns:
        return f"pysteps merges spectra of squares only, and there are {rows} x {columns} coarse cells. Ask for fewer."
    return None


def rainfarm(
    coarse: NDArray[np.float32],
    factor: Factor,
    members: int,
    seed: int,
    *,
    smooth: bool = False,
    progress: Advance = lambda _, __: None,
) -> NDArray[np.float32]:
    """Downscale by RainFARM (pysteps), then conserve exactly.

    Coarse amounts are interpolated linearly in time first, for pysteps refines in space only. As pysteps runs it by
    default (Rebora et al. 2006, doi 10.1175/JHM517.1) fields step at the borders of coarse cells. Smoothed and merged
    with the spectrum of the coarse field (D'Onofrio et al. 2014, doi 10.1175/JHM-D-13-096.1) they do not, and their
    CRPS is up to a quarter less: on validation windows at hourly factors, and 1 to 5 % less at (8,3) and (25,6).

    Args:
        coarse: amount [mm per coarse step], (T, Y, X).
        factor: (s, t).
        members: number of members.
        seed: of the random fields.
        smooth: smooth and merge as D'Onofrio et al. do; of a square, Y = X.
        progress: called with 1 and the seconds it took when a member is made.

    Returns:
        Amount [mm per fine step], (M, T*t, Y*s, X*s), float32.
    """
    with redirect_stdout(sys.stderr):  # pysteps says where its configuration is, which is no score
        from pysteps.downscaling import rainfarm as method

    amount = np.nan_to_num(coarse)
    frames = linear(amount, Factor(space=1, time=factor.time))[0].astype(np.float64)
    (steps, ny, nx), s = frames.shape, factor.space
    fields = np.empty((members, steps, ny * s, nx * s), np.float32)
    state = np.random.get_state()  # pysteps draws from the global generator
    np.random.seed(seed)
    try:
        for member in fields:
            started = time.perf_counter()
            for step, frame in enumerate(frames):
                member[step] = _frame(method, frame, s, SMOOTH if smooth else {})
            progress(1, time.perf_counter() - started)
    finally:
        np.random.set_state(state)
    exact = ConservationFunction(threshold_mm=0.0)
    return conserve(torch.from_numpy(fields), torch.from_numpy(amount), factor, exact).numpy()


def _spread(frame: NDArray[np.float64], space: int) -> NDArray[np.float32]:
    return frame.repeat(space, 0).repeat(space, 1).astype(np.float32)


def _frame(method: object, frame: NDArray[np.float64], space: int, how: Mapping[str, object]) -> NDArray[np.float32]:
    if space == 1 or not (frame > 0).any():
        return _spread(frame, space)
    try:
        with np.errstate(all="ignore"):
            fine = method.downscale(frame, ds_factor=space, threshold=0.0, **how)  # type: ignore[attr-defined]
    except (TypeError, ValueError):  # what pysteps ends with where too few wavenumbers have power to fit a slope to
        return _spread(frame, space)
    return np.nan_to_num(fine, posinf=0.0, neginf=0.0).clip(min=0.0).astype(np.float32)
