"""The ensemble engine: plan shards, generate them on Dask workers, the same bytes in any order."""
