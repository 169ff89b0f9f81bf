"""Inspection: what a file is, how it would be read, and every doubt with the line of catalog.yaml that settles it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np
from pyproj import CRS

from stsr_core.errors import FactorError, GridError, SourceError
from stsr_core.grids import Cells, Grid
from stsr_core.regrid import coarse_grid, native_factor, regrid
from stsr_core.sources.cube import CellCube, Coarse, Cube
from stsr_core.sources.declared import Declared
from stsr_core.sources.harmonise import find, names_of, negatives_of
from stsr_core.sources.layout import layout_of
from stsr_core.sources.times import MIDDLES
from stsr_core.sources.units import measured

if TYPE_CHECKING:
    from collections.abc import Mapping

    import xarray as xr
    from numpy.typing import NDArray

    from stsr_core.checkpoint import Library
    from stsr_core.configuration import Configuration, TargetGrid

SAMPLE_VALUES = 1 << 24  # values that an inspection reads at most
MAP_ROWS, MAP_COLUMNS = 14, 56
INK = " .:-=+*#%@"
NAMES = (
    "pr", "tp", "precip", "precipitation", "rain", "precrate", "pre", "prate", "rr", "ppt", "prec", "prcp", "rainfall",
    "tot_prec", "prect", "precipitation_amount", "precipitation_flux", "apcp", "unknown",
)  # fmt: skip
PROVISIONAL: Mapping[str, object] = {
    "units": "mm", "time_label": "end", "step_h": 1.0, "accumulated": "run",
}  # fmt: skip
MEANING = {
    "units": "or kg m-2 s-1, mm/h, m: ask the producer",
    "time_label": "start, middle or end: what a time stamp names",
    "step_h": "or what the producer says: hours of a step",
    "crs": "EPSG:4326 where x and y are degrees east and north, else an EPSG code or PROJ string",
    "accumulated": "or day; none where amounts are per step",
    "missing_values": "if this marks missing cells",
    "max_negative_mm": "if such negatives may become 0",
    "select": "or another entry",
}


@dataclass(frozen=True)
class Doubt:
    """What is not certain, and the line for catalog.yaml that settles it; no line where none can."""

    what: str
    line: str


@dataclass
class Inspection:
    """What is known so far.

    Attributes:
        facts: label and text, in order.
        doubts: what was found wanting.
        picture: rows of the map.
    """

    facts: list[tuple[str, str]] = field(default_factory=list)
    doubts: list[Doubt] = field(default_factory=list)
    picture: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return the one screen that a user reads."""
        lines = [f"{label:<9} {text}" for label, text in self.facts]
        lines += ["", *self.picture] if self.picture else []
        if not self.doubts:
            return "\n".join([*lines, "", "No doubts: it reads as it is."])
        lines += ["", "Doubts, and the lines for catalog.yaml (or --declare) that settle them:"]
        for before, doubt in zip([None, *self.doubts], self.doubts, strict=False):
            what = [] if before is not None and before.what == doubt.what else [f"- {doubt.what}"]
            lines += [*what, *([f"      {doubt.line}"] if doubt.line else [])]
        return "\n".join(lines)


def inspect(
    dataset: xr.Dataset,
    variable: str | None,
    declared: Declared,
    configuration: Configuration,
    library: Library,
    *,
    product: str | None = None,
    match_limit: float = 1.5,
) -> Inspection:
    """Look into a dataset.

    Args:
        dataset: as `open_dataset` returns it.
        variable: the precipitation; None finds it by its name and units.
        declared: what is declared already.
        configuration: catalog.yaml, for its target grids.
        library: checkpoints, which serve the factors.
        product: product whose factor is shown; None shows every product that the file covers.
        match_limit: largest ratio on an axis between the factor asked for and the one used.

    Raises:
        SourceError: no variable that may be precipitation.
        ConfigurationError: no such product.
    """
    name = variable or _precipitation(dataset)
    found = Inspection()
    found.facts.append(("variable", _variable_text(dataset, name)))
    driving, used = _read(dataset, name, declared, found)
    if not driving:
        return found
    coarse = driving[0]
    layout = layout_of(dataset, names_of(dataset, name)[0], used)
    total = layout.steps.axis
    found.facts.append(
        ("steps", f"{total.size} of {_hours(total.step)}, {total.start} to {total.start + total.step * total.size}")
    )
    found.facts.append(("calendar", f"{getattr(total.start, 'calendar', 'standard')}, stamps name the {total.label}"))
    if coarse.driving:
        labels = ", ".join(one.driving for one in driving[:8])
        found.facts.append(("driving", f"{len(driving)} members: {labels}{', ...' if len(driving) > 8 else ''}"))
    found.facts += _place_facts(coarse.place)
    if coarse.place.crs_wkt is None:
        line = f"crs: ''   # {MEANING['crs']}"
        found.doubts.append(Doubt("The file states no CRS, so its cells cannot be placed on a target grid.", line))
    found.facts += _value_facts(driving, total.size)
    found.facts.append(("read as", _reading(layout.units, layout.steps.differenced, name)))
    products = [product] if product else list(configuration.products)
    for one in products:
        target = configuration.grids[configuration.product(one).grid]
        found.facts.append(("product", f"{one}: {_match(coarse, target, library, match_limit)}"))
    found.picture = _map(coarse)
    return found


def _precipitation(dataset: xr.Dataset) -> str:
    for is_likely in (_is_named, _is_described):
        likely = sorted(str(n) for n in dataset.data_vars if dataset[n].ndim >= 2 and is_likely(dataset[n]))
        if len(likely) == 1:
            return likely[0]
        if likely:
            raise SourceError(
                f"{', '.join(likely)} look like precipitation. Name one with --variable; parts that add up, and no "
                "total among them, are joined by +, as 'cp + lsp'."
            )
    have = ", ".join(sorted(map(str, dataset.data_vars))) or "none"
    raise SourceError(
        f"None of the variables looks like precipitation; there are {have}. Name one with --variable; several that "
        "add up as 'cp + lsp'."
    )


def _is_named(array: xr.DataArray) -> bool:
    return str(array.name).lower() in NAMES or "precipitation" in str(array.attrs.get("standard_name", ""))


def _is_described(array: xr.DataArray) -> bool:
    said = " ".join([str(array.name), *(str(array.attrs.get(k, "")) for k in ("long_name", "description"))]).lower()
    return any(word in said for word in ("precip", "rain"))


def _variable_text(dataset: xr.Dataset, name: str) -> str:
    parts = []
    for one in names_of(dataset, name):
        array = dataset[one]
        sizes = ", ".join(f"{d} {n}" for d, n in array.sizes.items())
        parts.append(
            f"{one} ({sizes}), units {array.attrs.get('units', 'not stated')!r}, {array.attrs.get('long_name', '')}"
        )
    return " + ".join(p.rstrip(", ") for p in parts)


def _read(dataset: xr.Dataset, name: str, declared: Declared, found: Inspection) -> tuple[tuple[Coarse, ...], Declared]:
    """Read a sample; what is not stated is noted as a doubt and set for the time being, so that all doubts show."""
    for _ in fields(Declared):
        try:
            return find(dataset, name, declared, first_steps=_sample(dataset, name)).read_all(), declared
        except (SourceError, GridError) as e:
            settled = _settle(dataset, name, declared, str(e))
            if settled is None:
                found.doubts.append(Doubt(f"It would be refused: {e}", ""))
                return (), declared
            key, value = settled
            shown = list(value) if isinstance(value, tuple) else value
            found.doubts.append(Doubt(str(e), f"{key}: {str(shown).replace(chr(39), '')}   # {MEANING[key]}"))
            declared = replace(declared, **{key: value})  # type: ignore[arg-type]
            if key == "accumulated" and value != "none":  # the stamps of running sums name their ends
                found.doubts = [d for d in found.doubts if not d.line.startswith("time_label")]
    return (), declared


def _sample(dataset: xr.Dataset, name: str) -> int:
    array = dataset[names_of(dataset, name)[0]]
    time = next((n for d, n in array.sizes.items() if "time" in str(d) or d == "step"), 1)
    return max(4, SAMPLE_VALUES // max(1, array.size // max(1, time)))


def _settle(dataset: xr.Dataset, name: str, declared: Declared, message: str) -> tuple[str, object] | None:
    """Declaration that would lead past an error, None where none would."""
    if "values are the same" in message and not declared.missing_values:
        mark = _mark(dataset, name, declared, message)
        return None if mark is None else ("missing_values", (mark,))
    lowest = re.search(r"Negative precipitation: (-[\d.e-]+) mm", message)
    if lowest and "values are the same" not in message:
        small = -float(lowest.group(1)) < 1.0 and declared.max_negative_mm is None
        return ("max_negative_mm", float(f"{-float(lowest.group(1)) * 1.1:.2g}")) if small else None
    if "Choose one entry" in message:
        dims = re.findall(r"(\w+) \((\d+): ([^,)]+)", message)
        if "were found" in message:
            dims = dims[: message.count("', ") + 1 - 3]  # all but time, y and x
        entries = {d: (int(v) if v.isdigit() else v) for d, _, v in dims}
        return ("select", {**declared.select, **entries}) if entries else None
    return _asked_for(declared, message)


def _mark(dataset: xr.Dataset, name: str, declared: Declared, message: str) -> float | None:
    """Value of the file that makes most of an amount that was refused; None where none does."""
    said = re.search(
        r": (\S+) mm at step (\d+), cell (\d+)(?: in driving member (.+))?, (?:beyond|more than) ", message
    )
    if said is None:
        return None
    amount, step, cell, label = float(said[1]), int(said[2]), int(said[3]), said[4] or ""
    for one in find(dataset, name, declared).variables:
        layout, record = one.layout, int(one.steps.record[step])
        values = layout.array.isel({layout.time_dim: record}).values.reshape(len(layout.labels), -1)
        raw = float(values[layout.labels.index(label), cell])
        kind, scale = measured(layout.units)
        seconds = float(one.steps.record_seconds[record]) if kind == "rate" else 1.0
        if raw * scale * seconds / amount > 0.5:  # the rest is what a running sum held before
            return raw
    return None


def _asked_for(declared: Declared, message: str) -> tuple[str, object] | None:
    """Declaration that a message itself asks for."""
    for key, text in re.findall(r"(?:declare|and) `(units|time_label|step_h): ([^`]+)`", message):
        if getattr(declared, key) is None:
            return key, float(text) if key == "step_h" else text
    if "put a cell" in message:
        return None  # only the producer knows the right projection
    for phrase, settled in ((MIDDLES, ("time_label", "middle")), ("evenly spaced steps", ("accumulated", "day"))):
        if phrase in message:
            return settled
    if bracketed := re.search(r"with brackets, as '([^']+)'", message):
        return "units", bracketed.group(1)
    for key in re.findall(r"`(\w+):?", message):
        if key in PROVISIONAL and not getattr(declared, key, None):
            return key, PROVISIONAL[key]
    return None


def _hours(step: timedelta) -> str:
    minutes = step / timedelta(minutes=1)
    return f"{minutes:g} min" if minutes < 60 else f"{minutes / 60:g} h"


def _place_facts(place: Grid | Cells) -> list[tuple[str, str]]:
    crs = None if place.crs_wkt is None else CRS.from_wkt(place.crs_wkt)
    name = "no CRS stated" if crs is None else crs.name if crs.name != "undefined" else crs.to_cf()["grid_mapping_name"]
    unit = "" if crs is None else " degrees" if crs.is_geographic else f" {crs.axis_info[0].unit_name}"
    if isinstance(place, Grid):
        size = f"{abs(place.y.step):.6g} x {abs(place.x.step):.6g}{unit}"
        text = f"{place.y.size} x {place.x.size} regular cells of {size}, {name}"
        x, y = place.x.edges, place.y.edges
    else:
        text = f"{len(place.corners)} cells of their own shape (curvilinear, mesh or uneven axes), {name}"
        x, y = place.corners[..., 0], place.corners[..., 1]
    return [
        ("grid", text),
        ("box", f"x {np.nanmin(x):.6g} to {np.nanmax(x):.6g}, y {np.nanmin(y):.6g} to {np.nanmax(y):.6g}"),
    ]


def _value_facts(driving: tuple[Coarse, ...], steps: int) -> list[tuple[str, str]]:
    amount = np.stack([one.amount for one in driving])
    seen = "" if amount.shape[1] == steps else f" (first {amount.shape[1]} steps)"
    zeros = sum(map(negatives_of, driving))
    rounded = f"; {zeros} small negatives set to 0" if zeros else ""
    return [
        ("missing", f"{np.isnan(amount).mean():.1%}{seen}"),
        (
            "range",
            f"{np.nanmin(amount):.3g} to {np.nanmax(amount):.4g}, mean {np.nanmean(amount):.3g} mm per step{rounded}",
        ),
    ]


def _reading(units: str, differenced: bool, name: str) -> str:
    kind, scale = measured(units)
    how = f"{kind} in {units}, 1 is {scale:g} mm" + (" per second" if kind == "rate" else "")
    return how + ("; differences of running sums" if differenced else "") + ("; parts added up" if "+" in name else "")


def _match(coarse: Coarse, target: TargetGrid, library: Library, limit: float) -> str:
    try:
        space, time = native_factor(coarse, target)
        found = library.family.nearest(space, time, limit=limit)
        sample = replace(coarse, amount=coarse.amount[:1], times=coarse.times.isel(0, 1))
        grid = regrid(sample, coarse_grid(target, found.factor)).grid.refine(found.factor.space)
    except (GridError, FactorError, SourceError) as e:
        return str(e)
    strange = library.serving(found.factor).card.strange(grid.spacing_km, coarse.times.step / found.factor.time)
    served = f"needs factor ({space:.2f},{time:.2f}); {found.factor} serves it, log distance {found.distance:.3f}"
    return f"{served}. {strange}" if strange else served


def _map(coarse: Coarse) -> list[str]:
    """Mean amounts of the sample in characters, north up."""
    if isinstance(coarse, Cube):
        x, y = np.meshgrid(coarse.grid.x.centres, coarse.grid.y.centres)
    else:
        x, y = (np.nanmean(coarse.cells.corners[..., i], axis=1) for i in (0, 1))
    known = ~np.isnan(coarse.amount).all(axis=0).ravel() & np.isfinite(x.ravel()) & np.isfinite(y.ravel())
    mean = np.nanmean(coarse.amount.reshape(len(coarse.amount), -1)[:, known], axis=0)
    x, y = x.ravel()[known], y.ravel()[known]
    wide = min(MAP_COLUMNS, max(1, math.isqrt(x.size)) if isinstance(coarse, CellCube) else coarse.grid.x.size)
    rows, columns = _bins(-y, MAP_ROWS), _bins(x, wide)
    total, count = np.zeros((2, MAP_ROWS, MAP_COLUMNS))
    np.add.at(total, (rows, columns), mean)
    np.add.at(count, (rows, columns), 1)
    height = np.sqrt(np.divide(total, count, out=np.zeros_like(total), where=count > 0))
    level = np.ceil(height / max(float(height.max()), 1e-9) * (len(INK) - 1)).astype(int)
    return [
        "".join(INK[v] if n else " " for v, n in zip(r, c, strict=True))
        for r, c in zip(level, count, strict=True)
        if c.any()
    ]


def _bins(values: NDArray[np.float64], size: int) -> NDArray[np.int64]:
    low, high = values.min(), values.max()
    return np.minimum(((values - low) / max(high - low, 1e-12) * size).astype(int), size - 1)
