"""Means with their intervals, paired differences, and what the best of several trials is expected to be."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from benchmarks.output.tables import Cell

#: The share of intervals that hold the true value.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """The mean of `n` values with its interval of Student's t, which a single value does not have."""

    mean: float
    sd: float | None
    n: int
    low: float | None
    high: float | None

    @property
    def half(self) -> float | None:
        """Half the width of the interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def cell(self, digits: int = 4, sign: str = "") -> Cell:
        """The mean and half the width of the interval as text, with the numbers behind it."""
        half = "" if self.half is None else f" ± {self.half:.{digits}f}"
        text = f"{self.mean:{sign}.{digits}f}{half}" if math.isfinite(self.mean) else "diverged"
        return Cell(text, mean=self.mean, sd=self.sd, n=self.n, low=self.low, high=self.high)


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of values with its interval; infinite values have an infinite mean, and no interval."""
    mean = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(mean):
        return Estimate(mean, None, len(values), None, None)
    sd = statistics.stdev(values)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * sd / math.sqrt(len(values))
    return Estimate(mean, sd, len(values), mean - half, mean + half)


def expected_best(losses: Sequence[float], count: int) -> float:
    """The mean, over all choices of `count` of the losses, of the lowest one chosen.

    Of `n` losses in ascending order, number `i` = 1, 2 ... is the lowest of C(n - i, count - 1) of the C(n, count)
    choices. Infinite losses, of trials that diverged, make the mean infinite if they can be all that is chosen.
    """
    n = len(losses)
    if not 1 <= count <= n:
        raise ValueError(f"count must lie in [1, {n}], the number of losses, got {count}")
    weights = [math.comb(n - i, count - 1) for i in range(1, n + 1)]
    return sum(w * loss for w, loss in zip(weights, sorted(losses), strict=True) if w) / math.comb(n, count)
