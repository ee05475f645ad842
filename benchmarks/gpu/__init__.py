"""The first minutes on a GPU: tests, then every figure that only a card can give. `python -m benchmarks.gpu --help`."""
