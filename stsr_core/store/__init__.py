"""Zarr stores of ensembles: layout, receipts, overview and verification. No torch here."""
