"""`python -m benchmarks norms`: what training does to the norms inside the models."""

from argparse import Namespace

from benchmarks.language.plan import Plan
from benchmarks.language.workers import Pool
from benchmarks.output.comparison import write_norms


def norms(arguments: Namespace) -> int:
    """Train every model with every optimizer, look inside, and report; returns the exit code, 1 when a run failed."""
    plan = Plan(arguments)
    rates = plan.rates(arguments.lr)
    configs = [
        plan.config(cell, seed, rates.get(cell), diagnose=True)
        for cell in plan.cells
        for seed in range(arguments.seeds)
    ]
    pool = Pool(arguments.out, plan.workers)
    rows = pool.run(configs)
    write_norms(rows, arguments.out)
    return 1 if pool.failures else 0
