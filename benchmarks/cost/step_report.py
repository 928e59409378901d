"""The table and the plot of `python -m benchmarks step`."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.output.plots import STYLE, save
from benchmarks.output.records import Row
from benchmarks.output.tables import publish, set_aside

OURS = "normopt"
NOTES = (
    "`optimizer.step()` alone, new gradients before every step, all contenders in turn in one process, in random "
    "order. Ratios are of means, which refreshes of bases and roots count in, to the fastest peer of the family on the "
    "same set. GFLOPs: matrix products of an ordinary step, without refreshes. GEMM limit: the time that they take at "
    "the best rate of a product (for Muon in whichever of bfloat16 and float32 is faster, else in float32) measured in "
    "the same process, over the mean. First: the first step, in which state is made, products are measured and steps "
    "are compiled. Like a backward pass, the process has freed large tensors before."
)


def write_step(rows: list[Row], out: Path) -> None:
    """Print the table, and write `step.md` and `step.png`."""
    table = [line(row, rows) for row in rows]
    first = rows[0]
    set_aside(out / "step.md", "step.png")
    setting = f"torch {first['torch']}, {first['threads']} threads, {len(first['seconds'])} rounds. {NOTES}"
    plot_step(rows, out)
    publish(table, setting, out / "step.md", ["![ratios](step.png)"])


def reference(row: Row, rows: list[Row]) -> Row | None:
    """The fastest peer of a row's family on its set; `None` where no peer is installed."""
    peers = [r for r in rows if r["set"] == row["set"] and r["family"] == row["family"] and not is_ours(r)]
    return min(peers, key=lambda r: float(r["mean"])) if peers else None


def is_ours(row: Row) -> bool:
    """Whether the optimizer is normopt's."""
    return str(row["name"]).startswith(OURS)


def line(row: Row, rows: list[Row]) -> dict[str, str]:
    """One line of the table."""
    low, median, high = (1e3 * q for q in row["quartiles"])
    fastest = reference(row, rows)
    rates = row["product_rate"]
    rate = max(rates.values()) if row["family"] == "muon" else rates["float32"]
    return {
        "parameters": f"{row['set']}: {row['parameters'] / 1e6:.2f} M",
        "optimizer": row["name"],
        "median ms": f"{median:.3g}",
        "quartiles": f"{low:.3g} .. {high:.3g}",
        "mean ms": f"{1e3 * row['mean']:.3g}",
        "/ fastest peer": f"{row['mean'] / fastest['mean']:.2f}" if fastest else "",
        "first ms": f"{1e3 * row['first']:.3g}",
        "state B/param": f"{row['state_bytes_per_parameter']:.2f}",
        "GFLOPs": f"{row['flops'] / 1e9:.3g}" if row["flops"] else "",
        "GEMM limit": f"{100 * row['flops'] / rate / row['mean']:.0f}%" if row["flops"] else "",
    }


def plot_step(rows: list[Row], out: Path) -> None:
    """Bars of the ratios to the fastest peer, with quartiles, a panel for each set."""
    sets = list(dict.fromkeys(str(row["set"]) for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(sets), 0.34 * len(rows) / len(sets) + 1.2), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets, strict=True):
            shown = [(row, fastest) for row in rows if row["set"] == name and (fastest := reference(row, rows))]
            for i, (row, fastest) in enumerate(shown):
                low, median, high = (q / fastest["mean"] for q in row["quartiles"])
                color = "C1" if is_ours(row) else "C0"
                spread = [[median - low], [high - median]]
                axes.barh(i, median, xerr=spread, color=color, alpha=0.85, error_kw={"linewidth": 1})
                axes.plot(row["mean"] / fastest["mean"], i, marker="|", color="black", markersize=9)
            axes.set_yticks(range(len(shown)), [row["name"] for row, _ in shown], fontsize=8)
            axes.invert_yaxis()
            axes.axvline(1, color="black", linewidth=0.8)
            axes.set_title(f"{name}, {shown[0][0]['parameters'] / 1e6:.2f} M parameters", loc="left", fontsize=11)
        figure.supxlabel("step time / mean of the fastest peer (bar: median, mark: mean)", fontsize=9)
        save(figure, out / "step.png")
