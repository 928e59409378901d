"""`python -m benchmarks sweep`: tune every optimizer by one protocol, with the same number of trials.

Learning rates lie on a grid of factors of two. Each is tried in one short annealed run; the grid follows the best one
until that is not at its edge. The two best are run again at full length with two seeds. If `tuned.json` declares
another hyperparameter under "then", its values follow at the chosen rate, at full length and with the same seeds.
"""

import itertools
import math
import statistics
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.language.plan import Plan
from benchmarks.language.presets import Preset, RunConfig
from benchmarks.language.search import Search, Trial
from benchmarks.language.workers import Pool
from benchmarks.output.comparison import write_sweep
from benchmarks.output.records import Row

FIRST_SEED = 1000  # far from the seeds of `compare`, so that rates are not chosen on the runs they are judged by
FINALISTS, SEEDS = 2, 2


def sweep(arguments: Namespace) -> int:
    """Run the protocol and report it; returns the exit code, 1 when a run failed."""
    plan = Plan(arguments)
    runner = Runner(plan, Pool(arguments.out, plan.workers))
    searches = [Search(cell, plan.options(cell)["lr"]) for cell in plan.cells]
    steps = arguments.screen_steps or max(1, plan.preset.steps // 2)
    screen(searches, runner, replace(plan.preset, steps=steps), arguments.trials)
    if not runner.pool.failures:
        run_finals(searches, runner)
    if not runner.pool.failures:
        run_declared(searches, runner)
        tuned = {cell: {k: v for k, v in plan.entry(cell).items() if k != "then"} for cell in plan.cells}
        write_sweep(searches, usual_gap(searches), runner.rows, steps, tuned, arguments.out)
    return 1 if runner.pool.failures else 0


@dataclass
class Runner:
    """Runs configurations, and keeps all rows."""

    plan: Plan
    pool: Pool
    rows: list[Row] = field(default_factory=list)

    def config(self, cell: str, seed: int, lr: float, preset: Preset, **options: Any) -> RunConfig:
        """A run of a cell with some of its options set."""
        plain = self.plan.config(cell, seed, lr)
        return replace(plain, preset=replace(plain.preset, steps=preset.steps), options={**plain.options, **options})

    def losses(self, configs: list[RunConfig]) -> list[float]:
        """The final losses of runs, infinite where they diverged; fewer than runs if some failed."""
        rows = self.pool.run(configs)
        self.rows += rows
        return [math.inf if row["final_loss"] is None else float(row["final_loss"]) for row in rows]


def screen(searches: list[Search], runner: Runner, short: Preset, trials: int) -> None:
    """Short runs, the same number for all, at least `trials`, and until no best rate is at the edge of its grid."""
    while any(len(s.screened) < trials or s.at_edge for s in searches) and not runner.pool.failures:
        asked = [(search, exponent) for search in searches for exponent in search.wanted()]
        if max(len(s.screened) for s in searches) >= max(12, 3 * trials):
            raise SystemExit("sweep: no end of better rates is in sight; look at the results so far")
        configs = [runner.config(s.cell, FIRST_SEED, s.rate(exponent), short) for s, exponent in asked]
        for (search, exponent), loss in zip(asked, runner.losses(configs), strict=False):
            search.screened[exponent] = loss


def run_finals(searches: list[Search], runner: Runner) -> None:
    """The best rates of each cell at full length."""
    asked = [(search, search.rate(e), {}) for search in searches for e in search.ranked[:FINALISTS]]
    run_trials(asked, runner)


def run_declared(searches: list[Search], runner: Runner) -> None:
    """The declared values of one more hyperparameter, at the rate chosen so far."""
    gap = usual_gap(searches)
    asked = [
        (search, search.chosen(gap).lr, {name: value})
        for search in searches
        for name, values in itertools.islice(runner.plan.declared(search.cell).items(), 1)
        for value in values
    ]
    run_trials(asked, runner)


def run_trials(asked: Iterable[tuple[Search, float, dict[str, Any]]], runner: Runner) -> None:
    """Every setting with every seed, at full length."""
    asked, seeds = list(asked), range(FIRST_SEED, FIRST_SEED + SEEDS)
    configs = [
        runner.config(s.cell, seed, lr, runner.plan.preset, **options) for s, lr, options in asked for seed in seeds
    ]
    losses = runner.losses(configs)
    if len(losses) == len(configs):
        for i, (search, lr, options) in enumerate(asked):
            search.finals.append(Trial(lr, options, tuple(losses[SEEDS * i : SEEDS * (i + 1)])))


def usual_gap(searches: list[Search]) -> float:
    """The median difference between seeds, over all full-length trials that did not diverge; of two the smaller."""
    gaps = [trial.gap for search in searches for trial in search.finals if math.isfinite(trial.gap)]
    return statistics.median_low(gaps) if gaps else 0.0
