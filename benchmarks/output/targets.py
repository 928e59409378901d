"""Steps to a target loss, from annealed runs of several lengths; losses in the middle of a schedule do not count."""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.output.records import Row
from benchmarks.output.statistics import bootstrap
from benchmarks.output.tables import Cell


@dataclass(frozen=True)
class Target:
    """A loss with a name; if it is the mean loss of an optimizer, with that optimizer's losses by seed."""

    name: str
    loss: float
    by_seed: Mapping[int, float] | None = None


@dataclass(frozen=True)
class Reach:
    """Steps to a target: interpolated, or "<= " the shortest run, or "> " the longest."""

    steps: float
    bound: str = ""

    @property
    def place(self) -> float:
        """The steps as a number to sort by, beyond the lengths of the runs where there is only a bound."""
        return self.steps * {"": 1.0, "<= ": 0.5, "> ": 2.0}[self.bound]


def mean_losses(rows: list[Row]) -> dict[int, float]:
    """The mean final loss by length of the runs; infinite if one of them diverged."""
    return {steps: statistics.fmean(found.values()) for steps, found in losses_by_seed(rows).items()}


def losses_by_seed(rows: list[Row]) -> dict[int, dict[int, float]]:
    """The final losses by length of the runs and by seed; infinite where a run diverged."""
    losses: dict[int, dict[int, float]] = {}
    for row in rows:
        loss = math.inf if row["final_loss"] is None else float(row["final_loss"])
        losses.setdefault(int(row["config"]["preset"]["steps"]), {})[int(row["config"]["seed"])] = loss
    return dict(sorted(losses.items()))


def reach(losses: Mapping[int, float], target: float) -> Reach:
    """Steps after which an annealed run gets to `target`, with log(steps) linear in the loss between two lengths."""
    lengths = sorted(losses)
    if losses[lengths[0]] <= target:
        return Reach(lengths[0], "<= ")
    for shorter, longer in itertools.pairwise(lengths):
        above, below = losses[shorter], losses[longer]
        if above > target >= below:
            if math.isinf(above):
                return Reach(longer, "<= ")
            return Reach(shorter * (longer / shorter) ** ((above - target) / (above - below)))
    return Reach(lengths[-1], "> ")


def seconds_a_step(rows: Iterable[Row]) -> float:
    """Seconds of training a step, the mean over all runs."""
    pairs = [(row["train_seconds"], row["steps_done"]) for row in rows]
    return float(sum(seconds for seconds, _ in pairs) / sum(steps for _, steps in pairs))


class Runs:
    """One optimizer's runs of several lengths, and how soon they get to targets.

    Intervals are of a bootstrap over the seeds that have runs of every length. Where the target is the mean loss of an
    optimizer, it is that of the seeds drawn.
    """

    def __init__(self, rows: list[Row]) -> None:
        self.losses = losses_by_seed(rows)
        self.means = mean_losses(rows)
        seeds = {int(row["config"]["seed"]) for row in rows}
        self.seconds = {s: seconds_a_step(row for row in rows if row["config"]["seed"] == s) for s in seeds}
        self.seconds_a_step = seconds_a_step(rows)

    def steps(self, target: Target) -> tuple[Reach, tuple[float, float] | None]:
        """Steps to a target, and their interval; ends beyond the runs lie below the shortest or above the longest."""
        return reach(self.means, target.loss), self._interval(target, lambda steps, seconds: steps)

    def seeds(self, target: Target) -> list[int]:
        """The seeds behind the interval: those that have runs of every length, and that the target has, too."""
        return sorted(set.intersection(*map(set, self.losses.values()), set(target.by_seed or self.seconds)))

    def clipped(self, steps: float) -> float:
        """Steps within the lengths of the runs."""
        return min(max(steps, min(self.losses)), max(self.losses))

    def cells(self, target: Target, tokens: int) -> tuple[Cell, Cell, Cell]:
        """Steps, tokens and seconds to a target; a step takes `tokens` tokens."""
        found, ends = self.steps(target)
        shortest, longest = min(self.losses), max(self.losses)

        def cell(unit: float, interval: tuple[float, float] | None) -> Cell:
            text = f"{found.bound}{found.steps * unit:,.0f}"
            if interval is None or ends is None:
                return Cell(text, value=found.steps * unit, bound=found.bound.strip())
            bounds = ["<= " if end < shortest else "> " if end > longest else "" for end in ends]
            shown = [f"{bound}{end:,.0f}" for bound, end in zip(bounds, interval, strict=True)]
            text += f" [{shown[0]}, {shown[1]}]" if shown[0] != shown[1] else ""
            low, high = interval
            return Cell(text, value=found.steps * unit, bound=found.bound.strip(), low=low, high=high)

        of_steps = None if ends is None else (self.clipped(ends[0]), self.clipped(ends[1]))
        of_tokens = None if of_steps is None else (of_steps[0] * tokens, of_steps[1] * tokens)
        of_seconds = self._interval(target, lambda steps, seconds: self.clipped(steps) * seconds)
        return cell(1, of_steps), cell(tokens, of_tokens), cell(self.seconds_a_step, of_seconds)

    def _interval(self, target: Target, value: Any) -> tuple[float, float] | None:
        """The interval of `value(steps to the target, seconds a step)`."""
        of_target, seeds = target.by_seed, self.seeds(target)
        goal = [target.loss if of_target is None else of_target[seed] for seed in seeds]
        losses = [[by_seed[seed] for seed in seeds] for by_seed in self.losses.values()]

        def statistic(goal: Any, seconds: Any, *losses: Any) -> float:
            means = {length: float(np.mean(of_length)) for length, of_length in zip(self.losses, losses, strict=True)}
            return float(value(reach(means, float(np.mean(goal))).place, float(np.mean(seconds))))

        return bootstrap([goal, [self.seconds[seed] for seed in seeds], *losses], statistic)
