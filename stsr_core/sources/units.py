"""Units by the CF rules (UDUNITS, through cf-units): what one unit is in mm, or in mm s-1."""

from __future__ import annotations

import re
from typing import Literal

from stsr_core.errors import SourceError

Kind = Literal["amount", "rate"]
# Reference unit, what it measures, and mm (or mm per second) that one of it is; 1 kg m-2 of water is 1 mm.
REFERENCES: tuple[tuple[str, Kind, float], ...] = (
    ("kg m-2", "amount", 1.0),
    ("m", "amount", 1000.0),
    ("kg m-2 s-1", "rate", 1.0),
    ("m s-1", "rate", 1000.0),
)
# UDUNITS reads "mm 3h-1" as 3 mm per hour, and "mm/3h" as mm hours; who writes them means mm per 3 hours.
COUNTED_TIME = re.compile(
    r"(?<![\w.(^-])\d+\s*(?:h|hr|hour|hours|min|d|day|days|s)\s*(?:\^|\*\*)?-1|/\s*\d+\s*(?:h|min|d|s)"
)
# UDUNITS reads "mm*10" as 10 mm; who writes it may mean numbers that are 10 times as large as those in mm.
MULTIPLIED = re.compile(r"(?<!\*)\*\s*\d")
# UDUNITS takes 30.44 and 365.24 days for these, calendars do not.
UNEVEN_TIME = re.compile(r"(?<![a-z])(months?|mon|years?|yrs?)(?![a-z])", re.IGNORECASE)
WATER = re.compile(r"\s+of (?:liquid )?water(?: equivalent)?$")  # says what the depth is of, as GRIB does
METHODS = re.compile(r"\btime: (?:\w+: )*(\w+)\b(?!:)")  # time may be named together with other dimensions
KNOWN = "mm, m, kg m-2, inch, mm/h, mm day-1, mm s-1, kg m-2 s-1"


def measured(units: str) -> tuple[Kind, float]:
    """What units measure, and their factor to mm (amounts) or mm s-1 (rates).

    Raises:
        SourceError: units that UDUNITS does not know, or that measure no precipitation.
    """
    from cf_units import Unit

    if uneven := UNEVEN_TIME.search(units):
        raise SourceError(
            f"Units {units!r} have a {uneven.group(1)}, whose length nobody states. Declare `units:` of the source in "
            "catalog.yaml, or by --declare, with days, as 'mm (30 day)-1'."
        )
    if counted := COUNTED_TIME.search(units):
        count = re.sub(r"[^\da-z]*(\d+)\s*([a-z]+).*", r"(\1 \2)-1", counted.group())
        raise SourceError(
            f"Units {units!r} may mean 'per so many' or 'so many per'. Declare `units:` of the source in catalog.yaml, "
            f"or by --declare, with brackets, as '{units[: counted.start()].strip()} {count}'."
        )
    if MULTIPLIED.search(units):
        raise SourceError(
            f"Units {units!r} may mean so many times the unit, or values that are multiplied. Declare `units:` of the "
            "source in catalog.yaml, or by --declare, with the number in front, as '0.1 mm'."
        )
    try:
        unit = Unit(WATER.sub("", units))
    except ValueError as e:
        raise SourceError(
            f"Units {units!r} are not understood; known are such as {KNOWN}. {_declare()}{_meant(units)}"
        ) from e
    for reference, kind, scale in REFERENCES:
        if unit.is_convertible(reference):
            return kind, float(unit.convert(1.0, reference)) * scale
    raise SourceError(f"Units {units!r} measure no precipitation; {KNOWN} do. {_declare()}")


def _meant(units: str) -> str:
    """Propose units in small letters, such as those of Kg/m^2/s, where they are known; else nothing."""
    try:
        known = units != units.lower() and measured(units.lower())
    except SourceError:
        return ""
    return f" If small letters are meant, declare `units: {units.lower()}`." if known else ""


def check_agreement(units: str, standard_name: str, cell_methods: str) -> None:
    """Refuse units that contradict what the variable calls itself.

    Raises:
        SourceError: an amount that is named a rate, a rate that is named an amount, an amount that is a mean over
            time, whose length nobody states, a rate that is a sum over time, a rate at points in time, which says
            nothing of the time between, extremes and other statistics, or climatologies.
    """
    kind, _ = measured(units)
    named: Kind | None = None
    if standard_name.endswith(("_flux", "_rate")):
        named = "rate"
    elif standard_name.endswith("_amount"):
        named = "amount"
    if named not in (None, kind):
        raise SourceError(
            f"Units {units!r} are those of an {kind}, but the standard name {standard_name} is that of an {named}. "
            f"One is wrong. {_declare()}".replace("an rate", "a rate")
        )
    methods = METHODS.findall(cell_methods)
    other = [method for method in methods if method not in ("mean", "sum", "point")]
    if other or " over years" in cell_methods or " over days" in cell_methods:
        what = f"the {other[0]} over time" if other else "a climatology"
        raise SourceError(
            f"The cell methods {cell_methods!r} are those of {what}, not of what fell in each step. Use means or sums; "
            f"or, if that is wrong, declare `units: {units}` of the source in catalog.yaml, or by --declare."
        )
    if kind == "rate" and "sum" in methods:
        raise SourceError(
            f"A rate in {units!r} with the cell method 'time: sum' may be a sum of rates, or an amount. {_declare()}"
        )
    if kind == "amount" and "mean" in methods:
        raise SourceError(
            f"An amount in {units!r} with the cell method 'time: mean' does not say over which time it adds up. "
            f"{_declare()}"
        )
    if kind == "rate" and "point" in methods:
        raise SourceError(
            f"A rate in {units!r} with the cell method 'time: point' is none over a step. Use means or sums; or, if it "
            f"is to stand for the whole step, declare `units: {units}` of the source in catalog.yaml, or by --declare."
        )


def length_in(units: str, metres: float) -> float | None:
    """Return how many times `metres` one unit of length is; None where `units` are no length."""
    found = _converted(units, "m")
    return None if found is None else found / metres


def radians_in(units: str) -> float | None:
    """Return how many radians one unit of angle is; None where `units` are no angle, as 1 is none here."""
    return None if units.strip() == "1" else _converted(units, "radian")


def seconds_in(units: str) -> float | None:
    """Return how many seconds one unit of time is; None where `units` are none, or uneven as months are."""
    return None if UNEVEN_TIME.search(units) else _converted(units, "s")


def _converted(units: str, reference: str) -> float | None:
    from cf_units import Unit

    try:
        unit = Unit(units)
    except ValueError:
        return None
    return float(unit.convert(1.0, reference)) if units and unit.is_convertible(reference) else None


def _declare() -> str:
    return "Declare `units:` of the source in catalog.yaml, or by --declare."
