"""Scores of an ensemble of fine amounts against fine truth.

Scores are means over cells and steps, dry ones included. Members come first: (M, T, Y, X); truth is (T, Y, X).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scoringrules

if TYPE_CHECKING:
    from numpy.typing import NDArray

WET_MM = 0.1  # amount per fine step above which a cell counts as wet
QUANTILES = (0.99, 0.999)


def fair_crps(ensemble: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
    """Fair continuous ranked probability score [mm per fine step]; the absolute error for one member.

    Source: Ferro 2014, doi 10.1002/qj.2270, by scoringrules.
    """
    if len(ensemble) == 1:
        return float(np.nanmean(np.abs(ensemble[0] - truth)))
    total, count = 0.0, 0
    for step in range(len(truth)):
        crps = scoringrules.crps_ensemble(truth[step], ensemble[:, step], m_axis=0, estimator="fair", backend="numpy")
        total += float(np.nansum(crps, dtype=np.float64))
        count += int(np.isfinite(crps).sum())
    return total / count


def spread_skill(ensemble: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
    """sqrt(mean unbiased member variance * (1 + 1/M)) / RMSE of the ensemble mean; 1 for a reliable ensemble."""
    m = len(ensemble)
    variance = np.nanmean(ensemble.var(axis=0, ddof=1, dtype=np.float64))
    error = np.nanmean((ensemble.mean(axis=0, dtype=np.float64) - truth) ** 2)
    return float(np.sqrt(variance * (1 + 1 / m) / error))


def hourly_change(fields: NDArray[np.float32]) -> float:
    """Mean absolute step-to-step change, over (..., T, Y, X)."""
    return float(np.nanmean(np.abs(np.diff(fields, axis=-3))))


def spectrum_db(ensemble: NDArray[np.float32], truth: NDArray[np.float32], space: int) -> float:
    """RMS difference [dB] of the radially averaged power spectra at wavelengths up to two coarse cells."""
    n = min(truth.shape[-2:])

    def power(fields: NDArray[np.float32]) -> NDArray[np.float64]:
        spectrum = np.abs(np.fft.fft2(np.nan_to_num(fields[..., :n, :n]))) ** 2
        flat = spectrum.reshape(-1, n, n).mean(axis=0)
        k = np.fft.fftfreq(n) * n
        radius = np.rint(np.hypot(k[:, None], k[None, :])).astype(int)
        return np.bincount(radius.ravel(), flat.ravel()) / np.bincount(radius.ravel())

    first, last = max(1, int(np.ceil(n / (2 * space)))), n // 2
    difference = 10 * np.log10(power(ensemble)[first : last + 1] / power(truth)[first : last + 1])
    return float(np.sqrt(np.mean(difference**2)))


def scores(ensemble: NDArray[np.float32], truth: NDArray[np.float32], space: int) -> dict[str, float]:
    """All scores of one ensemble, by name."""
    result = {"crps": fair_crps(ensemble, truth)}
    if len(ensemble) > 1:
        result["spread_skill"] = spread_skill(ensemble, truth)
    for q in QUANTILES:
        result[f"quantile_ratio_{q}"] = float(np.nanquantile(ensemble, q) / np.nanquantile(truth, q))
    result["wet_fraction_ratio"] = float((ensemble > WET_MM).mean() / (truth > WET_MM).mean())
    result["hourly_change_ratio"] = hourly_change(ensemble) / hourly_change(truth)
    result["spectrum_db"] = spectrum_db(ensemble, truth, space)
    return result


def pooled(parts: list[dict[str, float]]) -> dict[str, float]:
    """Mean of scores over data sets of equal size, by name."""
    return {name: float(np.mean([p[name] for p in parts])) for name in parts[0]}
