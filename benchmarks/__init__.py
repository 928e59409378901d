"""Benchmarks of the optimizers: losses on real text, the cost of steps, probes: `python -m benchmarks --help`."""
