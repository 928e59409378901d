"""Plots of finished runs as files: the figures of `benchmarks.output.figures`, and norms inside models."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.figure import Figure

from benchmarks.output import figures
from benchmarks.output.records import Row, replacing
from benchmarks.output.rows import split_of
from benchmarks.output.targets import Target
from benchmarks.output.transfer import Coordinates, Drift

matplotlib.use("Agg")
COLORS = cycler(color=["#4c566a", "#d1495b", "#00798c", "#edae49", "#6a4c93", "#3a7d44"])
STYLE: dict[Any, Any] = {
    **figures.STYLE,
    "axes.prop_cycle": cycler(linestyle=["-", "--", ":", "-."]) * COLORS,
}


def plot_curves(groups: dict[str, list[Row]], out: Path, unit: str) -> None:
    """Validation loss of each optimizer against steps (`loss_steps.png`) and seconds (`loss_seconds.png`)."""
    device = next(iter(groups.values()))[0]["config"]["device"]
    seconds = "CPU seconds of training" if device == "cpu" else "seconds of training"
    for column, label, name in ((0, "step", "loss_steps.png"), (1, seconds, "loss_seconds.png")):
        with figures.styled():
            save(figures.curves(groups, column, label, unit, _title(groups)), out / name)


def plot_rates(groups: dict[tuple[str, float], list[Row]], path: Path, unit: str) -> None:
    """Final loss against the learning rate, a line per optimizer, a dot per run; if there are many lines, in panels."""
    with figures.styled():
        save(figures.rates(groups, unit, _title(groups)), path)


def plot_best(best: dict[str, list[float]], out: Path, unit: str) -> None:
    """The expected best loss against the number of trials, a line per optimizer (`sweep.png`)."""
    with figures.styled():
        save(figures.best_of(best, unit), out / "sweep.png")


def plot_horizons(losses: dict[str, dict[int, float]], targets: Sequence[Target], out: Path, unit: str) -> None:
    """Final loss of annealed runs against the length of the runs, with lines at the targets (`horizons.png`)."""
    with figures.styled():
        save(figures.horizons(losses, targets, unit), out / "horizons.png")


def plot_transfer(found: Sequence[Drift], path: Path, unit: str) -> None:
    """Final loss against the learning rate at several widths or depths, a panel per optimizer."""
    with figures.styled():
        save(figures.transfer(found, unit), path)


def plot_coordinates(found: Sequence[Coordinates], path: Path) -> None:
    """Root mean squares of activations against the width, a panel per optimizer."""
    with figures.styled():
        save(figures.coordinates(found), path)


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


def _title(groups: "dict[str, list[Row]] | dict[tuple[str, float], list[Row]]") -> str:
    first = [rows[0] for rows in groups.values()]
    configs = [row["config"] for row in first]
    models = ", ".join(dict.fromkeys(config["model"] for config in configs))
    return f"{models} {configs[0]['preset']['name']}, {configs[0]['source']}, {split_of(first[0])} text"


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
