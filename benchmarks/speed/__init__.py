"""Times, sizes and resources, one program for each; its results are in benchmarks/results."""
