"""Tables of finished runs, on the terminal and as Markdown."""

import json
import math
import statistics
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.language.plan import BASELINE
from benchmarks.language.presets import cell_name
from benchmarks.language.search import Search
from benchmarks.output.plots import plot_curves, plot_horizons, plot_norms, plot_rates
from benchmarks.output.records import Row, replacing
from benchmarks.output.tables import Table, drawn, publish, write_table
from benchmarks.output.targets import Target, mean_losses, reach, seconds_a_step

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t for 1 .. 9 degrees of freedom

Key = TypeVar("Key", bound=Hashable)


def write_comparison(rows: list[Row], out: Path, targets: Sequence[Target] = ()) -> Table:
    """Print the table of a comparison and write it as `compare.md`, `.csv` and `.tex`, with plots of the loss.

    Runs of the full length count there. Where there are shorter ones too, a second table (`targets.csv`, `targets.tex`)
    says how long it takes to each target, tuned AdamW's final loss before those given, and `horizons.png` shows why.
    Returns the first table.
    """
    if not rows:
        return []
    check_corpus(rows)
    lengths = sorted({steps_of(row) for row in rows})
    full = [row for row in rows if steps_of(row) == lengths[-1]]
    groups = group(full, cell_of)
    lines = [comparison_line(name, groups) for name in groups]
    plot_curves(groups, out, unit(rows))
    notes = ["![loss by step](loss_steps.png)", "![loss by time](loss_seconds.png)"]
    if len(lengths) > 1:
        of_cell = group(rows, cell_of)
        if BASELINE in groups and math.isfinite(mean_loss(groups[BASELINE])):
            tuned = Target(f"tuned {BASELINE} after {lengths[-1]} steps", mean_loss(groups[BASELINE]))
            targets = [tuned, *targets]
            lines = [{**line, **time_to(tuned, of_cell[name])} for name, line in zip(groups, lines, strict=True)]
        table = [target_line(name, members, target) for target in targets for name, members in of_cell.items()]
        write_table(table, out / "targets")
        plot_horizons({name: mean_losses(members) for name, members in of_cell.items()}, targets, out, unit(rows))
        print("\n" + drawn(table, "simple_outline"))
        notes += [
            f"Runs of {', '.join(map(str, lengths))} steps, each annealed.",
            drawn(table, "github"),
            "![horizons](horizons.png)",
        ]
    write_table(lines, out / "compare")
    publish(lines, setting(full), out / "compare.md", notes)
    return lines


def time_to(tuned: Target, rows: list[Row]) -> dict[str, str]:
    """The columns of a comparison that say how long one optimizer takes to tuned AdamW's loss."""
    found = target_line("", rows, tuned)
    return {f"{unit} to {BASELINE}'s": cell for unit, cell in found.items() if unit in ("steps", "CPU s", "s")}


def target_line(name: str, rows: list[Row], target: Target) -> dict[str, str]:
    """How long one optimizer takes to a target."""
    preset = rows[0]["config"]["preset"]
    found = reach(mean_losses(rows), target.loss)
    return {
        "target": f"{target.name}, {target.loss:.4f}",
        "optimizer": name,
        "steps": found.of(1),
        "tokens": found.of(preset["batch"] * preset["context"]),
        "CPU s" if rows[0]["config"]["device"] == "cpu" else "s": found.of(seconds_a_step(rows)),
    }


def write_grid(rows: list[Row], out: Path) -> None:
    """Print the table of a grid, the optimizer with the lowest loss first, and write `grid.md` and `grid.png`."""
    if rows:
        check_corpus(rows)
        groups = group(rows, lambda row: (cell_of(row), float(row["config"]["lr"])))
        names = sorted({name for name, _ in groups}, key=lambda name: (best_loss(rates_of(name, groups)), name))
        ranked = {(name, lr): runs for name in names for lr, runs in rates_of(name, groups).items()}
        plot_rates(ranked, out / "grid.png", unit(rows))
        table = [grid_line(name, rates_of(name, groups)) for name in names]
        publish(table, setting(rows), out / "grid.md", [EDGE, "![loss by learning rate](grid.png)"])


#: What a mark beside a learning rate means.
EDGE = "* the best rate is the largest or the smallest that was tried: `--rates` extends the grid."


def rates_of(name: str, groups: dict[tuple[str, float], list[Row]]) -> dict[float, list[Row]]:
    """The runs of one optimizer by learning rate, the smallest first."""
    return {lr: rows for (other, lr), rows in sorted(groups.items()) if other == name}


def mean_loss(rows: list[Row]) -> float:
    """The mean final loss, infinite if a run diverged."""
    return mean(rows, "final_loss") if len(losses(rows)) == len(rows) else math.inf


def best_loss(rates: dict[float, list[Row]]) -> float:
    """The lowest mean loss of all learning rates."""
    return min(map(mean_loss, rates.values()))


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
        "runs": str(len(every)),
        "CPU s": f"{sum(row['cpu_seconds'] for row in every):,.0f}",
        "state B/param": f"{every[0]['state_bytes_per_parameter']:.1f}",
    }


def write_sweep(
    searches: list[Search], gap: float, rows: list[Row], steps: int, tuned: dict[str, dict[str, Any]], out: Path
) -> None:
    """Print what was chosen, and write `sweep.md`, `sweep.png` and `chosen.json`: `tuned` with what was chosen."""
    check_corpus(rows)
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
    """One line of the table of a sweep: how much was tried, what was chosen, and the losses of all finalists."""
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


def write_norms(rows: list[Row], out: Path) -> None:
    """Print what the norms are at the end, and write `norms.md` and a plot of each, of the first run of each cell."""
    rows = [row for row in rows if row["status"] == "finished"]
    if rows:
        check_corpus(rows)
        cells = group(rows, cell_of)
        table = [norms_line(name, members) for name, members in cells.items()]
        files = plot_norms({name: members[0] for name, members in cells.items()}, out)
        publish(table, setting(rows), out / "norms.md", [f"![{name}]({name})" for name in files])


def norms_line(name: str, rows: list[Row]) -> dict[str, str]:
    """One line of the table of norms: those of the last evaluation, ranges over layers."""
    first, last = rows[0]["norms"][0][1], rows[0]["norms"][-1][1]
    return {
        "optimizer": name,
        "lr": f"{rows[0]['config']['lr']:g}",
        **loss_cells(rows),
        "residual norm at first": _extent(first["residual"]),
        "residual norm": _extent(last["residual"]),
        **{f"rows of {kind}": _extent(lengths) for kind, lengths in last["rows"].items()},
        **{f"alpha of {kind}": _extent(last["alpha"].get(kind, [])) for kind in ("attention", "mlp")},
    }


def _extent(values: list[float]) -> str:
    return f"{min(values):.3g} .. {max(values):.3g}" if values else ""


def check_corpus(rows: list[Row]) -> None:
    """Raise `ValueError` if the rows are of several texts: their losses cannot be compared."""
    corpora = {row["config"]["corpus"]: row["config"]["source"] for row in rows}
    if len(corpora) > 1:
        names = ", ".join(f"{source} ({digest[:8]})" for digest, source in corpora.items())
        raise ValueError(f"rows of different corpora cannot be compared: {names}; report those of one at a time")


def steps_of(row: Row) -> int:
    """The length of a run."""
    return int(row["config"]["preset"]["steps"])


def cell_of(row: Row) -> str:
    """The optimizer of a row, and its model if that is not the plain GPT."""
    config = row["config"]
    return cell_name(config["optimizer"], config["model"], config.get("model_options"))


def group(rows: list[Row], key: Callable[[Row], Key]) -> dict[Key, list[Row]]:
    """The rows by key, in order of appearance."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def comparison_line(name: str, groups: dict[str, list[Row]]) -> dict[str, str]:
    """One line of the comparison: means over the seeds of one optimizer."""
    rows = groups[name]
    gradient, optimizer = mean(rows, "gradient_ms"), mean(rows, "optimizer_ms")
    return {
        "optimizer": name,
        "lr": f"{rows[0]['config']['lr']:g}",
        **loss_cells(rows),
        f"vs {BASELINE}": difference(rows, groups.get(BASELINE, [])) if name != BASELINE else "",
        "tok/s": f"{mean(rows, 'tokens_per_second'):,.0f}",
        "fwd+bwd ms": f"{gradient:.0f}",
        "opt ms": f"{optimizer:.1f}",
        "opt %": f"{100 * optimizer / (gradient + optimizer):.1f}",
        "state B/param": f"{mean(rows, 'state_bytes_per_parameter'):.2f}",
    }


def loss_cells(rows: list[Row]) -> dict[str, str]:
    """The final validation loss in nats per token and in bits per byte, with its standard deviation over seeds."""
    loss = f"val {unit(rows)}"
    diverged = sum(row["status"] == "diverged" for row in rows)
    if diverged:
        return {loss: f"diverged ({diverged} of {len(rows)})", "bits/byte": ""}
    spread = f" ± {statistics.stdev(losses(rows)):.4f}" if len(rows) > 1 else ""
    bits = "" if rows[0]["bits_per_byte"] is None else f"{mean(rows, 'bits_per_byte'):.4f}"
    return {loss: f"{mean(rows, 'final_loss'):.4f}{spread}", "bits/byte": bits}


def difference(rows: list[Row], baseline: list[Row]) -> str:
    """Mean difference of the final losses to the baseline's of the same seeds, with its 95% confidence interval.

    "not resolved" where the interval holds 0.
    """
    by_seed = {row["config"]["seed"]: row["final_loss"] for row in baseline if row["final_loss"] is not None}
    pairs = [(row["final_loss"], by_seed.get(row["config"]["seed"])) for row in rows if row["final_loss"] is not None]
    gaps = [ours - theirs for ours, theirs in pairs if theirs is not None]
    if not gaps or len(gaps) < len(rows):
        return ""
    if len(gaps) == 1:
        return f"{gaps[0]:+.4f}"
    quantile = T_975[len(gaps) - 2] if len(gaps) - 2 < len(T_975) else 2.262
    middle, half = statistics.mean(gaps), quantile * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return f"{middle:+.4f} ± {half:.4f}" + ("" if abs(middle) > half else ", not resolved")


def unit(rows: list[Row]) -> str:
    """What the loss is measured in."""
    return "nats/byte" if rows[0]["bytes_per_token"] == 1 else "nats/token"


def losses(rows: list[Row]) -> list[float]:
    """The final losses of the runs that did not diverge."""
    return [row["final_loss"] for row in rows if row["final_loss"] is not None]


def mean(rows: list[Row], column: str) -> float:
    """Mean of a column."""
    return statistics.fmean(row[column] for row in rows)


def setting(rows: list[Row]) -> str:
    """One sentence that says what was run."""
    row, config = rows[0], rows[0]["config"]
    preset, seeds = config["preset"], sorted({row["config"]["seed"] for row in rows})
    models = ", ".join(
        f"{model} {preset['name']} ({members[0]['parameters']:,} parameters)"
        for model, members in group(rows, lambda row: str(row["config"]["model"])).items()
    )
    hardware = "one CPU thread per run" if config["device"] == "cpu" else config["device"]
    return (
        f"{models}, {preset['steps']} steps of "
        f"{preset['batch']} x {preset['context']} tokens of {config['source']}, seeds {seeds}, {hardware}, "
        f"torch {row['torch']}. Final loss on held-out text."
    )
