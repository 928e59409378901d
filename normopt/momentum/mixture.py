"""Mixtures of averages with different decay rates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from normopt.ingredient.stage import Context
from normopt.ingredient.validate import check_range
from normopt.momentum.averages import ahead, check_nesterov
from normopt.momentum.base import Momentum

#: Bisection steps that find a tilt to the last bit of float64.
BISECTIONS = 80


@dataclass(frozen=True)
class Mixture(Momentum):
    """A convex combination of averages: ``m = sum_i w_i m_i``, ``m_i <- beta_i m_i + (1 - beta_i) g``.

    Returns ``m``, or with ``nesterov`` what :class:`~normopt.momentum.EMA` makes of it. Up to step ``onset`` all
    averages are the one average of rate ``beta``, so that the step of the onset is the same to the bit as without.
    With two averages it is bi-Maxwell, with more K-Maxwell momentum (KellerJordan/modded-nanogpt, pull requests 340 and
    357). The mean age of a gradient in an average of rate ``beta`` is ``beta / (1 - beta)`` steps.

    Args:
        betas: decay rates of the averages, each in [0, 1).
        weights: their weights, not negative, with a sum of 1; ``None``: those of ``ages``.
        onset: the number of steps with ``beta`` alone; 0: none.
        ages: mean ages of the mixture in steps, at the onset and at step ``last``; in between, the weights are
            interpolated. Of all weights with that mean age they are the ones with the largest entropy.
        last: the step from which the second age holds, after ``onset``.
        beta: decay rate up to the onset, and the weight of ``m`` under ``nesterov=True``; in [0, 1).
        nesterov: use Nesterov momentum; a ``float`` in [0, 1] is the weight of ``m`` beside the gradient.

    Memory: one number for each parameter and average.

    Raises:
        ValueError: a number is out of range, weights and ages are given or neither, or an age that no weights have.
    """

    sees_weights = False
    betas: tuple[float, ...] = (0.85, 0.98)
    weights: tuple[float, ...] | None = (0.4385, 0.5615)
    onset: int = 0
    ages: tuple[float, float] | None = None
    last: int | None = None
    beta: float = 0.95
    nesterov: bool | float = True

    def __post_init__(self) -> None:
        check_range(self, "beta", self.beta, 0, 1)
        check_nesterov(self, self.nesterov)
        if not isinstance(self.betas, tuple) or not self.betas:
            raise ValueError(f"Mixture: betas must be a tuple of decay rates, got {self.betas!r}")
        for beta in self.betas:
            check_range(self, "betas", beta, 0, 1)
        if isinstance(self.onset, bool) or not isinstance(self.onset, int) or self.onset < 0:
            raise ValueError(f"Mixture: onset must be a whole number from 0 up, got {self.onset!r}")
        if (self.weights is None) == (self.ages is None):
            raise ValueError("Mixture: give either weights or ages, and None for the other")
        if self.weights is not None:
            self._check_weights(self.weights)
        elif self.ages is not None:
            self._check_ages(self.ages)

    def _check_weights(self, weights: tuple[float, ...]) -> None:
        for weight in weights:
            check_range(self, "weights", weight, 0, 1, closed=True)
        if len(weights) != len(self.betas) or not math.isclose(math.fsum(weights), 1, abs_tol=1e-6):
            raise ValueError(f"Mixture: weights must be one for each of {self.betas}, with a sum of 1, got {weights!r}")

    def _check_ages(self, ages: tuple[float, float]) -> None:
        if len(ages) != 2 or not isinstance(self.last, int) or self.last <= self.onset:
            raise ValueError(f"Mixture: ages are two, with a last step after onset, got {ages!r} and {self.last!r}")
        youngest, oldest = (age_of(each(self.betas)) for each in (min, max))
        for age in ages:
            if not youngest <= age <= oldest:
                raise ValueError(f"Mixture: ages must lie in [{youngest:g}, {oldest:g}] for {self.betas}, got {age!r}")

    @property
    def decides_on_host(self) -> bool:
        return self.onset > 0 or self.ages is not None

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        return {f"momentum{i or ''}": torch.zeros_like(x) for i in range(len(self.betas))}

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        averages = [state[f"momentum{i or ''}"] for i in range(len(self.betas))]
        if self.onset and context.step <= self.onset:
            m = averages[0].lerp_(x, 1 - self.beta)
            for other in averages[1:] if context.step == self.onset else []:
                other.copy_(m)
            return ahead(x, m, self.beta, self.nesterov)
        for average, beta in zip(averages, self.betas, strict=True):
            average.lerp_(x, 1 - beta)
        return ahead(x, _mixed(averages, self.weights_at(context.step)), self.beta, self.nesterov)

    def weights_at(self, step: float) -> tuple[float, ...]:
        """The weights of the averages at this step."""
        if self.weights is not None:
            return self.weights
        assert self.ages is not None and self.last is not None
        done = min(max((step - self.onset) / (self.last - self.onset), 0.0), 1.0)
        first, second = (weights_of_age(self.betas, age) for age in self.ages)
        return tuple((1 - done) * a + done * b for a, b in zip(first, second, strict=True))


def _mixed(averages: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    """The sum of ``weights`` times ``averages``: by interpolations, of which equal tensors come out as they are."""
    m, total = averages[0], weights[0]
    for average, weight in zip(averages[1:], weights[1:], strict=True):
        total += weight
        m = m.lerp(average, weight / total) if total else average
    return m


def age_of(beta: float) -> float:
    """The mean age of a gradient in an average of this decay rate, in steps."""
    return beta / (1 - beta)


@lru_cache(maxsize=64)
def weights_of_age(betas: tuple[float, ...], age: float) -> tuple[float, ...]:
    """The weights of largest entropy with which the averages have this mean age: ``w_i ~ exp(tilt age_i)``."""
    ages = [age_of(beta) for beta in betas]
    spread = max(ages) - min(ages)
    if spread == 0:
        return (1 / len(ages),) * len(ages)

    def tilted(tilt: float) -> tuple[float, ...]:
        powers = [tilt * (each - min(ages)) / spread for each in ages]
        raw = [math.exp(power - max(powers)) for power in powers]
        return tuple(each / math.fsum(raw) for each in raw)

    low, high = -1e4, 1e4
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        mean = math.fsum(w * each for w, each in zip(tilted(middle), ages, strict=True))
        low, high = (middle, high) if mean < age else (low, middle)
    return tilted((low + high) / 2)
