"""`python -m benchmarks grid`: the final loss of each optimizer over a fixed grid of learning rates.

Runs on file that differ in the rate alone are in the table too, so that `--rates` extends a grid.
"""

import json
from argparse import Namespace
from dataclasses import asdict
from typing import Any

from benchmarks.language.plan import Plan
from benchmarks.language.workers import Pool
from benchmarks.output.comparison import write_grid
from benchmarks.output.records import read_rows

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
    of_these = {_but_the_rate(asdict(config)) for config in configs}
    keys = {row["key"] for row in rows}
    others = [row for row in read_rows(pool.results).values() if row["key"] not in keys]
    write_grid([*rows, *(row for row in others if _but_the_rate(row["config"]) in of_these)], arguments.out)
    return 1 if pool.failures else 0


def _but_the_rate(config: dict[str, Any]) -> str:
    """What two runs on file share if only their learning rates differ."""
    return json.dumps({**config, "lr": None}, sort_keys=True)
