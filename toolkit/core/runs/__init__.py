"""Many jobs, one pool, one store: here or on Dask or Ray, gone on with after a kill."""
