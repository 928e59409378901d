"""`python -m benchmarks grid`: the final loss of each optimizer over a fixed grid of learning rates."""

from argparse import Namespace

from benchmarks.plan import Plan
from benchmarks.report import write_grid
from benchmarks.workers import Pool

FACTORS = (0.25, 0.5, 1.0, 2.0)
FIRST_SEED = 1000  # far from the seeds of `compare`, so that rates are not chosen on the runs they are judged by


def grid(arguments: Namespace) -> int:
    """Run the grid and report it; returns the exit code, 1 when a run failed."""
    plan = Plan(arguments)
    configs = []
    for cell in plan.cells:
        rates = arguments.rates or [factor * plan.options(cell)["lr"] for factor in FACTORS]
        seeds = range(FIRST_SEED, FIRST_SEED + arguments.seeds)
        configs += [plan.config(cell, seed, rate) for rate in rates for seed in seeds]
    pool = Pool(arguments.out, plan.workers)
    rows = pool.run(configs)
    write_grid(rows, arguments.out)
    return 1 if pool.failures else 0
