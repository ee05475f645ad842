"""The documents' tables and pictures, made from benchmarks/results: python -m benchmarks.tables."""
