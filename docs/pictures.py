"""The pictures of the documentation: ``python -m docs.pictures`` writes all of them to docs/pictures.

What descends under one norm has one colour everywhere, that of :mod:`benchmarks.output.palette`.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import Tensor

import normopt
from benchmarks.output.palette import COLORS, NO_NORM, OTHER
from benchmarks.output.plots import STYLE, save
from normopt import Column, Euclidean, Max, Norm, Nuclear, Row, Schatten, Spectral
from normopt.directions import Direction
from normopt.report import MEMORIES, periodic_table

OUT = Path(__file__).with_name("pictures")

#: The norms of the balls and of the walks, at scale 1 and exactly.
NORMS: list[Norm] = [
    Max("unit"),
    Euclidean("unit"),
    Spectral("unit", "exact"),
    Schatten(4, scale="unit"),
    Nuclear("unit"),
]

#: What each norm's optimizers are called, for titles.
KNOWN = {"Max": "sign descent, Adam", "Euclidean": "gradient descent", "Spectral": "Muon, Shampoo"}
KNOWN |= {"Schatten": "p = 4", "Nuclear": "rank one"}


def matrix(a: Any, b: Any) -> Tensor:
    """``[[a, b], [b, a]]``, a plane of matrices that every one of these duality maps keeps; (..., 2, 2)."""
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    return torch.stack([torch.stack([a, b], -1), torch.stack([b, a], -1)], -2)


def color(norm: Direction) -> str:
    """The colour of a norm's family."""
    return COLORS.get(type(norm).__name__, NO_NORM)


# Balls ---------------------------------------------------------------------------------------------------------------


def balls() -> Figure:
    """Unit balls of norms in the plane of ``matrix``, a gradient, and where each ball reaches furthest along it."""
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    gradient = np.array([2.0, 0.8])
    angles = torch.linspace(0, 2 * torch.pi, 721, dtype=torch.float64)
    for axes, norm in zip(figure.subplots(1, len(NORMS)), NORMS, strict=True):
        circle = matrix(angles.cos(), angles.sin())
        edge = circle / norm.norm(circle)[:, None, None]
        axes.fill(edge[:, 0, 0], edge[:, 0, 1], color=color(norm), alpha=0.25)
        axes.plot(edge[:, 0, 0], edge[:, 0, 1], color=color(norm), linewidth=2)
        best = norm.dualize(matrix(*gradient))[0]
        value = float(best.numpy() @ gradient)
        # All matrices with the same inner product: the line that touches the ball.
        across = np.array([-gradient[1], gradient[0]]) / np.linalg.norm(gradient)
        touching = best.numpy() + np.outer([-0.9, 0.9], across)
        axes.plot(*touching.T, color="black", linewidth=1, linestyle=":")
        arrow(axes, (0, 0), gradient / 2, "black")
        arrow(axes, (0, 0), best.numpy(), color(norm))
        axes.plot(*best, "o", color=color(norm), markersize=8)
        name = type(norm).__name__
        axes.set_title(f"{name}: {KNOWN[name]}", fontsize=11, loc="left")
        axes.set(xlim=(-1.3, 1.6), ylim=(-1.3, 1.6), aspect="equal", xlabel="a")
        axes.text(-1.25, 1.42, f"dual norm {2 * value:.2f}", fontsize=9)
        axes.set_xticks([-1, 0, 1])
        axes.set_yticks([-1, 0, 1])
    figure.axes[0].set_ylabel("b")
    figure.suptitle(
        "Matrices [[a, b], [b, a]]: unit balls, half of a gradient (black), its duality map (colour)", fontsize=11
    )
    return figure


def arrow(axes: Axes, start: Any, end: Any, colour: str) -> None:
    """An arrow between two points in the units of the axes."""
    style = {"arrowstyle": "-|>", "mutation_scale": 14, "linewidth": 2, "color": colour, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(tuple(map(float, start)), tuple(map(float, end)), **style))


# Singular values -----------------------------------------------------------------------------------------------------


def spectra() -> Figure:
    """Singular values of the gradient of a layer of a small GPT, before and after each duality map."""
    gradient = gradient_of_a_layer()
    maps: dict[str, Norm] = {
        "Max: sign": Max("unit"),
        "Row: rows of one length": Row("unit"),
        "Column: columns of one length": Column("unit"),
        "Schatten(4): cube roots": Schatten(4, scale="unit"),
        "Spectral, five steps of Newton-Schulz": Spectral("unit", "newton-schulz"),
        "Spectral, exactly": Spectral("unit", "exact"),
    }
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(relative(gradient), color=COLORS["Euclidean"], linewidth=2, label="gradient (Euclidean)")
    for (label, norm), style in zip(maps.items(), ["-", "-", "-", "-", ":", "-"], strict=True):
        axes.plot(relative(norm.dualize(gradient)), color=color(norm), linestyle=style, linewidth=2, label=label)
    axes.set(yscale="log", ylim=(4e-3, 1.5), xlabel="index", ylabel="singular value over the largest")
    axes.legend(fontsize=9, loc="lower left")
    axes.set_title("MLP matrix of a GPT after 30 steps, 128 x 32", fontsize=11, loc="left")
    return figure


def gradient_of_a_layer() -> Tensor:
    """The gradient of one MLP matrix of a small GPT that has trained for 30 steps on LICENSE."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = normopt.nn.GPT(vocab_size=256, d_model=32, n_layers=2, n_heads=2)
        optimizer = normopt.create("adamw", model, lr=3e-3)
        text = torch.tensor(list((Path(__file__).parents[1] / "LICENSE").read_bytes()[:1025]))
        for _ in range(31):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(text[None, :-1])[0], text[1:])
            loss.backward()
            optimizer.step()
    found = model.blocks[1].mlp.up.weight.grad
    assert isinstance(found, Tensor)
    return found.double()


def relative(x: Tensor) -> np.ndarray[Any, Any]:
    """Singular values over the largest, from the largest to the smallest."""
    values = torch.linalg.svdvals(x.double())
    return (values / values[0]).numpy()


# Walks ---------------------------------------------------------------------------------------------------------------

#: Curvatures of the landscape along a and b, which are turned by ``TURN`` radians against each other.
CURVATURES, TURN = (1.0, 0.06), 0.5


def landscape(a: Tensor, b: Tensor) -> Tensor:
    """A valley in the plane of ``matrix``, turned against the axes, with its minimum at 0."""
    x = np.cos(TURN) * a + np.sin(TURN) * b
    y = -np.sin(TURN) * a + np.cos(TURN) * b
    return 0.5 * (CURVATURES[0] * x**2 + CURVATURES[1] * y**2)


def walks() -> Figure:
    """Each norm's descent on one landscape from one point, every step as long as the last but 0.93 times."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    grid = torch.linspace(-2, 2.6, 161, dtype=torch.float64)
    a, b = torch.meshgrid(grid, grid, indexing="xy")
    for axes, norm in zip(figure.subplots(1, 4), NORMS, strict=False):  # the last walks as the first
        axes.contour(a, b, landscape(a, b), levels=np.geomspace(0.005, 3, 12), colors="#c8ccd4", linewidths=0.8)
        path = np.array([*walk(norm)])
        axes.plot(*path.T, "-o", color=color(norm), markersize=3, linewidth=1.5)
        axes.plot(0, 0, "k+", markersize=9)
        name = type(norm).__name__
        loss = float(landscape(*torch.tensor(path[-1])))
        axes.set_title(f"{name}, loss {loss:.0e}", fontsize=11, loc="left")
        axes.set(xlim=(-2, 0.8), ylim=(-0.4, 2.4), aspect="equal", xlabel="a")
        axes.grid(visible=False)
    figure.axes[0].set_ylabel("b")
    return figure


def walk(norm: Norm, steps: int = 30) -> Iterator[tuple[float, float]]:
    """Points (a, b) of steepest descent; the first step has Euclidean length 0.35 for every norm."""
    at = torch.tensor([-1.4, 2.0], dtype=torch.float64)
    yield float(at[0]), float(at[1])
    for step in range(steps):
        at.requires_grad_(True)
        (gradient,) = torch.autograd.grad(landscape(at[0], at[1]), at)
        direction = norm.dualize(matrix(*gradient))[0]
        at = (at - 0.35 * 0.93**step * direction / direction.norm()).detach()
        yield float(at[0]), float(at[1])


# The periodic table --------------------------------------------------------------------------------------------------


def table() -> Figure:
    """``normopt.periodic_table()`` as a figure."""
    rows = read_table()
    widths = (40, 40, 26)
    lines = {
        name: [textwrap.wrap(cell, width, break_long_words=False) for cell, width in zip(cells, widths, strict=True)]
        for name, cells in rows.items()
    }
    heights = {name: max(1, *(len(cell) for cell in cells)) for name, cells in lines.items()}
    total = sum(0.7 + 0.62 * height for height in heights.values()) + 1.2
    figure = Figure(figsize=(11, 0.34 * total), layout="constrained")
    axes = figure.subplots()
    axes.axis("off")
    edges = [0.0, 1.3, 5.6, 9.9, 12.6]
    axes.set(xlim=(0, edges[-1]), ylim=(-total, 0))
    for left, title in zip(edges, ("norm", *MEMORIES), strict=False):
        axes.text(left + 0.1, -0.6, title, fontsize=10, color="#4c566a", va="center")
    top = -1.2
    for name, cells in lines.items():
        height = 0.7 + 0.62 * heights[name]
        colour = COLORS.get(name, NO_NORM)
        cell(axes, (0, edges[1]), (top, height), colour, name, 0.9, "white", "bold")
        for place, words in enumerate(cells):
            empty = not words or words[0] in ("-", "") or words[0].startswith("(")
            alpha = 0.05 if empty else 0.28
            text = "" if words == ["-"] else "\n".join(words)
            ink = "#9aa0ab" if empty else "black"
            cell(axes, (edges[place + 1], edges[place + 2]), (top, height), colour, text, alpha, ink)
        top -= height
    return figure


def cell(
    axes: Axes,
    across: tuple[float, float],
    down: tuple[float, float],
    colour: str,
    text: str,
    alpha: float,
    ink: str,
    weight: str = "normal",
) -> None:
    """One box of the table from ``across`` and the top and height in ``down``."""
    (left, right), (top, height) = across, down
    corner, size = (left + 0.05, top - height + 0.05), (right - left - 0.1, height - 0.1)
    axes.add_patch(
        FancyBboxPatch(corner, *size, boxstyle="round,pad=0,rounding_size=0.08", color=colour, alpha=alpha, linewidth=0)
    )
    axes.text(
        left + 0.16, top - height / 2, text, fontsize=8.5, color=ink, weight=weight, va="center", linespacing=1.25
    )


def read_table() -> dict[str, list[str]]:
    """The printed table: norm -> what stands in each of its cells."""
    _, rule, *lines = periodic_table().splitlines()
    starts = [0, *(i + 2 for i in range(len(rule) - 1) if rule[i : i + 2] == "  ")]
    ends = [*starts[1:], None]
    found: dict[str, list[str]] = {}
    for line in lines:
        name, *cells = (line[start:end].strip() for start, end in zip(starts, ends, strict=True))
        if name:
            found[name] = cells
        else:
            last = next(reversed(found))
            found[last] = [f"{old} {new}".strip() for old, new in zip(found[last], cells, strict=True)]
    return {
        name: [re.sub(r"\w+=|(?<=\w)\(\)", "", cell).replace(",", ", ").replace(",  ", ", ") for cell in cells]
        for name, cells in found.items()
    }


# A step --------------------------------------------------------------------------------------------------------------


def step() -> Figure:
    """The data of one step, from the gradient to the weights, with what each stage asks and keeps."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.axis("off")
    axes.set(xlim=(0, 22), ylim=(0, 7))
    stages = [
        ("momentum", "Which gradient\ndo we trust?", "EMA, Nesterov ...", COLORS["Euclidean"]),
        ("norm", "Which direction\nis steepest?", "Spectral, Smoothed(Max) ...", COLORS["Spectral"]),
        ("step_size", "How far\ndo we go?", "Constant, Dual, Prodigy ...", COLORS["Row"]),
        ("constraint", "Where may the\nweights live?", "WeightDecay, Sphere ...", COLORS["Max"]),
    ]
    flowing = ["gradient", "average", "direction", "update", "weights"]
    for i, (name, question, choices, colour) in enumerate(stages):
        left = 2.4 + 4.6 * i
        axes.add_patch(
            FancyBboxPatch(
                (left, 3), 3.2, 2.6, boxstyle="round,pad=0,rounding_size=0.2", color=colour, alpha=0.28, linewidth=0
            )
        )
        axes.text(
            left + 1.6, 5.15, f"{name}=", fontsize=12, ha="center", va="center", family="monospace", weight="bold"
        )
        axes.text(left + 1.6, 4.0, question, fontsize=10, ha="center", va="center")
        axes.text(left + 1.6, 2.6, choices, fontsize=8.5, ha="center", va="center", color="#4c566a")
    for i, name in enumerate(flowing):
        left = 1.0 + 4.6 * i
        arrow(axes, (left, 4.2), (left + 1.35, 4.2), "black")
        axes.text(left + 0.65, 4.55, name, fontsize=9, ha="center", va="bottom")
    axes.text(
        8.6, 6.4, "role of the tensor: which norm, seen as which matrix", fontsize=10, ha="center", color="#4c566a"
    )
    arrow(axes, (8.6, 6.2), (8.6, 5.65), OTHER)
    axes.add_patch(
        FancyBboxPatch(
            (2.4, 0.5), 7.8, 1.3, boxstyle="round,pad=0,rounding_size=0.2", color=OTHER, alpha=0.12, linewidth=0
        )
    )
    axes.text(6.3, 1.15, "optimizer.state[p]: averages, second moments, bases", fontsize=9.5, ha="center", va="center")
    axes.text(
        15.7,
        1.15,
        "all tensors with one rule and shape go through as one batch",
        fontsize=9.5,
        ha="center",
        va="center",
        color="#4c566a",
    )
    for left in (4.0, 8.6):
        arrow(axes, (left, 1.85), (left, 2.3), OTHER)
    return figure


#: Every picture by the name of its file.
PICTURES: dict[str, Callable[[], Figure]] = {
    "balls.png": balls,
    "spectra.png": spectra,
    "walks.png": walks,
    "periodic-table.png": table,
    "step.png": step,
}


def main(out: Path = OUT) -> None:
    """Write all pictures to a folder."""
    out.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        with matplotlib.rc_context(STYLE):
            save(draw(), out / name)


if __name__ == "__main__":
    main()
