"""Plots of finished runs: loss against steps, against seconds and against the learning rate."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.records import Row, replacing

matplotlib.use("Agg")
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 11,
    "legend.frameon": False,
    "axes.prop_cycle": cycler(color=["#4c566a", "#d1495b", "#00798c", "#edae49", "#6a4c93", "#3a7d44"]),
}


def plot_curves(groups: dict[str, list[Row]], out: Path, unit: str) -> None:
    """Validation loss of each optimizer against steps (`loss_steps.png`) and seconds (`loss_seconds.png`)."""
    device = next(iter(groups.values()))[0]["config"]["device"]
    seconds = "CPU seconds of training" if device == "cpu" else "seconds of training"
    for column, label, name in ((0, "step", "loss_steps.png"), (1, seconds, "loss_seconds.png")):
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(7.2, 4.6), layout="constrained")
            axes = figure.subplots()
            for optimizer, rows in groups.items():
                _draw_curve(axes, optimizer, [row for row in rows if row["status"] == "finished"], column)
            _label(axes, label, title=_title(groups), unit=unit)
            _save(figure, out / name)


def plot_rates(groups: dict[tuple[str, float], list[Row]], out: Path, unit: str) -> None:
    """Final loss against the learning rate, one line per optimizer, one dot per run (`sweep.png`)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.subplots()
        for optimizer in dict.fromkeys(name for name, _ in groups):
            rates = sorted(lr for name, lr in groups if name == optimizer)
            runs = {lr: [row["final_loss"] for row in groups[optimizer, lr] if row["final_loss"]] for lr in rates}
            means = [np.mean(runs[lr]) if runs[lr] else np.nan for lr in rates]
            (line,) = axes.plot(rates, means, label=optimizer, linewidth=2)
            dots = [(lr, loss) for lr in rates for loss in runs[lr]]
            axes.scatter([lr for lr, _ in dots], [loss for _, loss in dots], color=line.get_color(), s=18)
        axes.set_xscale("log", base=10)
        _label(axes, "learning rate", title=_title(groups), unit=unit)
        _save(figure, out / "sweep.png")


def _draw_curve(axes: Axes, name: str, rows: list[Row], column: int) -> None:
    """The mean curve over seeds, with a band from the lowest to the highest."""
    if not rows:
        return
    curves = np.array([row["curve"] for row in rows])[:, 1:]
    x, loss = curves[:, :, column].mean(axis=0), curves[:, :, 2]
    final = np.mean([row["final_loss"] for row in rows])
    (line,) = axes.plot(x, loss.mean(axis=0), label=f"{name}  {final:.3f}", linewidth=2)
    if len(rows) > 1:
        axes.fill_between(x, loss.min(axis=0), loss.max(axis=0), color=line.get_color(), alpha=0.2, linewidth=0)


def _label(axes: Axes, x: str, title: str, unit: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(f"validation loss ({unit})")
    axes.set_title(title, loc="left", fontsize=11)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _title(groups: "dict[str, list[Row]] | dict[tuple[str, float], list[Row]]") -> str:
    config = next(iter(groups.values()))[0]["config"]
    return f"{config['model']} {config['preset']['name']}, {config['source']}"


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
