"""Check what `stsr demo` published, with xarray and pystac alone."""

import sys
from pathlib import Path

import numpy as np
import pystac
import xarray as xr

root = Path(sys.argv[1])
items = list(pystac.Catalog.from_file(str(root / "catalog.json")).get_items(recursive=True))
assert [item.properties["version"] for item in items] == ["v1"], items
item = items[0]
item.stac_extensions = []  # the core schemas are at hand; tests check the extensions by published schemas
item.validate()
ensemble = xr.open_zarr(item.assets["ensemble"].get_absolute_href())
assert ensemble["precipitation"].dims == ("member", "time", "y", "x")
assert ensemble.sizes == {"member": 8, "time": 24, "nv": 2, "y": 250, "x": 250}, ensemble.sizes
amount = ensemble["precipitation"].values
assert np.isfinite(amount).all()
assert amount.max() > 1.0
total = ensemble["precipitation"].coarsen(y=10, x=10).mean().values
np.testing.assert_allclose(total, np.broadcast_to(total[:1], total.shape), atol=1e-4)  # members share coarse totals
overview = xr.open_zarr(item.assets["overview"].get_absolute_href())
np.testing.assert_allclose(overview["mean"].values, amount.mean(axis=0), atol=1e-4)
print(f"demo: {item.id} is valid, whole and conserves every coarse total; largest amount {amount.max():.1f} mm.")
