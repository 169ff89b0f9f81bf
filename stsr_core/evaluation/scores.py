"""Scores of an ensemble of fine amounts against fine truth.

Members come first, then places: ensembles are (M, P, T, Y, X), truth is (P, T, Y, X), NaN where missing.
Places are scored as one sample, dry cells and steps included.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import scoringrules
from scipy.ndimage import uniform_filter

from stsr_core.store.layout import QUANTUM_MM
from stsr_core.store.statistics import WET_MM

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stsr_core.factors import Factor

    Ensemble = NDArray[np.float32]
    Field = NDArray[np.float32]

WET_DAY_MM = 1.0  # daily total from which a day counts as wet
QUANTILES = (0.99, 0.999, 0.9999)
FSS_MM = (0.1, 1.0, 5.0, 10.0)  # thresholds of the fractions skill score [mm per fine step] ...
FSS_CELLS = (1, 9, 33)  # ... and its scales


def crps_field(ensemble: Ensemble, truth: Field) -> Field:
    """Fair continuous ranked probability score of every cell [mm per fine step], (P, T, Y, X).

    The absolute error for one member. Source: Ferro 2014, doi 10.1002/qj.2270, by scoringrules.
    """
    if len(ensemble) == 1:
        return np.abs(ensemble[0] - truth)
    crps = np.empty_like(truth)
    for index in np.ndindex(truth.shape[:2]):
        members = ensemble[(slice(None), *index)]
        crps[index] = scoringrules.crps_ensemble(truth[index], members, m_axis=0, estimator="fair", backend="numpy")
    return crps


def spread_skill(ensemble: Ensemble, truth: Field) -> float:
    """sqrt(mean unbiased member variance * (1 + 1/M)) / RMSE of the ensemble mean; 1 for a reliable ensemble."""
    return ratio(np.sqrt(np.nanmean(expected_error(ensemble))), rmse(ensemble, truth))


def expected_error(ensemble: Ensemble) -> NDArray[np.float64]:
    """Squared error of the ensemble mean that a reliable ensemble is to have, (P, T, Y, X)."""
    return ensemble.var(axis=0, ddof=1, dtype=np.float64) * (1 + 1 / len(ensemble))


def squared_error(ensemble: Ensemble, truth: Field) -> NDArray[np.float64]:
    """Squared error of the ensemble mean, (P, T, Y, X)."""
    return (ensemble.mean(axis=0, dtype=np.float64) - truth) ** 2


def rmse(ensemble: Ensemble, truth: Field) -> float:
    """Root mean squared error of the ensemble mean [mm per fine step]."""
    return float(np.sqrt(np.nanmean(squared_error(ensemble, truth))))


def hourly_change(fields: Field) -> float:
    """Mean absolute step-to-step change, over (..., T, Y, X); NaN of one step."""
    if fields.shape[-3] < 2:
        return float("nan")
    return float(np.nanmean(np.abs(np.diff(fields, axis=-3))))


def autocorrelation(fields: Field) -> float:
    """Correlation of a cell with itself one step later, over (..., T, Y, X), where either is wet; NaN if even."""
    first, second = fields[..., :-1, :, :], fields[..., 1:, :, :]
    wet = ((first > WET_MM) | (second > WET_MM)) & np.isfinite(first) & np.isfinite(second)
    one, next_one = first[wet].astype(np.float64), second[wet].astype(np.float64)
    if not (wet.any() and one.std() and next_one.std()):
        return float("nan")
    return float(np.corrcoef(one, next_one)[0, 1])


def power_spectrum(fields: Field) -> NDArray[np.float64]:
    """Radially averaged power of frames (..., Y, X) by whole wavenumber, averaged over the frames.

    The largest square of a frame is taken; missing cells count as dry.
    """
    n = min(fields.shape[-2:])
    frames = fields.reshape(-1, *fields.shape[-2:])[:, :n, :n]
    flat = np.zeros((n, n))
    for frame in frames:
        flat += np.abs(np.fft.fft2(np.nan_to_num(frame))) ** 2
    k = np.fft.fftfreq(n) * n
    radius = np.rint(np.hypot(k[:, None], k[None, :])).astype(int).ravel()
    return np.bincount(radius, flat.ravel() / len(frames)) / np.bincount(radius)


def spectrum_db(ensemble: Ensemble, truth: Field, space: int) -> float:
    """RMS difference [dB] of the power spectra at wavelengths up to two coarse cells; NaN if space is 1 or all dry."""
    if space == 1 or not (truth > 0).any():
        return float("nan")
    n = min(truth.shape[-2:])
    first, last = max(1, int(np.ceil(n / (2 * space)))), n // 2
    share = power_spectrum(ensemble)[first : last + 1] / power_spectrum(truth)[first : last + 1]
    return float(np.sqrt(np.mean((10 * np.log10(np.maximum(share, 1e-12))) ** 2)))


def seam_ratio(fields: Field, space: int) -> float:
    """Mean absolute step between neighbours across borders of coarse cells over that inside them, along y and x."""
    if space == 1:
        return float("nan")
    across, inside = [], []
    for axis in (-2, -1):
        steps = np.moveaxis(np.abs(np.diff(fields, axis=axis)), axis, -1).reshape(-1, fields.shape[axis] - 1)
        border = np.arange(1, steps.shape[1] + 1) % space == 0
        across.append(steps[:, border])
        inside.append(steps[:, ~border])
    sums, counts = ([float(f(p)) for p in (across, inside)] for f in (_total, _count))
    if not min(counts) or not sums[1]:
        return float("nan")
    return (sums[0] / counts[0]) / (sums[1] / counts[1])


def _total(parts: list[NDArray[np.float32]]) -> float:
    return float(sum(np.nansum(p, dtype=np.float64) for p in parts))


def _count(parts: list[NDArray[np.float32]]) -> int:
    return int(sum(np.isfinite(p).sum() for p in parts))


def rank_histogram(ensemble: Ensemble, truth: Field, seed: int = 0) -> NDArray[np.float64]:
    """Share of each rank of the truth among the members, (M + 1,), where any of them is wet; ties by lot.

    Amounts are compared in whole quanta, for the same number of millimetres may differ in its last binary digit.
    """
    wet = (truth > WET_MM) | (ensemble > WET_MM).any(axis=0)
    members, observed = (np.rint(part / np.float32(QUANTUM_MM)) for part in (ensemble[:, wet], truth[wet]))
    below, equal = (members < observed).sum(axis=0), (members == observed).sum(axis=0)
    rank = below + np.random.default_rng(seed).integers(0, equal + 1)
    return np.bincount(rank, minlength=len(ensemble) + 1) / max(1, rank.size)


def daily_indices(fields: Field, steps_per_day: int) -> dict[str, float]:
    """Climate indices of daily totals over (..., T, Y, X): Rx1day, SDII [mm/day], wet and dry spells [days].

    Rx1day is the mean over cells, SDII that over all wet days, spells that over all spells; missing days, of which a
    step is enough, are left out and end a spell.
    Days are whole pieces of `steps_per_day` from the first step: 24 h, but days of UTC only if that begins at 00 UTC.
    Without a whole day there are no indices, of a single one there are no spells, for each would be one day long.
    """
    days, lead, (ny, nx) = fields.shape[-3] // steps_per_day, fields.shape[:-3], fields.shape[-2:]
    total = fields[..., : days * steps_per_day, :, :].reshape(*lead, days, steps_per_day, ny, nx).sum(axis=-3)
    if not np.isfinite(total).any():
        return {}
    wet = total >= WET_DAY_MM
    found = {
        "rx1day": float(np.nanmean(np.fmax.reduce(total, axis=-3))),
        "sdii": float(total[wet].mean()) if wet.any() else 0.0,
    }
    if days == 1:
        return found
    return found | {"wet_spell_days": mean_spell(wet), "dry_spell_days": mean_spell(total < WET_DAY_MM)}


def mean_spell(state: NDArray[np.bool_]) -> float:
    """Mean length of runs of True along the time axis of (..., T, Y, X) [its steps]."""
    starts = state[..., :1, :, :].sum() + (state[..., 1:, :, :] & ~state[..., :-1, :, :]).sum()
    return float(state.sum() / starts) if starts else 0.0


def fractions_skill(ensemble: Ensemble, truth: Field, threshold_mm: float, scale: int) -> float:
    """Fractions skill score: how well the share of members and neighbours that reach a threshold fits the truth's.

    Members scored one by one would lose by their spread, as a wet cell that is off by a few counts twice.

    Args:
        ensemble: amounts [mm per fine step].
        truth: amounts [mm per fine step].
        threshold_mm: amount that is reached.
        scale: cells along the square of neighbours; outside of the fields there is no rain.

    Source: Roberts and Lean 2008, doi 10.1175/2007MWR2123.1; over members Schwartz et al. 2010, doi
    10.1175/2009WAF2222267.1. The scores of libraries take one member.
    """
    difference = reference = 0.0
    for index in np.ndindex(truth.shape[:2]):
        reached = (ensemble[(slice(None), *index)] >= threshold_mm).mean(axis=0), truth[index] >= threshold_mm
        expected, observed = (uniform_filter(r.astype(np.float64), scale, mode="constant") for r in reached)
        difference += float(np.square(expected - observed).sum())
        reference += float(np.square(expected).sum() + np.square(observed).sum())
    return 1.0 - difference / reference if reference else float("nan")


def characteristics(ensemble: Ensemble, steps_per_day: int) -> dict[str, float]:
    """What members are like, by name: amounts [mm per fine step], spells [steps] and `daily_indices`.

    The maximum is that of every member, in the mean.
    """
    return {
        "mean": float(np.nanmean(ensemble, dtype=np.float64)),
        **{f"quantile_{q}": float(np.nanquantile(ensemble, q)) for q in QUANTILES},
        "maximum": float(np.nanmax(ensemble.reshape(len(ensemble), -1), axis=1).mean()),
        "wet_fraction": float((ensemble > WET_MM).sum() / np.isfinite(ensemble).sum()),
        "hourly_change": hourly_change(ensemble),
        "autocorrelation": autocorrelation(ensemble),
        "wet_spell": mean_spell(ensemble > WET_MM),
        "dry_spell": mean_spell(ensemble <= WET_MM),
        **daily_indices(ensemble, steps_per_day),
    }


def ratio_name(name: str) -> str:
    """Name of the ratio of a characteristic: mean_ratio, quantile_ratio_0.99."""
    head, point, q = name.partition("_0.")
    return f"{head}_ratio{point}{q}"


def scores(ensemble: Ensemble, truth: Field, factor: Factor, *, steps_per_day: int = 24) -> dict[str, float]:
    """All scores of one ensemble but CRPS, by name; ratios are ensemble over truth, NaN where undefined."""
    result = {"rmse": rmse(ensemble, truth)}
    if len(ensemble) > 1:
        result["spread_skill"] = spread_skill(ensemble, truth)
    found, wanted = characteristics(ensemble, steps_per_day), characteristics(truth[None], steps_per_day)
    result["autocorrelation_difference"] = found.pop("autocorrelation") - wanted.pop("autocorrelation")
    result |= {ratio_name(name): ratio(found[name], value) for name, value in wanted.items()}
    result["spectrum_db"] = spectrum_db(ensemble, truth, factor.space)
    result["seam_ratio"] = seam_ratio(ensemble, factor.space)
    result["seam_ratio_of_truth"] = seam_ratio(truth, factor.space)
    for threshold, scale in itertools.product(FSS_MM, FSS_CELLS):
        result[f"fss_{threshold:g}mm_{scale}cells"] = fractions_skill(ensemble, truth, threshold, scale)
    return result


def ratio(found: float | np.floating, wanted: float | np.floating) -> float:
    """Found over wanted, NaN where nothing is wanted."""
    return float(found / wanted) if wanted else float("nan")
