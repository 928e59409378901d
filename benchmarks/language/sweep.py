"""`python -m benchmarks sweep`: tune every optimizer by one protocol, with the same number of trials.

Every optimizer gets as many quasi-random trials over its own hyperparameters, whose ranges are those of
`benchmarks.language.spaces`: short annealed runs with one seed, judged on the validation text. The three best are run
again at full length with two other seeds, and the usual options, which nobody has searched for, beside them; the lowest
mean loss is chosen. A sweep of more trials begins with the trials of a sweep of fewer, so that runs on file are not
done again.
"""

import itertools
import json
import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.language.plan import TUNING_SEED, Plan
from benchmarks.language.presets import RunConfig
from benchmarks.language.trials import USUAL, Subject, Trial, at_edges, inclusion_of, trials, usual
from benchmarks.language.workers import Pool
from benchmarks.output.plots import plot_best
from benchmarks.output.records import Row, replacing
from benchmarks.output.rows import SHORT, check_corpus, setting, split_of, unit
from benchmarks.output.statistics import estimate, expected_best
from benchmarks.output.tables import Cell, drawn, publish, set_aside, show, write_table

FINALISTS = 3
#: The trials' seed, and the finalists'.
TRIAL_SEED, FINAL_SEEDS = TUNING_SEED, (TUNING_SEED + 1, TUNING_SEED + 2)
#: What is written beside `sweep.md`.
TABLES = ("sweep", "chosen", "inclusions", "trials")
FILES = ("sweep.png", "chosen.json", *(f"{name}.{kind}" for name in TABLES for kind in ("csv", "tex")))
EDGES = (
    "usual: the loss of the usual options, which were not searched for. "
    "* the chosen value is within 5% of an end of its range: the range may be too narrow."
)
BEST_OF = (
    "Best of k: the expected lowest loss of k of the trials, over all choices of k of them; what so much tuning is "
    "expected to get."
)
INCLUDED = (
    "An optimizer that is another one at certain options must not lose to it; where it does, it is not tuned well "
    "enough. In the space: whether these options are among those that were searched."
)


@dataclass
class Search:
    """The trials of one cell, and their rows; of finalists by the number of the trial."""

    cell: str
    subject: Subject
    trials: list[Trial]
    usual: Trial
    rows: list[Row] = field(default_factory=list)
    finals: dict[int, list[Row]] = field(default_factory=dict)

    @property
    def losses(self) -> list[float]:
        """The losses of all trials."""
        return [loss_of(row) for row in self.rows]

    @property
    def finalists(self) -> list[Trial]:
        """The best trials, the best first, and the usual options."""
        best = sorted(self.trials, key=lambda trial: (self.losses[trial.number], trial.number))[:FINALISTS]
        return [*best, self.usual]

    @property
    def chosen(self) -> Trial:
        """The finalist with the lowest mean loss at full length; of equals the better trial, the usual options last."""
        return min(self.finalists, key=lambda trial: math.fsum(self.final_losses(trial)))

    def final_losses(self, trial: Trial) -> list[float]:
        """The losses of a finalist at full length, in the order of the seeds."""
        return [loss_of(row) for row in self.finals[trial.number]]


def loss_of(row: Row) -> float:
    """The final loss, infinite for a run that diverged."""
    return math.inf if row["final_loss"] is None else float(row["final_loss"])


def sweep(arguments: Namespace) -> int:
    """Run the protocol and report it; returns the exit code, 1 when a run failed."""
    plan = Plan(arguments)
    pool = Pool(arguments.out, plan.workers)
    short = arguments.trial_steps or max(1, plan.preset.steps // 4)
    searches = [Search(c, Subject(plan, c), trials(plan, c, arguments.trials), usual(plan, c)) for c in plan.cells]
    # One trial of each, then the next of each: whatever ends a sweep early, all have had as many.
    asked = [(search, search.trials[i]) for i in range(arguments.trials) for search in searches]
    rows = _run(pool, [config_of(plan, trial, TRIAL_SEED, short) for _, trial in asked])
    for (search, _), row in zip(asked, rows, strict=False):
        search.rows.append(row)
    if pool.failures:
        return 1
    pairs = [(s, trial, seed) for s in searches for trial in s.finalists for seed in FINAL_SEEDS]
    rows = _run(pool, [config_of(plan, trial, seed) for _, trial, seed in pairs])
    for (search, trial, _), row in zip(pairs, rows, strict=False):
        search.finals.setdefault(trial.number, []).append(row)
    if pool.failures:
        return 1
    write_sweep(searches, arguments.out)
    return 0


def config_of(plan: Plan, trial: Trial, seed: int, steps: int | None = None) -> RunConfig:
    """A run of a trial, by default of the full length; a short one has no loss curve, which would be half its work."""
    config = plan.config(trial.cell, seed, entry=trial.entry)
    return replace(config, preset=replace(config.preset, steps=steps, evaluations=1)) if steps else config


def _run(pool: Pool, configs: list[RunConfig]) -> list[Row]:
    """A row for each configuration, in order, also where two are the same; none after the first that failed."""
    rows = {row["key"]: row for row in pool.run(configs)}
    return [rows[config.key] for config in itertools.takewhile(lambda config: config.key in rows, configs)]


def write_sweep(searches: Sequence[Search], out: Path) -> None:
    """Print and write what came of a sweep.

    `sweep` (.md, .csv, .tex): the expected best of 1, 2, 4 ... trials of each optimizer; `chosen`: the options chosen,
    `chosen.json` the same as a file of tuned options; `inclusions`: who must not lose to whom; `trials`: every trial.
    """
    every = [row for search in searches for row in search.rows]
    finals = [row for search in searches for rows in search.finals.values() for row in rows]
    check_corpus([*every, *finals])
    set_aside(out / "sweep.md", *FILES)
    count = len(searches[0].trials)
    budgets = [2**i for i in range(count.bit_length()) if 2**i < count] + [count]
    plot_best({s.cell: [expected_best(s.losses, k) for k in range(1, count + 1)] for s in searches}, out, unit(every))
    tables = {
        "sweep": [best_line(search, budgets) for search in searches],
        "chosen": [chosen_line(search) for search in searches],
        "inclusions": inclusion_lines(searches),
        "trials": [trial_line(search, trial) for search in searches for trial in [*search.trials, search.usual]],
    }
    for name, table in tables.items():
        if table:
            write_table(table, out / name)
    with replacing(out / "chosen.json") as partial:
        partial.write_text(json.dumps({s.cell: s.chosen.entry for s in searches}, indent=2) + "\n", encoding="utf-8")
    notes = [BEST_OF, "![expected best of k trials](sweep.png)"]
    shown = {"The options chosen": ("chosen", EDGES), "Inclusions": ("inclusions", INCLUDED)}
    for title, (name, note) in shown.items():
        if tables[name]:
            narrow = [{column: cell for column, cell in line.items() if column != OTHERS} for line in tables[name]]
            show(narrow, f"\n{title}", note)
            notes += [f"## {title}", setting(finals), drawn(tables[name], "github"), note]
    publish(tables["sweep"], setting(every), out / "sweep.md", notes)


def best_line(search: Search, budgets: Sequence[int]) -> dict[str, str]:
    """One line of the table of budgets."""
    found = {k: expected_best(search.losses, k) for k in budgets}
    every = [*search.rows, *(row for rows in search.finals.values() for row in rows)]
    seconds = sum(row["cpu_seconds"] for row in every)
    diverged, searched = sum(map(math.isinf, search.losses)), len(search.trials[0].values)
    return {
        "optimizer": search.cell,
        "searched": Cell(str(searched), value=searched),
        **{f"best of {k}": Cell(f"{loss:.4f}", value=loss) for k, loss in found.items()},
        "diverged": Cell(str(diverged), value=diverged),
        "CPU s": Cell(f"{seconds:,.0f}", value=seconds),
    }


def chosen_line(search: Search) -> dict[str, str]:
    """One line of the table of the options chosen."""
    trial, values = search.chosen, search.chosen.values
    edges = at_edges(search.subject.space(), values)
    losses, rows = search.final_losses(trial), search.finals[trial.number]
    usual_loss = estimate(search.final_losses(search.usual)).mean
    # What is said in other units than it was searched in.
    meant = {
        "shrinkage": trial.entry.get("weight_decay"),
        "rest_ratio": float(f"{trial.entry['lr'] * values.get('rest_ratio', 0):.3g}"),
        "warmup": trial.entry.get("schedule", {}).get("warmup"),
    }
    line: dict[str, str] = {
        "optimizer": search.cell,
        f"{SHORT[split_of(rows[0])]} {unit(rows)}": estimate(losses).cell(),
        "n": Cell(str(len(losses)), value=len(losses)),
        "usual": Cell(f"{usual_loss:.4f}", value=usual_loss),
    }
    others = dict(values)
    for column, names in COLUMNS.items():
        name = next((name for name in names if name in values), "")
        others.pop(name, None)
        line[column] = _value(meant.get(name, values.get(name)), edges.get(name, ""))
    line[OTHERS] = ", ".join(f"{name} {_value(value, edges.get(name, ''))}" for name, value in others.items())
    return line


def _value(value: float | None, edge: str) -> str:
    return "" if value is None else Cell(f"{value:.3g}" + "*" * bool(edge), value=value, edge=edge)


#: Columns of the options chosen, and the hyperparameters in each.
COLUMNS = {
    "lr": ("lr",),
    "decay": ("shrinkage", "weight_decay"),
    "beta1": ("momentum", "mu", "betas[0]"),
    "beta2": ("betas[1]", "beta2"),
    "rest lr": ("aux_lr", "rest_ratio"),
    "rest b2": ("aux_betas[1]", "rest_beta2"),
    "warm-up": ("warmup",),
    "lr decay": ("decay",),
}


#: The column of all others, which is too wide for a terminal.
OTHERS = "others"


def inclusion_lines(searches: Sequence[Search]) -> list[dict[str, str]]:
    """A line for each pair of optimizers of which one is the other at certain options."""
    found = []
    for container, contained in itertools.permutations(searches, 2):
        inclusion = inclusion_of(container.subject, contained.subject)
        if inclusion is not None:
            pairs = zip(container.final_losses(container.chosen), contained.final_losses(contained.chosen), strict=True)
            gap = estimate([ours - theirs if ours != theirs else 0.0 for ours, theirs in pairs])
            loses = "loses" if gap.low is None or gap.low > 0 else "loses, not resolved"
            found.append(
                {
                    "optimizer": container.cell,
                    "contains": contained.cell,
                    "at": inclusion[0],
                    "in the space": "yes" if inclusion[1] else "no",
                    "difference": gap.cell(sign="+"),
                    "n": Cell(str(gap.n), value=gap.n),
                    "check": "holds" if gap.mean <= 0 else loses,
                }
            )
    return found


def trial_line(search: Search, trial: Trial) -> dict[str, str]:
    """One line of the table of all trials."""
    losses = {f"loss {seed}": loss_of(row) for row in search.finals.get(trial.number, []) for seed in [_seed(row)]}
    if trial.number == USUAL:
        numbers, first = {**losses, **trial.values}, {"trial": "usual", "loss": ""}
    else:
        numbers, first = {"trial": trial.number, "loss": search.losses[trial.number], **losses, **trial.values}, {}
    cells = {name: Cell(f"{value:.6g}", value=value) for name, value in numbers.items()}
    return {"optimizer": search.cell, **first, **cells}


def _seed(row: Row) -> int:
    return int(row["config"]["seed"])
