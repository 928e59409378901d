"""`python -m benchmarks grid`: the final loss of each optimizer over a fixed grid of learning rates.

The table includes runs on file that differ in nothing but the rate, so that `--rates` extends a grid.
"""

import json
import math
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.language.plan import TUNING_SEED, Plan
from benchmarks.language.workers import Pool
from benchmarks.output.plots import plot_rates
from benchmarks.output.records import Row, read_rows
from benchmarks.output.rows import cell_of, check_corpus, group, loss_cells, mean_loss, setting, unit
from benchmarks.output.tables import publish, set_aside

FACTORS = (0.25, 0.5, 1.0, 2.0)
#: Explains the mark beside a learning rate.
EDGE = "* the best rate is the largest or the smallest that was tried: `--rates` extends the grid."


def grid(arguments: Namespace) -> int:
    """Run the grid and report it; returns the exit code, 1 when a run failed."""
    plan = Plan(arguments)
    configs = []
    for cell in plan.cells:
        rates = arguments.rates or [factor * plan.options(cell)["lr"] for factor in FACTORS]
        seeds = range(TUNING_SEED, TUNING_SEED + arguments.seeds)
        configs += [plan.config(cell, seed, rate) for rate in rates for seed in seeds]
    pool = Pool(arguments.out, plan.workers)
    rows = pool.run(configs)
    of_these = {_but_the_rate(asdict(config)) for config in configs}
    keys = {row["key"] for row in rows}
    others = [row for row in read_rows(pool.results).values() if row["key"] not in keys]
    write_grid([*rows, *(row for row in others if _but_the_rate(row["config"]) in of_these)], arguments.out)
    return 1 if pool.failures else 0


def _but_the_rate(config: dict[str, Any]) -> str:
    """The configuration as text without the learning rate: equal for runs that differ in nothing else."""
    kept = {name: value for name, value in config.items() if name != "lr" and value}  # rows on file have no new fields
    return json.dumps(kept, sort_keys=True)


def write_grid(rows: list[Row], out: Path) -> None:
    """Print the table of a grid, the optimizer with the lowest loss first, and write `grid.md` and `grid.png`."""
    if rows:
        check_corpus(rows)
        set_aside(out / "grid.md", "grid.png")
        groups = group(rows, lambda row: (cell_of(row), float(row["config"]["lr"])))
        names = sorted({name for name, _ in groups}, key=lambda name: (best_loss(rates_of(name, groups)), name))
        ranked = {(name, lr): runs for name in names for lr, runs in rates_of(name, groups).items()}
        plot_rates(ranked, out / "grid.png", unit(rows))
        table = [grid_line(name, rates_of(name, groups)) for name in names]
        publish(table, setting(rows), out / "grid.md", [EDGE, "![loss by learning rate](grid.png)"])


def grid_line(name: str, rates: dict[float, list[Row]]) -> dict[str, str]:
    """One line of the table of a grid: the best learning rate with its loss, and the losses of all."""
    best, means = min(rates, key=lambda lr: mean_loss(rates[lr])), {lr: mean_loss(rows) for lr, rows in rates.items()}
    edge = " *" if best in (min(rates), max(rates)) else ""
    every = [row for rows in rates.values() for row in rows]
    return {
        "optimizer": name,
        "best lr": f"{best:g}{edge}" if math.isfinite(means[best]) else "all diverged",
        **loss_cells(rates[best]),
        "loss by learning rate": ", ".join(
            f"{lr:g}: " + (f"{loss:.3f}" if math.isfinite(loss) else "diverged") for lr, loss in means.items()
        ),
        "CPU s": f"{sum(row['cpu_seconds'] for row in every):,.0f}",
    }


def rates_of(name: str, groups: dict[tuple[str, float], list[Row]]) -> dict[float, list[Row]]:
    """The runs of one optimizer by learning rate, the smallest first."""
    return {lr: rows for (other, lr), rows in sorted(groups.items()) if other == name}


def best_loss(rates: dict[float, list[Row]]) -> float:
    """The lowest mean loss of all learning rates."""
    return min(map(mean_loss, rates.values()))
