"""Device code: one file per op, each importing triton and nothing else."""
