"""Figures of finished runs: every optimizer in its family's colour, the baseline black, names beside the lines."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from benchmarks.output.palette import color
from benchmarks.output.palette import lines as drawn_as
from benchmarks.output.records import Row
from benchmarks.output.rows import group
from benchmarks.output.targets import Target
from benchmarks.output.transfer import Coordinates, Drift, differ_in_rate_alone

STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#6b7280",
    "axes.labelcolor": "#374151",
    "xtick.color": "#6b7280",
    "ytick.color": "#6b7280",
    "xtick.labelcolor": "#374151",
    "ytick.labelcolor": "#374151",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.8,
    "font.size": 10,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "normopt",
}
#: The most names that fit beside the axes of a figure of the usual height.
MAX_NAMES = 26
#: The most optimizers that share axes; more get a panel each.
MAX_LINES = 12
#: The part of a run, from its start, whose losses may lie above the picture.
START = 0.15
#: How far above the largest of the best losses figures of tuning and transfer go, in the unit of the loss.
ROOM = 0.45

Interval = tuple[float, float, float]


def new(width: float = 7.6, height: float = 4.4) -> Figure:
    """An empty figure; the sizes are inches."""
    return Figure(figsize=(width, height), layout="constrained")


def curves(groups: Mapping[str, list[Row]], column: int, x: str, unit: str, title: str = "") -> Figure:
    """The mean loss over the seeds against `column` of the curves (0: steps, 1: seconds), with a band.

    The band is from the lowest to the highest seed. Losses of the first `START` of the runs may lie above the picture.
    """
    figure = new(9.4, 4.8)
    axes = figure.subplots()
    found, early = [], []
    for name, style in drawn_as(groups).items():
        rows = _alike([row for row in groups[name] if row["status"] == "finished" and len(row["curve"]) > 1])
        if not rows:
            continue
        points = np.array([row["curve"] for row in rows])[:, 1:]
        xs, losses = points[:, :, column].mean(axis=0), points[:, :, 2]
        axes.plot(xs, losses.mean(axis=0), linewidth=1.8, **style)
        if len(rows) > 1:
            axes.fill_between(xs, losses.min(axis=0), losses.max(axis=0), color=style["color"], alpha=0.18, linewidth=0)
        final = float(np.mean([row["final_loss"] for row in rows]))
        found.append((float(xs[-1]), float(losses[:, -1].mean()), f"{name}  {final:.3f}", style))
        early.append((float(losses.mean(axis=0)[math.floor(START * len(xs))]), float(losses.min())))
    if early:
        top, bottom = max(value for value, _ in early), min(value for _, value in early)
        axes.set_ylim(bottom - 0.04 * (top - bottom), top + 0.02 * (top - bottom))
        axes.set_xlim(0, max(end for end, *_ in found))
    _finish(axes, x, f"loss, {unit}", title)
    names_at_lines(axes, found)
    return figure


def _alike(rows: Sequence[Row]) -> list[Row]:
    """The rows whose curves have points at the same steps; where there are several kinds, the most."""
    kinds = group(list(rows), lambda row: tuple(point[0] for point in row["curve"]))
    return max(kinds.values(), key=len, default=[])


def horizons(losses: Mapping[str, Mapping[int, float]], targets: Sequence[Target], unit: str) -> Figure:
    """Final loss of annealed runs against the length of the runs, with lines at the targets.

    Only optimizers with runs of several lengths are drawn.
    """
    several = {name: by_length for name, by_length in losses.items() if len(by_length) > 1}
    figure = new(9.4, 4.8)
    axes = figure.subplots()
    found = []
    for name, style in drawn_as(several).items():
        by_length = several[name]
        axes.plot(list(by_length), list(by_length.values()), marker="o", markersize=4, linewidth=1.8, **style)
        found.append((max(by_length), by_length[max(by_length)], name, style))
    lengths = sorted({length for by_length in several.values() for length in by_length})
    for target, style in zip(targets, ((0, (5, 3)), (0, (1, 2))), strict=False):
        axes.axhline(target.loss, color="black", linewidth=1, linestyle=style)
        found.append((max(lengths), target.loss, target.name, {"color": "black"}))
    axes.set_xscale("log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    _finish(axes, "steps of an annealed run", f"loss, {unit}")
    names_at_lines(axes, found)
    return figure


def intervals(values: Mapping[str, Interval], x: str, reference: float | None = None, log: bool = False) -> Figure:
    """A line for each name, the first at the top: (middle, low, high) as a dot on a bar, and a line at `reference`."""
    figure = new(7.6, 0.9 + 0.24 * len(values))
    axes = figure.subplots()
    for place, (name, (middle, low, high)) in enumerate(values.items()):
        shown = drawn_as([name])[name]["color"]
        axes.plot([low, high], [place, place], color=shown, linewidth=2.2, alpha=0.55, solid_capstyle="butt")
        axes.plot([middle], [place], marker="o", markersize=5.5, color=shown)
    if reference is not None:
        axes.axvline(reference, color="black", linewidth=1, linestyle=(0, (5, 3)), zorder=1)
    axes.set_yticks(range(len(values)), list(values), fontsize=9)
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    if log:
        axes.set_xscale("log")
        ticks = _round_numbers(*axes.get_xlim())
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    _finish(axes, x, "")
    return figure


def _round_numbers(low: float, high: float) -> list[float]:
    """Round numbers for the ticks of a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [digit * 10.0**decade for decade in decades for digit in (1, 1.5, 2, 3, 4, 6)]
    return [tick for tick in every if low <= tick <= high]


def best_of(expected: Mapping[str, Sequence[float]], unit: str) -> Figure:
    """The expected best loss of 1, 2, ... trials, infinite values left out."""
    figure = new(9.4, 4.8)
    axes = figure.subplots()
    found = []
    for name, style in drawn_as(expected).items():
        points = [(k, loss) for k, loss in enumerate(expected[name], 1) if math.isfinite(loss)]
        if points:
            ks, losses = zip(*points, strict=True)
            axes.plot(ks, losses, marker="o", markersize=3, linewidth=1.8, **style)
            found.append((float(ks[-1]), float(losses[-1]), name, style))
    if found:
        coloured = [name for name, style in drawn_as(expected).items() if style["zorder"] > 1]
        finite = [loss for name in coloured for loss in expected[name] if math.isfinite(loss)]
        top = min(max(finite), max(loss for _, loss, _, _ in found) + ROOM)
        room = 0.08 * (top - min(finite)) + 1e-3
        axes.set_ylim(min(finite) - room, top + room)
        axes.set_xscale("log", base=2)
        most = max(map(len, expected.values()))
        ticks = [2**i for i in range(most.bit_length()) if 2**i <= most]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    _finish(axes, "trials k", f"expected best loss, {unit}")
    names_at_lines(axes, found)
    return figure


def rates(groups: Mapping[tuple[str, float], list[Row]], unit: str, title: str = "") -> Figure:
    """Final loss against the learning rate: a dot a run, and a line through the means where runs differ in no more.

    Few optimizers share axes; many have a panel each, in the order given, and all panels share one y axis.
    """
    names = list(dict.fromkeys(name for name, _ in groups))
    if len(names) > MAX_LINES:
        return _rate_panels(groups, names, unit)
    figure = new()
    axes = figure.subplots()
    found, best = [], []
    for name, style in drawn_as(names).items():
        xs, means = _draw_rates(axes, groups, name, style)
        finite = [(rate, mean) for rate, mean in zip(xs, means, strict=True) if math.isfinite(mean)]
        if finite:
            found.append((*finite[-1], name, style))
            best.append(min(mean for _, mean in finite))
    axes.set_xscale("log", base=10)
    if best:
        axes.set_ylim(min(best) - 0.03, min(axes.get_ylim()[1], max(best) + 0.6))
    _finish(axes, "learning rate", f"loss, {unit}", title)
    names_at_lines(axes, found)
    return figure


def _rate_panels(groups: Mapping[tuple[str, float], list[Row]], names: Sequence[str], unit: str) -> Figure:
    columns = 6
    rows = -(-len(names) // columns)
    figure = new(1.75 * columns, 0.5 + 1.45 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    best = []
    for place, (axes, name) in enumerate(zip(panels, names, strict=False)):
        style = {**drawn_as([name])[name], "linestyle": "-"}
        xs, means = _draw_rates(axes, groups, name, style)
        axes.set_xscale("log", base=2)
        axes.set_xlim(xs[0] / 1.3, xs[-1] * 1.3)  # also if every run diverged and there is no line
        ticks = xs if len(xs) < 4 else [xs[0], xs[len(xs) // 2], xs[-1]]
        axes.set_xticks(ticks, [f"{rate:.2g}" for rate in ticks])
        axes.minorticks_off()
        axes.set_title(name, loc="left", fontsize=8.5)
        axes.tick_params(labelsize=7, labelbottom=True, labelleft=place % columns == 0)
        best += [min(mean for mean in means if math.isfinite(mean))] if np.isfinite(means).any() else []
    top = float(np.median(best)) + 0.6 if best else math.inf
    for axes, name in zip(panels, names, strict=False):
        if not any(
            row["final_loss"] and row["final_loss"] <= top
            for key, some in groups.items()
            if key[0] == name
            for row in some
        ):
            axes.text(
                0.5, 0.5, "above, or diverged", transform=axes.transAxes, fontsize=7, ha="center", color="#6b7280"
            )
    if best:
        panels[0].set_ylim(min(best) - 0.05, top)
    for axes in panels[len(names) :]:
        axes.remove()
    figure.supxlabel("learning rate", fontsize=9, color="#374151")
    figure.supylabel(f"loss, {unit}", fontsize=9, color="#374151")
    return figure


def _draw_rates(
    axes: Axes, groups: Mapping[tuple[str, float], list[Row]], name: str, style: dict[str, Any]
) -> tuple[list[float], list[float]]:
    """One optimizer's line and dots; returns the rates and the mean losses, NaN where every run diverged."""
    xs = sorted(lr for other, lr in groups if other == name)
    runs = {lr: [row["final_loss"] for row in groups[name, lr] if row["final_loss"]] for lr in xs}
    means = [float(np.mean(runs[lr])) if runs[lr] else np.nan for lr in xs]
    if differ_in_rate_alone([row for lr in xs for row in groups[name, lr]]):
        axes.plot(xs, means, linewidth=1.8, **style)
    dots = [(lr, loss) for lr in xs for loss in runs[lr]]
    axes.scatter([lr for lr, _ in dots], [loss for _, loss in dots], color=style["color"], s=12)
    return xs, means


def step_times(times: Mapping[str, tuple[float, float]]) -> Figure:
    """Milliseconds of a step, a bar for each name, the first at the top: (forward and backward pass, optimizer)."""
    figure = new(7.6, 0.9 + 0.24 * len(times))
    axes = figure.subplots()
    places = range(len(times))
    gradient, optimizer = [time for time, _ in times.values()], [time for _, time in times.values()]
    shades = [drawn_as([name])[name]["color"] for name in times]
    axes.barh(places, gradient, color="#d1d5db", height=0.65)
    axes.barh(places, optimizer, left=gradient, color=shades, height=0.65)
    axes.set_yticks(places, list(times), fontsize=9)
    axes.set_ylim(len(times) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    _finish(axes, "ms a step: forward and backward pass (grey), optimizer (colour)", "")
    return figure


def shares(points: Mapping[str, tuple[float, float]], baseline: str) -> Figure:
    """Steps against seconds to a target, both as shares of the baseline's; on the diagonal steps cost the same."""
    figure = new(7.6, 4.6)
    axes = figure.subplots()
    found = []
    for name, (steps, seconds) in points.items():
        style = drawn_as([name])[name]
        axes.plot([steps], [seconds], marker="o", markersize=6, color=style["color"], linestyle="")
        found.append((steps, seconds, name, style))
    top = 1.08 * max(max(pair) for pair in points.values())
    low = 0.85 * min(min(pair) for pair in points.values())
    axes.plot([low, top], [low, top], color="#9ca3af", linewidth=1, linestyle=(0, (1, 2)))
    axes.set(xlim=(low, top), ylim=(low, top))
    _finish(axes, f"steps, as a share of {baseline}'s", f"seconds, as a share of {baseline}'s")
    names_at_lines(axes, found)
    return figure


def transfer(found: Sequence[Drift], unit: str) -> Figure:
    """Mean final loss against the learning rate, a panel for each optimizer, a line for each size, dark for large.

    A tick below each line is the best rate, with a bar for its interval. All panels share one y axis.
    """
    columns = min(4, len(found))
    rows = -(-len(found) // columns)
    figure = new(max(4.6, 2.5 * columns), 0.4 + 2.5 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    bottom, top = _limits(found)
    for axes, drift in zip(panels, found, strict=False):
        names = []
        for place, (size, curve) in enumerate(drift.curves.items()):
            shade = _shade(color(drift.cell), (place + 1) / len(drift.curves))
            points = [(rate, loss) for rate, loss in curve.means.items() if math.isfinite(loss)]
            if points:
                axes.plot(*zip(*points, strict=True), color=shade, linewidth=1.7, marker="o", markersize=3)
                names.append((*points[-1], str(size), {"color": shade}))
                mark = min(curve.means.values()) - 0.06 * (top - bottom)
                _mark_best(axes, drift, size, mark, shade)
        tried = sorted({rate for curve in drift.curves.values() for rate in curve.means})
        axes.set_xscale("log", base=2)
        step = -(-len(tried) // 4)
        axes.set_xticks(tried[::step], [f"{rate:.2g}" for rate in tried[::step]])
        axes.minorticks_off()
        axes.tick_params(labelsize=7.5, labelbottom=True)
        axes.set_title(drift.cell, loc="left", fontsize=9.5)
        axes.set_ylim(bottom - 0.12 * (top - bottom), top + 0.04 * (top - bottom))
        names_at_lines(axes, names, size=7.5)
    for axes in panels[len(found) :]:
        axes.remove()
    figure.supxlabel(
        f"learning rate; the numbers beside the lines are the {found[0].axis}", fontsize=9, color="#374151"
    )
    figure.supylabel(f"loss, {unit}", fontsize=9, color="#374151")
    return figure


def _limits(found: Sequence[Drift]) -> tuple[float, float]:
    """The losses that a figure of transfer shows: from the best on, and no higher than `ROOM` above the worst best."""
    means = [curve.means.values() for drift in found for curve in drift.curves.values()]
    lows = [low for low in map(min, means) if math.isfinite(low)] or [0.0]
    all_finite = [mean for some in means for mean in some if math.isfinite(mean)] or [1.0]
    return min(lows), max(min(max(all_finite), max(lows) + ROOM), min(lows) + 0.05)


def _mark_best(axes: Axes, drift: Drift, size: int, loss: float, shade: Any) -> None:
    """A mark at the best rate, below its line, and a bar for the interval; hollow where it is at the edge."""
    best, interval = drift.curves[size].best, drift.rate_interval(size)
    if interval:
        axes.plot(interval, [loss, loss], color=shade, linewidth=2, alpha=0.5, solid_capstyle="butt")
    axes.plot([best.rate], [loss], marker="^", markersize=5, color=shade, mfc="white" if best.bound else shade)


def coordinates(found: Sequence[Coordinates]) -> Figure:
    """Root mean squares of activations against the width, a panel for each optimizer: dotted before the first step."""
    columns = min(4, len(found))
    rows = -(-len(found) // columns)
    figure = new(max(4.6, 2.5 * columns), 0.4 + 2.5 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    kinds = {"embedding": "#9ca3af", "attention": "#d1495b", "mlp": "#edae49", "stream": "#00798c", "logits": "#111827"}
    for axes, check in zip(panels, found, strict=False):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for kind, shade in kinds.items():
            axes.plot(*_points(check.start[kind]), color=shade, linestyle=":", linewidth=1.2)
            axes.plot(*_points(check.end[kind]), color=shade, linewidth=1.7, marker="o", markersize=3)
        widths = list(check.end["stream"])
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.minorticks_off()
        axes.tick_params(labelsize=7.5, labelbottom=True)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_title(check.cell, loc="left", fontsize=9.5)
    for axes, check in zip(panels, found, strict=False):  # when all have drawn: they share the y axis
        ends = [(*_last(check.end[kind]), kind, {"color": shade}) for kind, shade in kinds.items()]
        names_at_lines(axes, ends, size=7.5)
    for axes in panels[len(found) :]:
        axes.remove()
    steps = found[0].steps
    figure.supxlabel(f"width; dotted: before the first step, solid: after {steps} steps", fontsize=9, color="#374151")
    figure.supylabel("root mean square", fontsize=9, color="#374151")
    return figure


def _points(by_width: Mapping[int, float]) -> tuple[list[int], list[float]]:
    return list(by_width), list(by_width.values())


def _last(by_width: Mapping[int, float]) -> tuple[float, float]:
    return float(max(by_width)), by_width[max(by_width)]


def names_at_lines(axes: Axes, ends: Sequence[tuple[float, float, str, dict[str, Any]]], size: float = 8.5) -> None:
    """Write a name to the right of the axes for each line that ends at (x, y), in the line's colour, without overlap.

    To be called when the limits of the axes are set. Grey lines have names only where there is room for all.
    """
    if len(ends) > MAX_NAMES:
        ends = [end for end in ends if end[3].get("zorder", 2) > 1]
    to_axes = axes.transData + axes.transAxes.inverted()
    points = axes.get_window_extent().height * 72 / matplotlib.rcParams["figure.dpi"]
    gap = 1.22 * size / max(points, 1.0)
    ends = [end for end in ends if math.isfinite(end[1])]
    places = np.clip([to_axes.transform(end[:2]) for end in ends], 0, 1) if ends else np.empty((0, 2))
    order = np.argsort(places[:, 1], kind="stable")
    beside: dict[str, Any] = {"transform": axes.transAxes}
    for i, place in zip(order, spread(list(places[order, 1]), gap), strict=True):
        (x, y), (_, _, text, style) = places[i], ends[i]
        axes.plot([x, 1.0, 1.018], [y, y, place], clip_on=False, linewidth=0.6, color=style["color"], **beside)
        axes.text(1.024, place, text, fontsize=size, va="center", color=_ink(style["color"]), **beside)


def spread(values: Sequence[float], gap: float) -> list[float]:
    """The places nearest to ascending values that keep a gap between neighbours, moved into [0, 1] if they fit."""
    if not values:
        return []
    steps = gap * np.arange(len(values))
    nearest = isotonic_regression(np.array(values) - steps).x
    return [float(value) for value in np.clip(nearest, 0.0, max(0.0, 1.0 - steps[-1])) + steps]


def _ink(shade: Any) -> Any:
    """A colour dark enough for text: light colours are mixed with black."""
    rgb = np.array(to_rgb(shade))
    light = float(rgb @ (0.299, 0.587, 0.114))
    return tuple(rgb * min(1.0, 0.52 / max(light, 1e-9)))


def _shade(shade: Any, share: float) -> Any:
    """A colour mixed with white; all of it at 1."""
    rgb = np.array(to_rgb(shade))
    part = 0.3 + 0.7 * share
    return tuple(part * rgb + (1 - part))


def _finish(axes: Axes, x: str, y: str, title: str = "") -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if title:
        axes.set_title(title, loc="left", fontsize=10)


def styled() -> Any:
    """A block in which figures are drawn and written in the style of all figures."""
    return matplotlib.rc_context(STYLE)
