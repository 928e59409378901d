"""The search for a learning rate: the next rate to try, and the choice among the full-length trials."""

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

START = (-1, 0, 1)  # exponents of two around the tuned rate
#: A trial is unstable if its seeds differ by more than this multiple of the usual gap, and by more than this loss.
UNSTABLE_RATIO, UNSTABLE_GAP = 4.0, 0.02


@dataclass(frozen=True)
class Trial:
    """A setting at full length: the learning rate, other options, and the losses of all seeds (infinite: diverged)."""

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
        """Whether the seeds differ far more than the usual gap."""
        return self.gap > max(UNSTABLE_RATIO * usual_gap, UNSTABLE_GAP)


@dataclass
class Search:
    """The search of one cell: losses of short runs by exponent of two, and full-length trials."""

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
        """Whether the best rate is the smallest or the largest rate tried."""
        return self.ranked[0] in (min(self.screened), max(self.screened))

    def wanted(self) -> tuple[int, ...]:
        """The exponents to try next: `START`, then the untried one nearest to the best, on the better side first."""
        if not self.screened:
            return START
        best = self.ranked[0]
        untried = (e for e in range(min(self.screened) - 1, max(self.screened) + 2) if e not in self.screened)

        def preference(exponent: int) -> tuple[int, float]:
            neighbour = exponent + (1 if exponent < best else -1)
            return abs(exponent - best), self.screened.get(neighbour, math.inf)

        return (min(untried, key=preference),)

    def chosen(self, usual_gap: float) -> Trial:
        """The full-length trial with the lowest mean loss; unstable trials count only if all are unstable."""
        stable = [trial for trial in self.finals if not trial.is_unstable(usual_gap)]
        return min(stable or self.finals, key=lambda trial: trial.mean)
