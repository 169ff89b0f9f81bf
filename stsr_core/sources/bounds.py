"""Bounds: the variable that says where the cells or steps of a coordinate begin and end."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import xarray as xr


def bounds_of(coordinate: xr.DataArray | xr.Variable) -> str | None:
    """Name of the bounds of a coordinate, which may not be there; None where it names none."""
    name = coordinate.attrs.get("bounds") or coordinate.encoding.get("bounds")
    return None if name is None else str(name)
