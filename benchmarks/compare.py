"""`python -m benchmarks compare`: several optimizers on the same batches from the same initial weights."""

from argparse import Namespace

from benchmarks.plan import Plan
from benchmarks.report import write_comparison
from benchmarks.workers import Pool, default_size


def compare(arguments: Namespace) -> int:
    """Run the comparison and report it; returns the exit code, 1 when a run failed."""
    plan = Plan(arguments)
    rates = plan.rates(arguments.lr)
    untuned = [cell for cell in plan.untuned() if cell not in rates]
    if untuned and not arguments.smoke:
        print(f"Not tuned for {plan.preset.name}: {', '.join(untuned)}. Set learning rates with --lr NAME=RATE.")
    configs = [plan.config(cell, seed, rates.get(cell)) for seed in range(arguments.seeds) for cell in plan.cells]
    pool = Pool(arguments.out, arguments.workers or default_size(plan.device))
    rows = pool.run(configs)
    write_comparison(rows, arguments.out)
    return 1 if pool.failures else 0
