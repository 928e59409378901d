"""Means with their intervals, paired differences, and what the best of several trials is expected to be."""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from benchmarks.output.tables import Cell

#: The share of intervals that hold the true value.
CONFIDENCE = 0.95
#: A bootstrap needs so many values: of fewer even the whole range of their means is no 95% interval.
FEWEST = 5


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


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """The mean difference between two optimizers' losses by seed, over the seeds that both have; None without any."""
    gaps = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    return estimate(gaps) if gaps and all(map(math.isfinite, gaps)) else None


def p_value(gap: Estimate | None) -> float:
    """The two-sided p of Student's t test that a difference is 0; 1 where there are not two seeds."""
    if gap is None or gap.sd is None:
        return 1.0
    if gap.sd == 0:
        return 0.0 if gap.mean else 1.0
    return float(2 * stats.t.sf(abs(gap.mean) * math.sqrt(gap.n) / gap.sd, gap.n - 1))


def holm(p: Sequence[float]) -> list[float]:
    """p-values of several tests, corrected by Holm's method: the chance of a single false finding is kept."""
    corrected, highest = [0.0] * len(p), 0.0
    for place, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = corrected[i] = max(highest, min(1.0, (len(p) - place) * p[i]))
    return corrected


def ranks(losses: Mapping[str, Mapping[int, float]]) -> dict[str, tuple[int, int]]:
    """The first and the last place that each optimizer may have, from its losses by seed.

    Of two optimizers one is better if the difference paired by seed is not 0 by a t test, corrected by Holm's method
    over all pairs; else their places are not told apart. Who has an infinite loss is behind all who have none.
    """
    pairs = list(itertools.combinations(losses, 2))
    gaps = [paired(losses[one], losses[other]) for one, other in pairs]
    better: dict[str, set[str]] = {name: set() for name in losses}  # than the name
    for (one, other), gap, p in zip(pairs, gaps, holm([p_value(gap) for gap in gaps]), strict=True):
        whole = [all(map(math.isfinite, losses[name].values())) for name in (one, other)]
        if whole[0] != whole[1]:
            better[other if whole[0] else one].add(one if whole[0] else other)
        elif gap is not None and p < 1 - CONFIDENCE:
            better[other if gap.mean < 0 else one].add(one if gap.mean < 0 else other)
    worse = {name: sum(name in them for them in better.values()) for name in losses}
    return {name: (1 + len(better[name]), len(losses) - worse[name]) for name in losses}


def bootstrap(values: Sequence[Sequence[float]], statistic: Callable[..., float]) -> tuple[float, float] | None:
    """The interval of a statistic of several samples, paired by place, from resampled places; None for less than five.

    `statistic` takes the samples as arrays. Percentiles of 2000 resamples, always the same ones; as few places vary too
    little when they are resampled, the percentiles are those at which the interval of a mean is about Student's (the
    expanded percentile interval of Hesterberg 2015, The American Statistician 69, 371).
    """
    n = len(values[0])
    if n < FEWEST:
        return None
    student = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    level = 1 - 2 * float(stats.norm.sf(math.sqrt(n / (n - 1)) * student))
    settings: Any = {"paired": True, "vectorized": False, "method": "percentile", "n_resamples": 2000, "rng": 0}
    found = stats.bootstrap(values, statistic, confidence_level=level, **settings).confidence_interval
    return float(found.low), float(found.high)


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
