"""`python -m benchmarks compare`: several optimizers on the same batches from the same initial weights."""

from argparse import Namespace

from benchmarks.plan import Plan, PlanError
from benchmarks.report import write_comparison
from benchmarks.workers import Pool, default_size


def compare(arguments: Namespace) -> int:
    """Run the comparison and report it; returns the exit code, 1 when a run failed."""
    plan = Plan(arguments)
    unknown = sorted(set(arguments.lr) - set(plan.optimizers))
    if unknown:
        raise PlanError(f"--lr names {', '.join(unknown)}, which --optimizers does not")
    untuned = [name for name in plan.untuned() if name not in arguments.lr]
    if untuned and not arguments.smoke:
        print(f"Not tuned for {plan.preset.name}: {', '.join(untuned)}. Set learning rates with --lr NAME=RATE.")
    seeds = range(arguments.seeds)
    configs = [plan.config(name, seed, arguments.lr.get(name)) for seed in seeds for name in plan.optimizers]
    pool = Pool(arguments.out, arguments.workers or default_size(plan.device))
    rows = pool.run(configs)
    write_comparison(rows, arguments.out)
    return 1 if pool.failures else 0
