"""95% intervals over seeds: of a mean, of a paired difference, and of the steps to a target; the best of k trials."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from benchmarks.output.records import Row
from benchmarks.output.rows import group, steps_of
from benchmarks.output.targets import Reach, mean_losses, reach

DRAWS, ENDS = 2000, (2.5, 97.5)


@dataclass(frozen=True)
class Interval:
    """A middle with its 95% interval and the number `n` of seeds behind it; `low` and `high` are NaN with one seed."""

    middle: float
    low: float
    high: float
    n: int

    @property
    def resolved(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def of_mean(values: Sequence[float]) -> Interval:
    """The mean, by Student's t; NaN of no values, infinite if one is."""
    n, middle = len(values), float(np.mean(values)) if values else math.nan
    if n < 2 or not math.isfinite(middle):
        return Interval(middle, math.nan, math.nan, n)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return Interval(middle, middle - half, middle + half, n)


def final_losses(rows: Sequence[Row]) -> dict[int, float]:
    """The final loss by seed, infinite where a run diverged."""
    return {
        int(row["config"]["seed"]): math.inf if row["final_loss"] is None else float(row["final_loss"]) for row in rows
    }


def of_difference(ours: Sequence[Row], theirs: Sequence[Row]) -> Interval:
    """The mean difference of final losses, paired by seed."""
    mine, other = final_losses(ours), final_losses(theirs)
    pairs = [(mine[seed], other[seed]) for seed in sorted(mine.keys() & other.keys())]
    return of_mean([a - b for a, b in pairs if math.isfinite(a) and math.isfinite(b)])


def of_steps(rows: Sequence[Row], baseline: Sequence[Row]) -> tuple[Reach, Interval]:
    """Steps to the baseline's mean final loss of its longest runs, and their interval by bootstrap over the seeds.

    The same seeds are drawn for both. Where a draw says no more than a bound, the bound counts.
    """
    full = max(map(steps_of, baseline))
    longest = [row for row in baseline if steps_of(row) == full]
    found = reach(mean_losses(list(rows)), float(np.mean(list(final_losses(longest).values()))))
    seeds = {int(row["config"]["seed"]) for row in longest}
    for members in group(list(rows), steps_of).values():
        seeds &= {int(row["config"]["seed"]) for row in members}
    n = len(seeds)
    if n < 2 or found.bound:
        return found, Interval(found.steps, math.nan, math.nan, n)
    ours = {steps: final_losses(members) for steps, members in group(list(rows), steps_of).items()}
    theirs, random, steps_drawn = final_losses(longest), np.random.default_rng(0), []
    for drawn in random.choice(sorted(seeds), (DRAWS, n)):
        target = float(np.mean([theirs[seed] for seed in drawn]))
        losses = {steps: float(np.mean([by[seed] for seed in drawn])) for steps, by in ours.items()}
        steps_drawn.append(reach(losses, target).steps)
    low, high = np.percentile(steps_drawn, ENDS)
    return found, Interval(found.steps, float(low), float(high), n)


def expected_best(losses: Sequence[float]) -> list[float]:
    """The expected lowest loss of 1, 2, ... n of the n trials, drawn without replacement; a diverged trial is infinite.

    ``sum_i x_(i) C(n - i, k - 1) / C(n, k)`` over the losses ``x_(1) <= ... <= x_(n)``.
    """
    ordered, n = sorted(losses), len(losses)
    return [
        sum(x * math.comb(n - i, k - 1) / math.comb(n, k) for i, x in enumerate(ordered, 1) if n - i >= k - 1)
        for k in range(1, n + 1)
    ]
