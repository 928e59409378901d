"""How far a learning rate transfers over width and depth: best rates by size, their drift, activations by width."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from benchmarks.output.records import Row
from benchmarks.output.rows import cell_of, group
from benchmarks.output.tables import Table

#: The width and the number of layers of a model.
Size = tuple[int, int]
Samples = NDArray[np.float64]
#: How often the losses are drawn anew for an interval, and the interval's ends.
DRAWS, ENDS = 4000, (2.5, 97.5)
AXES = ("width", "depth")


@dataclass(frozen=True)
class Best:
    """The best learning rate at one size, as log2.

    The vertex of the parabola in log2(rate) through the mean losses of the best rate and of its two neighbours.
    `bound`: ">= " or "<= " where the best rate is the largest or the smallest that was tried, and "~" where a
    neighbour diverged: the best rate of the grid is given then.
    """

    log2: float
    bound: str = ""

    @property
    def rate(self) -> float:
        """The learning rate."""
        return 2.0**self.log2


class Curve:
    """The final losses of one optimizer at one size by learning rate and seed; infinite where a run diverged."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.runs: dict[float, dict[int, float]] = {}
        for row in sorted(rows, key=lambda row: float(row["config"]["lr"])):
            loss = math.inf if row["final_loss"] is None else float(row["final_loss"])
            self.runs.setdefault(float(row["config"]["lr"]), {})[int(row["config"]["seed"])] = loss

    @cached_property
    def means(self) -> dict[float, float]:
        """The mean loss over the seeds by learning rate, the smallest rate first."""
        return {rate: float(np.mean(list(by_seed.values()))) for rate, by_seed in self.runs.items()}

    @property
    def seeds(self) -> int:
        """The number of seeds that every rate has."""
        return min(map(len, self.runs.values()))

    @property
    def best(self) -> Best:
        """The best learning rate."""
        return best_rate(list(self.means), list(self.means.values()))

    @property
    def window(self) -> list[float]:
        """The rates around the best one, itself among them."""
        rates, losses = list(self.means), list(self.means.values())
        place = int(np.argmin(losses))
        return rates[max(0, place - 1) : place + 2]

    def residuals(self) -> tuple[float, int]:
        """The sum of squares, and its degrees of freedom, of what neither rate nor seed explains around the best rate.

        A seed that makes all losses larger by the same does not move the best rate, and is no error here.
        """
        rates = [rate for rate in self.window if math.isfinite(self.means[rate])]
        seeds = set.intersection(*(set(self.runs[rate]) for rate in rates)) if rates else set()
        if len(rates) < 2 or len(seeds) < 2:
            return 0.0, 0
        losses = np.array([[self.runs[rate][seed] for seed in sorted(seeds)] for rate in rates])
        rest = losses - losses.mean(0) - losses.mean(1, keepdims=True) + losses.mean()
        return float((rest**2).sum()), (len(rates) - 1) * (len(seeds) - 1)


def best_rate(rates: list[float], losses: list[float]) -> Best:
    """The best of learning rates in ascending order, see `Best`."""
    place = int(np.argmin(losses))
    if place in (0, len(rates) - 1):
        return Best(math.log2(rates[place]), "<= " if place == 0 else ">= ")
    around = np.array(losses[place - 1 : place + 2])
    if not np.isfinite(around).all():
        return Best(math.log2(rates[place]), "~")
    return Best(float(vertices(np.log2(rates), np.array([losses]))[0]))


def vertices(x: Samples, losses: Samples) -> Samples:
    """The vertex of the parabola through the best and its two neighbours for each row of `losses` (draws, rates).

    The best place itself where it is at an edge, beside a loss that is not finite, or on a straight line.
    """
    best = np.argmin(losses, axis=1)
    if len(x) < 3:
        return np.asarray(x[best])
    middle, draws = best.clip(1, len(x) - 2), np.arange(len(losses))
    before, after = (losses[draws, middle + side] - losses[draws, middle] for side in (-1, 1))
    left, right = x[middle] - x[middle - 1], x[middle + 1] - x[middle]
    with np.errstate(invalid="ignore", divide="ignore"):
        slope = (after * left / right - before * right / left) / (left + right)
        curvature = (after / right + before / left) / (left + right)
        found = x[middle] - slope / (2 * curvature)
    return np.where((middle == best) & np.isfinite(found) & (curvature > 0), found, x[best])


@dataclass(frozen=True)
class Drift:
    """How one optimizer's best learning rate moves over sizes of a model, along `axis`, "width" or "depth".

    `samples` holds log2 of the best rates at redrawn losses, a row for each draw and a column for each size; it is
    None with one seed. The losses are redrawn with the error of a mean over seeds, which is estimated from all sizes
    together (`Curve.residuals`), by Student's t.
    """

    cell: str
    axis: str
    curves: dict[int, Curve]
    samples: Samples | None = None

    @property
    def sizes(self) -> list[int]:
        """The widths or depths, the smallest first."""
        return list(self.curves)

    @property
    def ends(self) -> tuple[Best, Best]:
        """The best rates at the smallest and at the largest size."""
        return self.curves[self.sizes[0]].best, self.curves[self.sizes[-1]].best

    @property
    def octaves(self) -> float:
        """log2 of the best rate at the largest size over that at the smallest."""
        return self.ends[1].log2 - self.ends[0].log2

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of `octaves`; None with one seed, or where an end is not between rates that were tried."""
        if self.samples is None or any(best.bound for best in self.ends):
            return None
        return _ends(self.samples[:, -1] - self.samples[:, 0])

    def rate_interval(self, size: int) -> tuple[float, float] | None:
        """The 95% interval of the best rate at one size; None with one seed or without neighbours on both sides."""
        if self.samples is None or self.curves[size].best.bound:
            return None
        low, high = _ends(self.samples[:, self.sizes.index(size)])
        return 2.0**low, 2.0**high


def _ends(samples: Samples) -> tuple[float, float]:
    low, high = np.percentile(samples, ENDS)
    return float(low), float(high)


def size_of(row: Row) -> Size:
    """The width and the number of layers of a row's model."""
    preset = row["config"]["preset"]
    return int(preset["d_model"]), int(preset["n_layers"])


def is_coordinates(row: Row) -> bool:
    """Whether a row is of the coordinate check and not of a learning rate's loss."""
    return bool(row.get("norms"))


def differ_in_rate_alone(rows: Sequence[Row]) -> bool:
    """Whether runs have the same options and the same schedule, but for the learning rate."""
    presets = [row["config"]["preset"] for row in rows]
    settings = [
        (row["config"]["options"], p.get("warmup"), p.get("decay")) for row, p in zip(rows, presets, strict=True)
    ]
    return all(setting == settings[0] for setting in settings)


def axis_rows(rows: list[Row], axis: str) -> dict[str, dict[int, list[Row]]]:
    """The rows by optimizer and by the width, or the depth, of the model; the other one is the commonest.

    Optimizers with one size along the axis are left out.
    """
    varied, fixed = (0, 1) if axis == "width" else (1, 0)
    found = {}
    for cell, members in group([row for row in rows if not is_coordinates(row)], cell_of).items():
        along = group(members, lambda row: size_of(row)[fixed])
        chosen = max(along.values(), key=lambda some: (len({size_of(row) for row in some}), len(some)))
        by_size = group(chosen, lambda row: size_of(row)[varied])
        if len(by_size) > 1:
            found[cell] = dict(sorted(by_size.items()))
    return found


def drifts(rows: list[Row], axis: str) -> list[Drift]:
    """The drift of every optimizer that has rows of several sizes along the axis."""
    found = axis_rows(rows, axis)
    plain = [Drift(cell, axis, {size: Curve(some) for size, some in sizes.items()}) for cell, sizes in found.items()]
    return [replace(drift, samples=_sampled(drift.curves)) for drift in plain]


def _sampled(curves: dict[int, Curve]) -> Samples | None:
    squares, freedom = np.sum([curve.residuals() for curve in curves.values()], axis=0)
    if not freedom:
        return None
    deviation, random = math.sqrt(squares / freedom), np.random.default_rng(0)
    columns = []
    for curve in curves.values():
        rates = list(curve.means)
        errors = random.standard_t(freedom, (DRAWS, len(rates))) * deviation / math.sqrt(curve.seeds)
        drawn = np.array(list(curve.means.values())) + errors
        columns.append(vertices(np.log2(rates), drawn))
    return np.array(columns).T


def drift_line(drift: Drift, sizes: list[int]) -> dict[str, str]:
    """One line of the table for people: the best rate at every size, and the drift in octaves with its interval."""
    cells = {}
    for size in sizes:
        curve = drift.curves.get(size)
        cells[f"lr at {drift.axis} {size}"] = "" if curve is None else f"{curve.best.bound}{curve.best.rate:.3g}"
    interval = drift.interval
    bounded = any(best.bound for best in drift.ends)
    return {
        "optimizer": drift.cell,
        **cells,
        "drift, octaves": f"{'~' if bounded else ''}{drift.octaves:+.2f}",
        "95% interval": "" if interval is None else f"{interval[0]:+.2f} .. {interval[1]:+.2f}",
        "seeds": str(min(curve.seeds for curve in drift.curves.values())),
    }


def transfer_table(found: list[Drift]) -> Table:
    """The drifts along one axis as a table for people, see `drift_line`; the smallest drift first."""
    sizes = sorted({size for drift in found for size in drift.sizes})
    return [drift_line(drift, sizes) for drift in sorted(found, key=lambda drift: abs(drift.octaves))]


def numbers(found: list[Drift]) -> Table:
    """The same as numbers, a line for each optimizer and size: the best rate, its interval and loss, and the drift."""
    lines = []
    for drift in found:
        interval = drift.interval or ("", "")
        for size, curve in drift.curves.items():
            low, high = drift.rate_interval(size) or ("", "")
            values = {
                "optimizer": drift.cell,
                "axis": drift.axis,
                "size": size,
                "seeds": curve.seeds,
                "rates": len(curve.means),
                "bound": curve.best.bound.strip(),
                "lr": curve.best.rate,
                "lr_low": low,
                "lr_high": high,
                "loss": min(curve.means.values()),
                "drift": drift.octaves,
                "drift_low": interval[0],
                "drift_high": interval[1],
            }
            lines.append(
                {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in values.items()}
            )
    return lines


@dataclass(frozen=True)
class Coordinates:
    """Root mean squares of activations of one optimizer's models by width: at the start, and after a few steps.

    `start` and `end` hold a value for each kind of activation and width, the mean over layers.
    """

    cell: str
    rate: float
    steps: int
    start: dict[str, dict[int, float]]
    end: dict[str, dict[int, float]]

    def growth(self, kind: str) -> float:
        """The exponent of the width in the root mean square after the steps, by least squares; 0 is no dependence."""
        return _exponent(self.end[kind])

    def growth_at_start(self, kind: str) -> float:
        """The same before the first step."""
        return _exponent(self.start[kind])


def _exponent(by_width: dict[int, float]) -> float:
    values = np.array(list(by_width.values()))
    if not (np.isfinite(values).all() and (values > 0).all()):
        return math.nan
    return float(np.polyfit(np.log2(list(by_width)), np.log2(values), 1)[0])


def coordinates(rows: list[Row]) -> list[Coordinates]:
    """The coordinate checks among rows; optimizers of one width, or whose runs diverged, are left out."""
    checks = [row for row in rows if is_coordinates(row) and "rms" in row["norms"][-1][1]]
    found = []
    for (cell, rate), members in group(checks, lambda row: (cell_of(row), float(row["config"]["lr"]))).items():
        by_width = {size_of(row)[0]: row for row in sorted(members, key=size_of) if row["status"] == "finished"}
        if len(by_width) > 1:
            kinds = list(next(iter(by_width.values()))["norms"][0][1]["rms"])
            start, end = ({k: {w: _rms(r, at, k) for w, r in by_width.items()} for k in kinds} for at in (0, -1))
            found.append(Coordinates(cell, rate, int(members[0]["norms"][-1][0]), start, end))
    return found


def _rms(row: Row, at: int, kind: str) -> float:
    return float(np.mean(row["norms"][at][1]["rms"][kind]))


def coordinate_table(found: list[Coordinates]) -> Table:
    """The exponents of the width in every kind of activation, at the start (in brackets) and after the steps."""
    return [
        {
            "optimizer": check.cell,
            "lr": f"{check.rate:.3g}",
            "steps": str(check.steps),
            **{kind: f"{check.growth(kind):+.2f} ({check.growth_at_start(kind):+.2f})" for kind in check.end},
        }
        for check in found
    ]
