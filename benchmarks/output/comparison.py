"""Tables of a comparison: final losses, differences to tuned AdamW, and steps, tokens and seconds to target losses."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.output.plots import plot_curves, plot_horizons
from benchmarks.output.records import Row
from benchmarks.output.rows import (
    cell_of,
    check_corpus,
    group,
    loss_cells,
    mean,
    mean_loss,
    setting,
    steps_of,
    unit,
)
from benchmarks.output.tables import Table, drawn, publish, set_aside, write_table
from benchmarks.output.targets import Target, mean_losses, reach, seconds_a_step

#: What is written beside `compare.md`.
FILES = (
    *("compare.csv", "compare.tex", "targets.csv", "targets.tex"),
    *("loss_steps.png", "loss_seconds.png", "horizons.png"),
)
#: The optimizer that all other optimizers are compared with.
BASELINE = "adamw"
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t for 1 .. 9 degrees of freedom


def write_comparison(rows: list[Row], out: Path, targets: Sequence[Target] = ()) -> Table:
    """Print the table of a comparison and write it as `compare.md`, `.csv` and `.tex`, with plots of the loss.

    That table is of runs of the full length. If there are shorter runs too, a second table (`targets.csv`,
    `targets.tex`) has the steps, tokens and seconds to each target: tuned AdamW's final loss, then `targets`;
    `horizons.png` plots the losses behind these numbers. Returns the first table.
    """
    if not rows:
        return []
    check_corpus(rows)
    set_aside(out / "compare.md", *FILES)
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
    """The columns of a comparison with one optimizer's steps and seconds to tuned AdamW's loss."""
    found = target_line("", rows, tuned)
    return {f"{unit} to {BASELINE}'s": cell for unit, cell in found.items() if unit in ("steps", "CPU s", "s")}


def target_line(name: str, rows: list[Row], target: Target) -> dict[str, str]:
    """One line of the second table: steps, tokens and seconds of one optimizer to a target."""
    preset = rows[0]["config"]["preset"]
    found = reach(mean_losses(rows), target.loss)
    return {
        "target": f"{target.name}, {target.loss:.4f}",
        "optimizer": name,
        "steps": found.of(1),
        "tokens": found.of(preset["batch"] * preset["context"]),
        "CPU s" if rows[0]["config"]["device"] == "cpu" else "s": found.of(seconds_a_step(rows)),
    }


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


def difference(rows: list[Row], baseline: list[Row]) -> str:
    """Mean difference to the baseline's final losses over the same seeds, with a 95% confidence interval.

    "not resolved" where the interval contains 0.
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
