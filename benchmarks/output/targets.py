"""Steps to a target loss, from annealed runs of several lengths; losses in the middle of a schedule do not count."""

import itertools
import math
from dataclasses import dataclass

from benchmarks.output.records import Row


@dataclass(frozen=True)
class Target:
    """A loss with a name."""

    name: str
    loss: float


@dataclass(frozen=True)
class Reach:
    """Steps to a target: interpolated, or "<= " the shortest run, or "> " the longest."""

    steps: float
    bound: str = ""

    def of(self, unit: float) -> str:
        """The steps in another unit, of which a step takes `unit`."""
        return f"{self.bound}{self.steps * unit:,.0f}"


def mean_losses(rows: list[Row]) -> dict[int, float]:
    """The mean final loss by length of the runs; infinite if one of them diverged."""
    losses: dict[int, list[float]] = {}
    for row in rows:
        loss = math.inf if row["final_loss"] is None else float(row["final_loss"])
        losses.setdefault(int(row["config"]["preset"]["steps"]), []).append(loss)
    return {steps: sum(found) / len(found) for steps, found in sorted(losses.items())}


def reach(losses: dict[int, float], target: float) -> Reach:
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


def seconds_a_step(rows: list[Row]) -> float:
    """Seconds of training a step, the mean over all runs."""
    return sum(row["train_seconds"] for row in rows) / sum(row["steps_done"] for row in rows)
