"""The table and the plots of `python -m benchmarks polar`."""

from collections.abc import Callable
from pathlib import Path

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.cost.machine import by_threads, setting, threads_text
from benchmarks.output.plots import COLORS, STYLE, save
from benchmarks.output.records import Row
from benchmarks.output.tables import drawn, publish_text, set_aside, show

NOTES = (
    "Shapes are matrices x short x long sides, in float32; dtype is that of the products. Time is a ratio to "
    "torch.optim.Muon's Newton-Schulz in bfloat16, one matrix at a time, measured in turn in the same process "
    "(medians). GEMM limit: the time that the method's FLOPs take at the best rate of a product in that "
    "dtype in the same run, over the method's time. low, high: singular values of the result over directions of at "
    "least 1e-2 of the largest, the worst of a Gaussian matrix and of spectra 1/k and log-uniform in [1e-3, 1]; "
    "ascent: <g, d> over the nuclear norm, the worst; distance: from the exact factor, relative, Gaussian."
)
#: Jordan's five steps in the form and dtype that are fastest, what Muon does by default.
MUON = "normopt's Muon"
#: Methods whose dtype is chosen by the shape.
CHOSEN = ("auto", MUON)
PLOTS = ("pareto", "width", "count")
MARKERS = {"float32": "o", "bfloat16": "s"}
EIGHT_COLORS = STYLE | {"axes.prop_cycle": COLORS.concat(cycler(color=["#b07d62", "#8fbcbb"]))}


def write_polar(rows: list[Row], out: Path) -> None:
    """Print the tables, and write `polar.md` and, for each thread setting, the three plots of `PLOTS` beside it."""
    settings = by_threads(rows)
    set_aside(out / "polar.md", *(f"polar_{name}{suffix}.png" for name in PLOTS for suffix in settings))
    paragraphs = [f"{setting(rows)} {rows[0]['repeats']} repeats. {NOTES}"]
    for suffix, here in settings.items():
        rates = {row["dtype"]: max(r["product_rate"] for r in here if r["dtype"] == row["dtype"]) for row in here}
        table = [line(row, rates[row["dtype"]]) for row in here]
        plot_pareto(here, out / f"polar_pareto{suffix}.png")
        plot_growth(here, out / f"polar_width{suffix}.png", out / f"polar_count{suffix}.png")
        title = f"On {threads_text(here[0])}"
        show(table, title)
        paragraphs += [f"## {title}", drawn(table, "github")]
        paragraphs += [f"![{name}](polar_{name}{suffix}.png)" for name in PLOTS]
    publish_text(paragraphs, out / "polar.md")


def line(row: Row, rate: float) -> dict[str, str]:
    """One line of the table; `rate` is the best rate of matrix products, in FLOP/s."""
    return {
        "shape": " x ".join(map(str, row["shape"])),
        "method": row["method"],
        "dtype": row["dtype"],
        "form": row["form"],
        "ms": f"{1e3 * row['seconds']:.3g}",
        "time / torch": f"{row['ratio']:.2f}",
        "GFLOPs": f"{row['flops'] / 1e9:.3g}",
        "GEMM limit": f"{100 * row['flops'] / rate / row['seconds']:.0f}%",
        "low": f"{row['low']:.3f}",
        "high": f"{row['high']:.3f}",
        "ascent": f"{row['ascent']:.3f}",
        "distance": f"{row['distance']:.2g}",
    }


def plot_pareto(rows: list[Row], path: Path) -> None:
    """Time against the largest deviation from 1, a panel for each aspect ratio of the largest size."""
    single = [row for row in rows if row["shape"][0] == 1]
    size = max(row["shape"][1] for row in single)
    longs = sorted({row["shape"][2] for row in single if row["shape"][1] == size})
    with matplotlib.rc_context(EIGHT_COLORS):
        figure = Figure(figsize=(4 * len(longs), 4.4), layout="constrained")
        panels = figure.subplots(1, len(longs), squeeze=False, sharey=True)[0]
        for axes, long in zip(panels, longs, strict=True):
            _scatter(axes, [row for row in single if row["shape"][1:] == [size, long]])
            axes.set_title(f"{size} x {long}", loc="left", fontsize=11)
            axes.set_xlabel("time / torch.optim.Muon")
        panels[0].set_ylabel("largest deviation from 1")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        save(figure, path)


def _scatter(axes: Axes, rows: list[Row]) -> None:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for row in rows:
        deviation = max(1 - row["low"], row["high"] - 1, 1e-7)
        color, marker = f"C{methods.index(row['method'])}", MARKERS[row["dtype"]]
        axes.scatter(row["ratio"], deviation, color=color, marker=marker, label=f"{row['method']}, {row['dtype']}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def plot_growth(rows: list[Row], by_width: Path, by_count: Path) -> None:
    """Time against the width of one square matrix, and against the number of matrices."""
    square = [row for row in rows if row["shape"][0] == 1 and row["shape"][1] == row["shape"][2]]
    _growth(square, lambda row: row["shape"][1], "width of a square matrix", by_width)
    sides = max(rows, key=lambda row: row["shape"][0])["shape"][1:]
    many = sorted((row for row in rows if row["shape"][1:] == sides), key=lambda row: row["shape"][0])
    label = f"matrices of {sides[0]} x {sides[1]}"
    _growth(many, lambda row: row["shape"][0], label, by_count)


def _growth(rows: list[Row], x: Callable[[Row], int], label: str, path: Path) -> None:
    with matplotlib.rc_context(EIGHT_COLORS):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.subplots()
        methods = list(dict.fromkeys(row["method"] for row in rows))
        # Where the dtype depends on the shape, the line is drawn through all dtypes.
        names = dict.fromkeys((row["method"], "" if row["method"] in CHOSEN else row["dtype"]) for row in rows)
        for method, dtype in names:
            of_line = [row for row in rows if row["method"] == method and dtype in ("", row["dtype"])]
            style = ":" if dtype == "float32" else "-"
            name = ", ".join(filter(None, (method, dtype)))
            color = f"C{methods.index(method)}"
            axes.plot(
                [x(row) for row in of_line], [1e3 * row["seconds"] for row in of_line], style, color=color, label=name
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(label)
        axes.set_ylabel("milliseconds")
        axes.legend(fontsize=8)
        save(figure, path)
