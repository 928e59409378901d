"""Plots of finished runs: loss against steps, against seconds and against the learning rate."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.output.palette import lines as drawn_as
from benchmarks.output.records import Row, replacing
from benchmarks.output.rows import split_of
from benchmarks.output.targets import Target

matplotlib.use("Agg")
COLORS = cycler(color=["#4c566a", "#d1495b", "#00798c", "#edae49", "#6a4c93", "#3a7d44"])
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 11,
    "legend.frameon": False,
    "axes.prop_cycle": cycler(linestyle=["-", "--", ":", "-."]) * COLORS,
}


def plot_curves(groups: dict[str, list[Row]], out: Path, unit: str) -> None:
    """Held-out loss of each optimizer against steps (`loss_steps.png`) and seconds (`loss_seconds.png`)."""
    device = next(iter(groups.values()))[0]["config"]["device"]
    seconds = "CPU seconds of training" if device == "cpu" else "seconds of training"
    for column, label, name in ((0, "step", "loss_steps.png"), (1, seconds, "loss_seconds.png")):
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=_size(len(groups)), layout="constrained")
            axes = figure.subplots()
            drawn = drawn_as(groups)
            for optimizer, rows in groups.items():
                finished = [row for row in rows if row["status"] == "finished"]
                _draw_curve(axes, optimizer, finished, column, drawn[optimizer])
            _label(axes, label, title=_title(groups), unit=unit)
            save(figure, out / name)


#: The most lines whose names fit into the axes, and the most lines that a reader can tell apart.
MANY, MAX_LINES = 6, 12


def plot_rates(groups: dict[tuple[str, float], list[Row]], path: Path, unit: str) -> None:
    """Final loss against the learning rate, a line per optimizer, a dot per run; if there are many lines, in panels."""
    names = list(dict.fromkeys(name for name, _ in groups))
    with matplotlib.rc_context(STYLE):
        if len(names) > MAX_LINES:
            _plot_panels(groups, names, path, unit)
            return
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.subplots()
        for name, drawn in drawn_as(names).items():
            _draw_rates(axes, groups, name, drawn)
        axes.set_xscale("log", base=10)
        _label(axes, "learning rate", title=_title(groups), unit=unit)
        save(figure, path)


def _plot_panels(groups: dict[tuple[str, float], list[Row]], names: list[str], path: Path, unit: str) -> None:
    """A panel for each optimizer, in the order given; losses far above the optimizer's best are not shown."""
    columns = 6
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.2 * columns, 1.7 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, name in zip(panels, names, strict=False):
        rates, means = _draw_rates(axes, groups, name, drawn_as([name])[name])
        axes.set_xlim(0.9 * rates[0], 1.1 * rates[-1])  # also if every run diverged and there is no line
        axes.set_xscale("log", base=2)
        axes.set_xticks(rates, [f"{rate:.2g}" for rate in rates])
        if np.isfinite(means).any():
            axes.set_ylim(top=min(axes.get_ylim()[1], np.nanmin(means) + 0.3))
        axes.set_title(name, loc="left", fontsize=9)
        axes.tick_params(labelsize=6)
    for axes in panels[len(names) :]:
        axes.remove()
    figure.supxlabel("learning rate", fontsize=9)
    figure.supylabel(f"loss, {unit}", fontsize=9)
    save(figure, path)


def _draw_rates(
    axes: Axes, groups: dict[tuple[str, float], list[Row]], name: str, drawn: dict[str, Any]
) -> tuple[list[float], list[float]]:
    """One optimizer's line and dots; returns the rates and the mean losses, NaN where every run diverged."""
    rates = sorted(lr for other, lr in groups if other == name)
    runs = {lr: [row["final_loss"] for row in groups[name, lr] if row["final_loss"]] for lr in rates}
    means = [float(np.mean(runs[lr])) if runs[lr] else np.nan for lr in rates]
    (line,) = axes.plot(rates, means, label=name, linewidth=2, **drawn)
    dots = [(lr, loss) for lr in rates for loss in runs[lr]]
    axes.scatter([lr for lr, _ in dots], [loss for _, loss in dots], color=line.get_color(), s=18)
    return rates, means


def plot_best(best: dict[str, list[float]], out: Path, unit: str) -> None:
    """The expected best loss against the number of trials, a line per optimizer (`sweep.png`)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=_size(len(best)), layout="constrained")
        axes = figure.subplots()
        for name, drawn in drawn_as(best).items():
            finite = [(k, loss) for k, loss in enumerate(best[name], 1) if np.isfinite(loss)]
            axes.plot([k for k, _ in finite], [loss for _, loss in finite], label=name, linewidth=2, **drawn)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        _label(axes, "trials", title="expected best of the trials", unit=unit)
        save(figure, out / "sweep.png")


def plot_horizons(losses: dict[str, dict[int, float]], targets: Sequence[Target], out: Path, unit: str) -> None:
    """Final loss of annealed runs against the length of the runs, with lines at the targets (`horizons.png`).

    Only optimizers with runs of several lengths are drawn.
    """
    with matplotlib.rc_context(STYLE):
        several = {name: by_length for name, by_length in losses.items() if len(by_length) > 1}
        figure = Figure(figsize=_size(len(several) + len(targets)), layout="constrained")
        axes = figure.subplots()
        drawn = drawn_as(several)
        for name, by_length in several.items():
            axes.plot(list(by_length), list(by_length.values()), marker="o", label=name, linewidth=2, **drawn[name])
        lengths = sorted({length for by_length in losses.values() for length in by_length})
        for target, style in zip(targets, itertools.cycle(("--", ":")), strict=False):
            axes.axhline(target.loss, color="black", linewidth=1, linestyle=style, label=target.name)
        axes.set_xscale("log")
        axes.set_xticks(lengths, [str(length) for length in lengths], minor=False)
        axes.minorticks_off()
        _label(axes, "steps of an annealed run", title="", unit=unit)
        save(figure, out / "horizons.png")


def plot_norms(rows: dict[str, Row], out: Path) -> list[str]:
    """Norms inside the models, a panel for each run; returns the names of the files.

    The residual stream by depth (`norms_residual.png`), a line for each evaluation; mean row norms (`norms_rows.png`)
    and alpha (`norms_alpha.png`, of models that have an alpha) over training, a line for each layer and kind.
    """
    written = []
    panels = {
        "norms_residual.png": ("layer", "mean length of the residual stream", _residual_lines),
        "norms_rows.png": ("step", "mean length of rows", lambda row: _lines_over_steps(row, "rows")),
        "norms_alpha.png": ("step", "mean |alpha|", lambda row: _lines_over_steps(row, "alpha")),
    }
    for name, (x, y, lines) in panels.items():
        with matplotlib.rc_context(STYLE):
            drawn = {title: found for title, row in rows.items() if (found := lines(row))}
            if not drawn:
                continue
            figure = Figure(figsize=(4.4 * len(drawn), 4.2), layout="constrained")
            frames = figure.subplots(1, len(drawn), squeeze=False)[0]
            for axes, (title, found) in zip(frames, drawn.items(), strict=True):
                for label, color, xs, ys in found:
                    axes.plot(xs, ys, color=color, linestyle="-", label=label, linewidth=1.5)
                axes.set(xlabel=x, ylabel=y)
                axes.set_title(title, loc="left", fontsize=11)
                axes.legend(fontsize=8)
            save(figure, out / name)
            written.append(name)
    return written


Line = tuple[str | None, Any, list[float], list[float]]


def _residual_lines(row: Row) -> list[Line]:
    """The length of the stream by depth, from the first evaluation (light) to the last (dark)."""
    norms, colors = row["norms"], matplotlib.colormaps["viridis_r"]
    shown = {0, len(norms) // 4, len(norms) // 2, len(norms) - 1}
    return [
        (
            f"step {step}" if i in shown else None,
            colors(i / max(1, len(norms) - 1)),
            list(range(len(found["residual"]))),
            found["residual"],
        )
        for i, (step, found) in enumerate(norms)
    ]


def _lines_over_steps(row: Row, what: str) -> list[Line]:
    """One line for each kind and layer; the legend names the kind once, at the line of the first layer."""
    steps = [step for step, _ in row["norms"]]
    cycle = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
    lines = []
    for (kind, layers), color in zip(row["norms"][0][1][what].items(), itertools.cycle(cycle)):
        for layer in range(len(layers)):
            lengths = [found[what][kind][layer] for _, found in row["norms"]]
            lines.append((kind if layer == 0 else None, color, steps, lengths))
    return lines


def _draw_curve(axes: Axes, name: str, rows: list[Row], column: int, drawn: dict[str, Any]) -> None:
    """The mean curve over seeds, with a band from the lowest to the highest."""
    if not rows:
        return
    curves = np.array([row["curve"] for row in rows])[:, 1:]
    x, loss = curves[:, :, column].mean(axis=0), curves[:, :, 2]
    final = np.mean([row["final_loss"] for row in rows])
    (line,) = axes.plot(x, loss.mean(axis=0), label=f"{name}  {final:.3f}", linewidth=2, **drawn)
    if len(rows) > 1:
        axes.fill_between(x, loss.min(axis=0), loss.max(axis=0), color=line.get_color(), alpha=0.2, linewidth=0)


def _label(axes: Axes, x: str, title: str, unit: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(f"loss ({unit})")
    axes.set_title(title, loc="left", fontsize=11)
    if lines := axes.get_legend_handles_labels()[0]:
        beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(lines) > MANY else {}
        axes.legend(**beside, fontsize=8 if len(lines) > MAX_LINES else None)


def _size(lines: int) -> tuple[float, float]:
    """Inches of a figure with that many lines: wider if the names of the lines are beside the axes."""
    return (7.2, 4.6) if lines <= MANY else (10, 5)


def _title(groups: "dict[str, list[Row]] | dict[tuple[str, float], list[Row]]") -> str:
    first = [rows[0] for rows in groups.values()]
    configs = [row["config"] for row in first]
    models = ", ".join(dict.fromkeys(config["model"] for config in configs))
    return f"{models} {configs[0]['preset']['name']}, {configs[0]['source']}, {split_of(first[0])} text"


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
