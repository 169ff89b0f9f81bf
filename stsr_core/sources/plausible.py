"""Plausibility: values that are no amounts of precipitation are masked, rounded or refused, never passed on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np

from stsr_core.errors import SourceError
from stsr_core.sources.declared import Declared
from stsr_core.sources.remote import patiently

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

FLOAT32_ROUNDING = 2.0**-23
SAME = 1e-5  # relative difference of values that are the same but for packing
MANY_CELLS = 10  # that rise together by no accident


def check_seam(seam: xr.DataArray) -> None:
    """Refuse a column of longitudes that lies on the first one, a full circle on, and holds other values."""
    first, last = np.moveaxis(patiently(lambda: np.asarray(seam.values, np.float64), "the values"), -1, 0)
    other = int((~np.isclose(first, last, rtol=SAME, atol=0.0, equal_nan=True)).sum())
    if other:
        raise SourceError(
            f"The last column of {seam.dims[-1]} lies on the first, a full circle on, but {other} of its {last.size} "
            "values are others. Remove the wrong one of the two columns."
        )


def mask_invalid(records: NDArray[np.floating], array: xr.DataArray, declared: Declared) -> None:
    """Mask what lies above the valid range that a file states, as CF asks for; negatives are judged by `check_amounts`.

    Raises:
        SourceError: cells are missing because 0 marks them, which is also what dry cells hold.
    """
    _, high = valid_range(array)
    if high < np.inf:
        mask_outside(records, -np.inf, high)
    marks = np.concatenate([np.ravel(array.encoding.get(key, np.nan)) for key in ("_FillValue", "missing_value")])
    if 0 in marks and _packing(array)[1] == 0.0 and 0.0 not in declared.missing_values and np.isnan(records).any():
        raise SourceError(
            "The fill value of the file is 0, so dry cells would be missing. If 0 does mark missing cells, declare "
            "`missing_values: [0.0]` of the source in catalog.yaml, or by --declare; else remove the fill value."
        )


def _packing(array: xr.DataArray) -> tuple[float, float]:
    """Scale and offset of the values in the file."""
    return float(array.encoding.get("scale_factor", 1.0)), float(array.encoding.get("add_offset", 0.0))


def mask_outside(values: NDArray[np.floating], low: float, high: float) -> None:
    """Mask finite values below `low` or above `high` by more than rounding."""
    below, above = values < low - FLOAT32_ROUNDING * abs(low), values > high + FLOAT32_ROUNDING * abs(high)
    values[(below | above) & np.isfinite(values)] = np.nan


def mask_marked(values: NDArray[np.floating], marks: Sequence[float]) -> None:
    """Mask values that mark missing cells, as written, or as a float32 file holds them."""
    for mark in marks:
        values[np.abs(values - mark) <= FLOAT32_ROUNDING * abs(mark)] = np.nan


def valid_range(array: xr.DataArray) -> tuple[float, float]:
    """Smallest and largest valid value as the file states them; infinite where it does not.

    Raises:
        SourceError: one of them is no number.
    """
    if "valid_range" in array.attrs:
        low, *_, high = np.ravel(array.attrs["valid_range"]).repeat(2)
    else:
        low, high = array.attrs.get("valid_min", -np.inf), array.attrs.get("valid_max", np.inf)
    return _valid_end(array, low), _valid_end(array, high)


def _valid_end(array: xr.DataArray, attribute: Any) -> float:
    """An end of the valid range.

    It is packed as the values are, but where it is no integer and they are: it is then a value as it is meant.

    Source: NetCDF Users Guide, attribute conventions, `valid_range`.
    """
    stated = np.ravel(attribute)[-1]
    try:
        end = float(stated)
    except ValueError as e:
        raise SourceError(f"The valid range ends at {stated!r}, which is no number. Mend or remove it.") from e
    scale, offset = _packing(array)
    is_packed = np.dtype(array.encoding.get("dtype", array.dtype)).kind == "f" or np.asarray(stated).dtype.kind in "iu"
    return end * scale + offset if is_packed and np.isfinite(end) else end


def largest_amount(step: timedelta) -> float:
    """Amount that no step has reached: twice the envelope of the world's records, 422 mm (h)^0.475 (Jennings 1950)."""
    return float(2 * 422.0 * (step / timedelta(hours=1)) ** 0.475)


@dataclass(frozen=True)
class Where:
    """Where values lie: their first step, and the driving member for the end of a sentence."""

    first: int
    member: str


def check_amounts(
    values: NDArray[np.floating], rounding: float, largest: float, where: Where, declared: Declared
) -> int:
    """Set small negatives to 0 and count them; refuse what is no amount."""
    tolerance = rounding if declared.max_negative_mm is None else max(rounding, declared.max_negative_mm)
    low, high = (f.reduce(values, axis=None) for f in (np.fmin, np.fmax))  # which pass over NaN
    if low < -tolerance:
        raise SourceError(
            _implausible(values, int(np.nanargmin(values)), where, f"beyond the rounding of {tolerance:.3g} mm")
        )
    if high > largest:
        raise SourceError(
            _implausible(values, int(np.nanargmax(values)), where, f"more than {largest:.0f} mm, twice the record")
        )
    if not low < 0:
        return 0
    negative = values < 0
    values[negative] = 0.0
    return int(negative.sum())


def _implausible(values: NDArray[np.floating], at: int, where: Where, why: str) -> str:
    step, cell = (int(i) for i in np.unravel_index(at, values.shape))
    value = float(values[step, cell])
    same = int((np.abs(values - value) <= 1e-6 * abs(value)).sum())
    what = "Negative precipitation" if value < 0 else "Implausible precipitation"
    hint = (
        f"{same} values are the same: if they mark missing cells, declare `missing_values:` of the source in "
        "catalog.yaml (in the units of the file), or by --declare."
        if same > 1
        else "Is it an anomaly, an accumulation (`accumulated:`), or in other `units:`? Amounts per step are needed"
        f"{'; `max_negative_mm:` of the source in catalog.yaml, or by --declare, accepts more.' if value < 0 else '.'}"
    )
    return f"{what}: {value:.4g} mm at step {where.first + step}, cell {cell}{where.member}, {why}. {hint}"


def check_not_accumulated(sample: NDArray[np.float32]) -> None:
    """Refuse amounts (T, cells) that behave like a running sum that nobody declared."""
    with np.errstate(invalid="ignore"):
        change = np.diff(sample, axis=0)
        rises, falls = (change > 0).sum(axis=1), (change < 0).sum(axis=1)
    never_fall = not falls.any() and int(rises.sum()) >= MANY_CELLS
    if never_fall or _is_reset(rises, falls):
        how = "never fall from one step to the next" if never_fall else "fall in evenly spaced steps only"
        raise SourceError(
            f"The amounts {how}, in any cell: they look like a running sum. Declare `accumulated: run`, `day` or "
            "`none` of the source in catalog.yaml, or by --declare."
        )


def _is_reset(rises: NDArray[np.int64], falls: NDArray[np.int64]) -> bool:
    """Whether cells only rise, but for steps at even distances: running sums that begin anew there."""
    rising = (rises >= MANY_CELLS) & (falls <= 0.02 * rises)
    resets = np.flatnonzero((rises + falls >= MANY_CELLS) & ~rising)
    if resets.size == 0 or int(rising.sum()) < max(6, resets.size):
        return False
    distances = np.diff(resets)
    nearest = int(distances.min(initial=len(rises)))
    return nearest >= 2 and not (distances % nearest).any()
