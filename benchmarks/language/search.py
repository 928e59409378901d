"""The search for one learning rate: which to try next, and which of the full-length trials to take."""

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

START = (-1, 0, 1)  # exponents of two around the tuned rate
#: Seeds that differ by more than this many times what they usually do, and by more than this loss, say "unstable".
UNSTABLE_RATIO, UNSTABLE_GAP = 4.0, 0.02


@dataclass(frozen=True)
class Trial:
    """One setting at full length: its rate, what else was set, and the losses of its seeds (infinite: diverged)."""

    lr: float
    options: dict[str, Any]
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean loss over the seeds."""
        return statistics.fmean(self.losses)

    @property
    def gap(self) -> float:
        """The largest difference between seeds."""
        return max(self.losses) - min(self.losses) if math.isfinite(self.mean) else math.inf

    def is_unstable(self, usual_gap: float) -> bool:
        """Whether the seeds disagree far more than seeds usually do."""
        return self.gap > max(UNSTABLE_RATIO * usual_gap, UNSTABLE_GAP)


@dataclass
class Search:
    """The search of one cell: the losses of its short runs by exponent of two, and its full-length trials."""

    cell: str
    centre: float
    screened: dict[int, float] = field(default_factory=dict)
    finals: list[Trial] = field(default_factory=list)

    def rate(self, exponent: int) -> float:
        """The learning rate of an exponent."""
        return self.centre * 2.0**exponent

    @property
    def ranked(self) -> list[int]:
        """The exponents tried, best first; of rates that all diverge the smallest."""
        return sorted(self.screened, key=lambda exponent: (self.screened[exponent], exponent))

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the smallest or the largest one tried."""
        return self.ranked[0] in (min(self.screened), max(self.screened))

    def wanted(self) -> tuple[int, ...]:
        """What to try next: the exponents to start with, then the nearest to the best, on the better side first."""
        if not self.screened:
            return START
        best = self.ranked[0]
        untried = (e for e in range(min(self.screened) - 1, max(self.screened) + 2) if e not in self.screened)

        def preference(exponent: int) -> tuple[int, float]:
            neighbour = exponent + (1 if exponent < best else -1)
            return abs(exponent - best), self.screened.get(neighbour, math.inf)

        return (min(untried, key=preference),)

    def chosen(self, usual_gap: float) -> Trial:
        """The full-length trial with the lowest mean, of those whose seeds agree as seeds usually do, if there are."""
        stable = [trial for trial in self.finals if not trial.is_unstable(usual_gap)]
        return min(stable or self.finals, key=lambda trial: trial.mean)
