"""Benchmarks of the optimizers on real text: `python -m benchmarks --help`."""
