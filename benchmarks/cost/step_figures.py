"""The plots of `python -m benchmarks step`: ratios to the fastest peer, and the time of a tensor by their number."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.cost.contenders import SIDE, library_of
from benchmarks.cost.step_goals import ratio_of, statistic_of
from benchmarks.output.palette import LIBRARIES, OTHER, lines
from benchmarks.output.plots import STYLE, save
from benchmarks.output.records import Row
from benchmarks.output.rows import group

COLUMNS = 3  # panels beside each other
LIMITS = (0.2, 5.0)  # ratios that are shown at least
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def plot_step(rows: list[Row], title: str, path: Path) -> None:
    """A panel for each set, a row for each family: medians over that of the fastest peer, a dot for each optimizer.

    Large dots are normopt's default and the fastest of every other library, small ones all others.
    """
    sets = group(rows, lambda row: str(row["set"]))
    families = list(dict.fromkeys(str(row["family"]) for row in rows))
    wide = min(COLUMNS, len(sets))
    high = -(-len(sets) // wide)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.4 + 3.6 * wide, high * (0.3 * len(families) + 0.8) + 0.9), layout="constrained")
        panels = figure.subplots(high, wide, squeeze=False, sharex=True, sharey=True).flat
        for (name, here), axes in zip(sets.items(), panels, strict=False):
            _ratios(axes, here, families)
            size = f"{here[0]['tensors']} tensors, {count_text(here[0]['parameters'])} parameters"
            axes.set_title(f"{name}, {size}", loc="left", fontsize=10)
        for axes in panels:
            axes.set_visible(False)
        _plain(figure.axes[0], [ratio for row in rows if (ratio := ratio_of(row, rows)) is not None])
        figure.suptitle(f"Median step / fastest peer's (left of 1: faster)\n{title}", fontsize=11)
        figure.legend(handles=_handles(rows), loc="outside lower center", ncols=4 if wide > 1 else 1, fontsize=9)
        save(figure, path)


def _ratios(axes: Axes, rows: list[Row], families: list[str]) -> None:
    """One panel: the ratios of one set."""
    seen: set[tuple[str, str]] = set()
    for row in sorted(rows, key=_order):
        ratio = ratio_of(row, rows)
        if ratio is None:
            continue
        family, library = str(row["family"]), library_of(row["name"])
        style = {"s": 12, "alpha": 0.55, "zorder": 2} if (family, library) in seen else {"s": 46, "zorder": 3}
        seen.add((family, library))
        axes.scatter(ratio, families.index(family), color=LIBRARIES.get(library, OTHER), linewidths=0, **style)
    axes.set_yticks(range(len(families)), families, fontsize=9)
    axes.set_ylim(len(families) - 0.5, -0.5)
    axes.tick_params(labelbottom=True)
    axes.axvline(1, color="black", linewidth=0.8, zorder=1)
    axes.grid(axis="y", alpha=0.3)


def _order(row: Row) -> tuple[bool, float]:
    """Other libraries by their medians, the fastest first; then normopt's default and its other rows, as they came."""
    return (True, 0.0) if library_of(row["name"]) == "normopt" else (False, statistic_of(row, "median"))


def _plain(axes: Axes, ratios: list[float]) -> None:
    """A logarithmic axis, which all panels share, for these ratios, with numbers like 0.5 and 2."""
    axes.set_xscale("log")
    left, right = min([LIMITS[0], *ratios]) / 1.15, max([LIMITS[1], *ratios]) * 1.15
    axes.set_xlim(left, right)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if right < 300 * left else (1.0,)))
    axes.xaxis.set_major_formatter(PLAIN)
    axes.xaxis.set_minor_formatter(NullFormatter())


def _handles(rows: list[Row]) -> list[Line2D]:
    """The legend: a dot for each library."""
    libraries = dict.fromkeys(library_of(row["name"]) for row in rows)
    named = {name: color for name, color in LIBRARIES.items() if name in libraries}
    if others := [name for name in libraries if name not in LIBRARIES]:
        named[", ".join(others)] = OTHER
    return [Line2D([], [], linestyle="", marker="o", color=color, label=name) for name, color in named.items()]


def plot_scale(rows: list[Row], title: str, path: Path) -> None:
    """A panel for each family: microseconds a tensor against the number of tensors."""
    families = group(rows, lambda row: str(row["family"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * len(families), 4.8), layout="constrained")
        panels = figure.subplots(1, len(families), squeeze=False)[0]
        for (family, here), axes in zip(families.items(), panels, strict=True):
            by_name = group(sorted(here, key=lambda row: int(row["tensors"])), lambda row: str(row["name"]))
            styles = lines(by_name, lambda name: LIBRARIES.get(library_of(name), OTHER))
            for name, of_name in by_name.items():
                counts = [int(row["tensors"]) for row in of_name]
                each = [1e6 * statistic_of(row, "median") / row["tensors"] for row in of_name]
                axes.plot(counts, each, marker=".", linewidth=1.5, label=name, **styles[name])
            axes.set(xscale="log", yscale="log", xlabel=f"tensors of {SIDE} x {SIDE}")
            counts = sorted({int(row["tensors"]) for row in here})
            axes.set_xticks(counts, [str(count) for count in counts])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(PLAIN)
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_title(family, loc="left", fontsize=11)
            axes.legend(fontsize=8, handlelength=3, loc="upper center", bbox_to_anchor=(0.45, -0.2))
        figure.supylabel("microseconds a tensor", fontsize=10)
        figure.suptitle(f"Median step, {title}", fontsize=11)
        save(figure, path)


def count_text(count: int) -> str:
    """A number of parameters for people: "0.64 M", and below a tenth of a million all digits."""
    return f"{count / 1e6:.2f} M" if count >= 1e5 else str(count)
