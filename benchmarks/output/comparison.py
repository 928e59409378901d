"""Tables of a comparison: final losses, differences to tuned AdamW, and steps, tokens and seconds to target losses."""

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.output.palette import BASELINE
from benchmarks.output.plots import plot_curves, plot_horizons
from benchmarks.output.records import Row
from benchmarks.output.rows import (
    at_one_speed,
    bits_cell,
    cell_of,
    check_corpus,
    check_settings,
    group,
    loss_cells,
    mean,
    mean_loss,
    setting,
    steps_of,
    unit,
)
from benchmarks.output.statistics import Estimate, holm, p_value, paired, ranks
from benchmarks.output.tables import Cell, Table, drawn, publish, set_aside, show, write_table
from benchmarks.output.targets import Runs, Target, losses_by_seed, mean_losses

#: What is written beside `compare.md`.
TABLES = ("compare", "costs", "targets")
PLOTS = ("loss_steps.png", "loss_seconds.png", "horizons.png")
FILES = (*(f"{name}.{kind}" for name in TABLES for kind in ("csv", "tex")), *PLOTS)
#: The columns of what runs cost, which are a table of their own.
COSTS = ("lr", "bits/byte", "tok/s", "fwd+bwd ms", "opt ms", "opt %", "state B/param")
NOTE = (
    "± is half of the 95% interval of Student's t over n seeds. Differences are paired by seed; p is that of their t "
    "test, corrected by Holm's method over the rows. A rank is a range where places are not told apart at 5%, by his "
    "method over all pairs. Both are of the options that were chosen: what luck in choosing them is worth is not in "
    "them. Brackets hold the interval of a bootstrap over five seeds or more, paired with those of the target. Times: "
    "forward and backward pass, the same work for all, count with their median, what an optimizer adds in proportion."
)


def write_comparison(rows: list[Row], out: Path, targets: Sequence[Target] = ()) -> Table:
    """Print the tables of a comparison and write them to `compare.md`, each also as .csv and .tex, with plots.

    `compare` has the losses of runs of the full length, `costs` the times and bytes of a step. If there are shorter
    runs too, `targets` has the steps, tokens and seconds to each target: tuned AdamW's final loss, then `targets`;
    `horizons.png` plots the losses behind these numbers. Returns `compare` and `costs` as one table.
    """
    if not rows:
        return []
    check_corpus(rows)
    check_settings(rows)
    rows = at_one_speed(rows)
    set_aside(out / "compare.md", *FILES)
    lengths = sorted({steps_of(row) for row in rows})
    full = [row for row in rows if steps_of(row) == lengths[-1]]
    groups = group(full, cell_of)
    lines = comparison_lines(groups)
    plot_curves(groups, out, unit(rows))
    notes = [NOTE]
    reached: list[dict[str, str]] = []
    if len(lengths) > 1:
        of_cell = group(rows, cell_of)
        runs = {name: Runs(members) for name, members in of_cell.items()}
        if BASELINE in groups and math.isfinite(mean_loss(groups[BASELINE])):
            losses = losses_by_seed(groups[BASELINE])[lengths[-1]]
            tuned = Target(f"tuned {BASELINE}", mean_loss(groups[BASELINE]), losses)
            targets = [tuned, *targets]
            found = [target_line(name, of_cell[name], runs[name], tuned) for name in groups]
            kept = [{f"{c} to {BASELINE}'s": line[c] for c in ("steps", "CPU s", "s") if c in line} for line in found]
            lines = [{**line, **more} for line, more in zip(lines, kept, strict=True)]
        reached = [target_line(n, members, runs[n], target) for target in targets for n, members in of_cell.items()]
        plot_horizons({name: mean_losses(members) for name, members in of_cell.items()}, targets, out, unit(rows))
    costs = [{c: cell for c, cell in line.items() if c in ("optimizer", *COSTS)} for line in lines]
    compared = [{c: cell for c, cell in line.items() if c not in COSTS} for line in lines]
    tables = {"compare": compared, "costs": costs, "targets": reached}
    for name, table in tables.items():
        if table:
            write_table(table, out / name)
    if reached:
        show(reached, "\nSteps, tokens and time to targets")
        lengths_said = f"Runs of {', '.join(map(str, lengths))} steps, each annealed."
        notes += [lengths_said, drawn(reached, "github"), "![horizons](horizons.png)"]
    show(costs, "\nCosts")
    notes += [drawn(costs, "github"), "![loss by step](loss_steps.png)", "![loss by time](loss_seconds.png)"]
    publish(compared, setting(full), out / "compare.md", notes)
    return lines


def target_line(name: str, rows: list[Row], runs: Runs, target: Target) -> dict[str, str]:
    """One line of the table of targets: steps, tokens and seconds of one optimizer to a target."""
    preset = rows[0]["config"]["preset"]
    steps, tokens, seconds = runs.cells(target, preset["batch"] * preset["context"])
    return {
        "target": Cell(f"{target.name}, {target.loss:.4f}", name=target.name, loss=target.loss),
        "optimizer": name,
        "steps": steps,
        "tokens": tokens,
        "CPU s" if rows[0]["config"]["device"] == "cpu" else "s": seconds,
    }


def comparison_lines(groups: dict[str, list[Row]]) -> list[dict[str, str]]:
    """A line for each optimizer: means over its seeds, and how it compares with the others."""
    losses = {name: next(iter(losses_by_seed(rows).values())) for name, rows in groups.items()}
    gaps = {name: paired(losses[name], losses[BASELINE]) for name in groups if name != BASELINE and BASELINE in groups}
    gaps = {name: gap for name, gap in gaps.items() if gap is not None and gap.n == len(groups[name])}
    p = dict(zip(gaps, holm([p_value(gap) for gap in gaps.values()]), strict=True))
    places = ranks(losses)
    return [comparison_line(name, rows, gaps.get(name), p.get(name), places[name]) for name, rows in groups.items()]


def comparison_line(
    name: str, rows: list[Row], gap: Estimate | None, p: float | None, places: tuple[int, int]
) -> dict[str, str]:
    """One line of the comparison."""
    gradient, optimizer = mean(rows, "gradient_ms"), mean(rows, "optimizer_ms")
    first, last = places
    return {
        "optimizer": name,
        **loss_cells(rows),
        f"vs {BASELINE}": "" if gap is None else gap.cell(sign="+"),
        "p": "" if gap is None or p is None or gap.n < 2 else Cell("< 0.001" if p < 0.001 else f"{p:.3f}", value=p),
        "rank": Cell(str(first) if first == last else f"{first}-{last}", first=first, last=last),
        "lr": _number(rows[0]["config"]["lr"], "g"),
        "bits/byte": bits_cell(rows),
        "tok/s": _number(mean(rows, "tokens_per_second"), ",.0f"),
        "fwd+bwd ms": _number(gradient, ".0f"),
        "opt ms": _number(optimizer, ".1f"),
        "opt %": _number(100 * optimizer / (gradient + optimizer), ".1f"),
        "state B/param": _number(mean(rows, "state_bytes_per_parameter"), ".2f"),
    }


def _number(value: float, form: str) -> Cell:
    return Cell(format(value, form), value=value)
