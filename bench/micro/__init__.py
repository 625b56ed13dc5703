"""Micro-benchmarks with pytest-benchmark: `make micro`."""
