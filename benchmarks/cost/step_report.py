"""The tables of `python -m benchmarks step`."""

from pathlib import Path

from benchmarks.cost.contenders import SCALE
from benchmarks.cost.machine import by_threads, setting, threads_text
from benchmarks.cost.step_figures import count_text, plot_scale, plot_step
from benchmarks.cost.step_goals import goals_table, ratio_of, statistic_of
from benchmarks.output.records import Row
from benchmarks.output.rows import group
from benchmarks.output.tables import Table, drawn, publish_text, set_aside, show

NOTES = (
    "`optimizer.step()` alone; the optimizers of a family in turn in one process, in random order, the same new "
    "gradients before every turn. A turn is one step, or, where a step takes less than a millisecond, one that does "
    "not count and then as many tens of steps as take a millisecond, from the same gradients. Peers are made as a user "
    "makes them, for the same work: options agree, but under some a model's vectors decay, and for some matrices that "
    'stack several (query, key and value) are one. Unchecked: with `nonfinite="propagate"`, without the look for NaN '
    "and infinity in gradients. Ratios are to the fastest peer of the family, medians to medians and means to means. "
    "Worst: the step at the slowest of the ten places between two refreshes. GFLOPs: matrix products of an ordinary "
    "step, without refreshes; GEMM limit: the time that they take at the best rate above (for Muon, NorMuon and Scion "
    "of either dtype, else in float32), over the median. First: the first step, in which state is made, products are "
    "measured and steps are compiled. Like a backward pass, the process has freed large tensors before."
)
#: Families whose products are made in the faster of float32 and bfloat16.
EITHER_DTYPE = ("muon", "normuon", "scion")


def write_step(rows: list[Row], out: Path) -> None:
    """Print the tables, and write them to `step.md`, and the plots `step*.png` and `scale*.png` beside it."""
    settings = by_threads(rows)
    parts = {
        "step": ("Steps", plot_step, steps_table),
        SCALE: ("Microseconds a tensor", plot_scale, scale_table),
    }
    set_aside(out / "step.md", *(f"{name}{suffix}.png" for name in parts for suffix in settings))
    paragraphs = [setting(rows), NOTES]
    goals, met, cells = goals_table([row for row in rows if row["set"] != SCALE])
    if goals:
        title = f"Goals: {met} of {cells} met"
        show(goals, title)
        paragraphs += [f"## {title}", drawn(goals, "github")]
    for suffix, here in settings.items():
        found = group(here, lambda row: SCALE if row["set"] == SCALE else "step")
        threads = threads_text(here[0])
        for name, (what, plot, table_of) in parts.items():
            if name in found:
                title, table = f"{what} on {threads}", table_of(found[name])
                plot(found[name], threads, out / f"{name}{suffix}.png")
                show(table, title)
                paragraphs += [f"## {title}", f"![{name}]({name}{suffix}.png)", drawn(table, "github")]
    publish_text(paragraphs, out / "step.md")


def steps_table(rows: list[Row]) -> Table:
    """A line for each row; `rows` are of one thread setting."""
    return [line(row, rows) for row in rows]


def line(row: Row, rows: list[Row]) -> dict[str, str]:
    """One line of the table of steps."""
    low, median, high = (1e3 * q for q in row["quartiles"])
    ratio, of_means = (ratio_of(row, rows, statistic) for statistic in ("median", "mean"))
    rates = row["gemm"]
    rate = max(rates.values()) if row["family"] in EITHER_DTYPE else rates["float32"]
    return {
        "parameters": f"{row['set']}: {count_text(row['parameters'])}",
        "optimizer": row["name"],
        "median ms": f"{median:.3g}",
        "quartiles": f"{low:.3g} .. {high:.3g}",
        "/ fastest peer": "" if ratio is None else f"{ratio:.2f}",
        "mean ms": f"{1e3 * row['mean']:.3g}",
        "mean / fastest": "" if of_means is None else f"{of_means:.2f}",
        "worst / mean": f"{row['worst'] / row['mean']:.2f}",
        "turns": f"{len(row['seconds'])} x {row['block']}",
        "first ms": f"{1e3 * row['first']:.3g}",
        "state B/param": f"{row['state_bytes_per_parameter']:.2f}",
        "GFLOPs": f"{row['flops'] / 1e9:.3g}" if row["flops"] else "",
        "GEMM limit": f"{1e5 * row['flops'] / rate / median:.0f}%" if row["flops"] else "",
    }


def scale_table(rows: list[Row]) -> Table:
    """A line for each optimizer, a column for each number of tensors: the median step over that number."""
    counts = sorted({int(row["tensors"]) for row in rows})
    by_place = {(row["name"], row["tensors"]): row for row in rows}
    return [
        {
            "optimizer": name,
            **{f"{n} tensors": f"{1e6 * statistic_of(by_place[name, n], 'median') / n:.3g}" for n in counts},
        }
        for name in dict.fromkeys(str(row["name"]) for row in rows)
    ]
