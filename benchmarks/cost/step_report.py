"""The tables of `python -m benchmarks step`."""

from pathlib import Path

from benchmarks.cost.machine import setting, threads_text
from benchmarks.cost.step_figures import plot_scale, plot_step
from benchmarks.cost.step_goals import fastest_peer, goals_table, statistic_of
from benchmarks.output.records import Row
from benchmarks.output.tables import Table, drawn, publish_text, set_aside, show

SCALED = "scale"
NOTES = (
    "`optimizer.step()` alone; the optimizers of a family in turn in one process, in random order, the same new "
    "gradients before every turn. A turn is one step, or, where a step takes less than a millisecond, one that does "
    "not count and then as many tens of steps as take a millisecond, from the same gradients. Peers are made as a user "
    "makes them, for the same work: options agree, but under some a model's vectors decay, and for some matrices that "
    "stack several (query, key and value) are one. Ratios are to the fastest peer of the family, medians to medians "
    "and means to means. Worst: the step at the slowest of the ten places between two refreshes. GFLOPs: matrix "
    "products of an ordinary step, without refreshes; GEMM limit: the time that they take at the best rate above (for "
    "Muon, NorMuon and Scion of either dtype, else in float32), over the median. First: the first step, in which state "
    "is made, products are measured and steps are compiled. Like a backward pass, the process has freed large tensors "
    "before."
)
#: Families whose products are made in the faster of float32 and bfloat16.
EITHER_DTYPE = ("muon", "normuon", "scion")


def write_step(rows: list[Row], out: Path) -> None:
    """Print the tables, and write them to `step.md`, and the plots `step*.png` and `scale*.png` beside it."""
    settings = list(dict.fromkeys(str(row["asked"]) for row in rows))
    suffixes = {asked: "" if asked == settings[0] else f"_{asked}" for asked in settings}
    set_aside(out / "step.md", *(f"{what}{suffix}.png" for what in ("step", SCALED) for suffix in suffixes.values()))
    fixed = [row for row in rows if row["set"] != SCALED]
    scaled = [row for row in rows if row["set"] == SCALED]
    paragraphs = [setting(rows), NOTES]
    goals, met, cells = goals_table(fixed)
    if goals:
        title = f"Targets: {met} of {cells} met"
        show(goals, title)
        paragraphs += [f"## {title}", drawn(goals, "github")]
    for asked, suffix in suffixes.items():
        for some, plot, what in ((fixed, plot_step, "step"), (scaled, plot_scale, SCALED)):
            here = [row for row in some if row["asked"] == asked]
            if here:
                plot(here, threads_text(here[0]), out / f"{what}{suffix}.png")
                title = f"{'Steps' if what == 'step' else 'Microseconds a tensor'} on {threads_text(here[0])}"
                table = [line(row, here) for row in here] if what == "step" else scale_table(here)
                show(table, title)
                paragraphs += [f"## {title}", f"![{what}]({what}{suffix}.png)", drawn(table, "github")]
    publish_text(paragraphs, out / "step.md")


def line(row: Row, rows: list[Row]) -> dict[str, str]:
    """One line of the table of steps."""
    low, median, high = (1e3 * q for q in row["quartiles"])
    rates = row["gemm"]
    rate = max(rates.values()) if row["family"] in EITHER_DTYPE else rates["float32"]
    return {
        "parameters": f"{row['set']}: {_count(row['parameters'])}",
        "optimizer": row["name"],
        "median ms": f"{median:.3g}",
        "quartiles": f"{low:.3g} .. {high:.3g}",
        "/ fastest peer": _ratio(row, rows, "median"),
        "mean ms": f"{1e3 * row['mean']:.3g}",
        "mean / fastest": _ratio(row, rows, "mean"),
        "worst / mean": f"{row['worst'] / row['mean']:.2f}",
        "turns": f"{len(row['seconds'])} x {row['block']}",
        "first ms": f"{1e3 * row['first']:.3g}",
        "state B/param": f"{row['state_bytes_per_parameter']:.2f}",
        "GFLOPs": f"{row['flops'] / 1e9:.3g}" if row["flops"] else "",
        "GEMM limit": f"{1e5 * row['flops'] / rate / median:.0f}%" if row["flops"] else "",
    }


def _ratio(row: Row, rows: list[Row], statistic: str) -> str:
    fastest = fastest_peer(row, rows, statistic)
    return f"{statistic_of(row, statistic) / statistic_of(fastest, statistic):.2f}" if fastest else ""


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} M" if parameters >= 1e5 else str(parameters)


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
