"""`python -m benchmarks compare`: several optimizers on the same batches from the same initial weights."""

from argparse import Namespace
from dataclasses import replace

from benchmarks.language.job import Job
from benchmarks.language.ngram import counting
from benchmarks.language.parallel import Together, first_goes_first, joined, team
from benchmarks.language.plan import Plan
from benchmarks.language.workers import Pool
from benchmarks.output.comparison import write_comparison


def compare(arguments: Namespace) -> int:
    """Run the comparison and report it; returns the exit code, 1 when a run failed."""
    with joined(arguments.parallel):
        return _compare(arguments)


def _compare(arguments: Namespace) -> int:
    with first_goes_first():
        plan = Plan(arguments)
    rates = plan.rates(arguments.lr)
    untuned = [cell for cell in plan.untuned() if cell not in rates]
    if untuned and not arguments.smoke:
        named = ", ".join(f"{cell} (lr {plan.options(cell)['lr']:g})" for cell in untuned)
        print(f"Not tuned for {plan.preset.name}: {named}. Set learning rates with --lr NAME=RATE.")
    full = [plan.config(cell, seed, rates.get(cell)) for seed in range(arguments.seeds) for cell in plan.cells]
    lengths = sorted({plan.preset.steps, *(arguments.horizons or [])}, reverse=True)
    configs = [replace(config, preset=config.preset.of_length(steps)) for steps in lengths for config in full]
    ours = team(arguments.parallel, plan.device)
    if isinstance(ours, Together):
        ours.check(arguments.model, plan.preset.batch)
        pool: Pool | Job = Job(arguments.out, ours)
    else:
        pool = Pool(arguments.out, plan.workers)
    rows = pool.run(configs)
    if ours.is_first:
        write_comparison(rows, arguments.out, counting(plan.corpus, arguments.split) if arguments.horizons else [])
    return 1 if pool.failures else 0
