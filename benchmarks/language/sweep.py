"""`python -m benchmarks sweep`: tune every optimizer by one protocol, with the same number of trials.

Learning rates lie on a grid of factors of two. Each rate is tried in one short annealed run; the grid grows until
the best rate is not at an edge. The two best rates are run again at full length with two seeds. If `tuned.json`
declares another hyperparameter under "then", the declared values follow at the chosen rate, at full length and with
the same seeds.
"""

import itertools
import json
import math
import statistics
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.language.plan import TUNING_SEED, Plan
from benchmarks.language.presets import Preset, RunConfig
from benchmarks.language.search import Search, Trial
from benchmarks.language.workers import Pool
from benchmarks.output.plots import plot_rates
from benchmarks.output.records import Row, replacing
from benchmarks.output.rows import cell_name, cell_of, check_corpus, group, setting, steps_of, unit
from benchmarks.output.tables import publish, set_aside

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
        configs = [runner.config(s.cell, TUNING_SEED, s.rate(exponent), short) for s, exponent in asked]
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
    asked, seeds = list(asked), range(TUNING_SEED, TUNING_SEED + SEEDS)
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


def write_sweep(
    searches: list[Search], gap: float, rows: list[Row], steps: int, tuned: dict[str, dict[str, Any]], out: Path
) -> None:
    """Print the choices, and write `sweep.md`, `sweep.png` and `chosen.json`: `tuned` with the chosen options."""
    check_corpus(rows)
    set_aside(out / "sweep.md", "sweep.png", "chosen.json")
    of_cell = group(rows, lambda row: cell_name(row["config"]["optimizer"], row["config"]["model"]))
    table = [sweep_line(search, gap, of_cell[search.cell]) for search in searches]
    short = [row for row in rows if steps_of(row) == steps]
    plot_rates(group(short, lambda row: (cell_of(row), float(row["config"]["lr"]))), out / "sweep.png", unit(rows))
    seeds = sorted({row["config"]["seed"] for row in rows})
    notes = [
        f"Screened in runs of {steps} steps at one seed; finalists at full length, seeds {seeds}. "
        f"Seeds usually differ by {gap:.4f}.",
        "![loss by learning rate](sweep.png)",
    ]
    best = {search.cell: search.chosen(gap) for search in searches}
    chosen = {cell: {**tuned[cell], "lr": trial.lr, **trial.options} for cell, trial in best.items()}
    with replacing(out / "chosen.json") as partial:
        partial.write_text(json.dumps(chosen, indent=2) + "\n")
    full = [row for row in rows if steps_of(row) != steps]
    publish(table, setting(full or rows), out / "sweep.md", notes)


def sweep_line(search: Search, gap: float, rows: list[Row]) -> dict[str, str]:
    """One line of the table of a sweep: the number of trials, the chosen options, and the losses of all finalists."""
    best = search.chosen(gap)
    finals = [
        f"{trial.lr:g}{_settings(trial.options)}: {' '.join(f'{loss:.4f}' for loss in trial.losses)}"
        + (" unstable" if trial.is_unstable(gap) else "")
        for trial in search.finals
    ]
    return {
        "optimizer": search.cell,
        "trials": f"{len(search.screened)} short, {sum(len(trial.losses) for trial in search.finals)} full",
        "CPU s": f"{sum(row['cpu_seconds'] for row in rows):,.0f}",
        "lr": f"{best.lr:g}{_settings(best.options)}",
        f"val {unit(rows)}": f"{best.mean:.4f}",
        "rates screened": f"{search.rate(min(search.screened)):g} .. {search.rate(max(search.screened)):g}",
        "finalists": "; ".join(finals),
    }


def _settings(options: dict[str, Any]) -> str:
    return "".join(f" {name}={value}" for name, value in options.items())
