"""Learning-rate-free step sizes: Prodigy and D-Adaptation, for any norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from normopt.ingredient.stage import Context, Direction, Rate, Stage
from normopt.ingredient.traits import trait
from normopt.ingredient.validate import check_count, check_range
from normopt.stepsize.base import Numbers, Shared, StepSize, Weighed, double


@dataclass(frozen=True)
class LearningRateFree(StepSize):
    """The base of :class:`Prodigy` and :class:`DAdaptation`: steps of ``lr d radius`` with one ``d`` for all tensors.

    The learning rate is only a factor for schedules, at most 1. Arguments: see :class:`Prodigy`.
    """

    _abstract = True
    survey_sums = ("numerator", "denominator")
    d0: float = 1e-6
    growth_rate: float = float("inf")
    radius: float = 1.0
    bias_correction: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("d0", "radius"):
            check_range(self, name, getattr(self, name), 1e-300, float("inf"))
        check_range(self, "growth_rate", self.growth_rate, 1, float("inf"), closed=True)
        for beta in self.bias_correction or ():
            check_range(self, "bias_correction", beta, 0, 1)

    def check_composes(self, direction: Direction) -> None:
        """Raise a ``ValueError`` unless the direction has a dual norm."""
        probe = torch.ones(2, 2)
        direction.steepness(probe, direction.init_state(probe))

    def rate(self, lr: Rate, step: float, shared: Numbers) -> Rate:
        return shared["d"] * lr * self._correction(step)

    def _correction(self, step: float) -> float:
        if self.bias_correction is None:
            return 1.0
        beta1, beta2 = self.bias_correction
        return (1 - beta2**step) ** 0.5 / (1 - beta1**step)


@dataclass(frozen=True)
class Prodigy(LearningRateFree):
    """Prodigy for any norm: the learning rate is ``d``, an estimate from below of the distance to the solution.

    ``d <- max(d, d_coef sum <g, w_0 - w> / dual_norm(sum g))``, where both sums weight each gradient by ``lr d^2``,
    decay at the rate ``beta3``, and run over all tensors. The step is ``lr d``; momentum and second moments average
    ``d g`` in place of ``g``, so that the averages need no rescaling when ``d`` grows. The norm matters only through
    its dual: for the largest entry it is the l1 norm of Mishchenko & Defazio (arXiv 2306.06101), for the spectral norm
    the nuclear norm; for several norms it is the sum of their duals, the dual of the largest of the norms (Anthology,
    Prop. 7). Without averages and with ``beta3 = 0``, under sign descent, this is the Anthology's escape-velocity rule
    (arXiv 2409.20325, section 3.3).

    Args:
        d0: the first estimate, positive.
        growth_rate: the largest factor by which ``d`` may grow in one step, at least 1. The first estimate above ``d0``
            is taken whole.
        radius: the length of this tensor's steps relative to the others: the step is ``lr d radius``, the dual norm is
            ``radius`` times as large, and the distance is the largest of all ``norm(w - w_0) / radius``.
        bias_correction: the betas of Adam whose correction ``sqrt(1 - beta2^step) / (1 - beta1^step)`` multiplies the
            step, or ``None``.
        beta3: decay rate of both sums, in [0, 1).
        d_coef: factor of the estimate, positive.
        safeguard_warmup: leave the learning rate and the bias correction out of the dual norm's sum, so that a small
            learning rate at the start does not inflate ``d``.
        slice_p: compute both sums from every ``slice_p``-th entry of each tensor only, to save memory; for directions
            that work entry by entry.

    Memory: two more numbers for each parameter, divided by ``slice_p``. Cost: one dual norm a step; for the spectral
    norm one more polar factor. ``d`` is kept in every param group.

    Raises:
        ValueError: a number is out of range; in a rule, the direction has no dual norm, or ``slice_p`` is more than 1
            and the direction does not work entry by entry.
    """

    beta3: float = 0.999**0.5
    d_coef: float = 1.0
    safeguard_warmup: bool = False
    slice_p: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "beta3", self.beta3, 0, 1)
        check_range(self, "d_coef", self.d_coef, 1e-300, float("inf"))
        check_count(self, "slice_p", self.slice_p)

    def check_composes(self, direction: Direction) -> None:
        """Raise a ``ValueError`` unless the direction has a dual norm, a sum over entries if ``slice_p > 1``."""
        super().check_composes(direction)
        if self.slice_p > 1 and direction.reduces != "entry":
            raise ValueError(f"slice_p: the dual norm of {direction} is no sum over entries, so it needs slice_p=1")

    @trait
    def reduces(self) -> str:
        """``"entry"``, or ``"all"`` where each tensor is sliced."""
        return "entry" if self.slice_p == 1 else "all"

    def init_state(self, x: Tensor, weights: Callable[[], Tensor], direction: Stage) -> dict[str, Tensor]:
        initial = self._sliced(weights()).clone()
        return {"initial": initial, "gradient_sum": torch.zeros_like(initial)}

    def init_shared(self) -> dict[str, float]:
        return {"d": self.d0, "d_max": self.d0, "d_numerator": 0.0}

    def survey(self, state: dict[str, Tensor], context: Context, shared: Numbers) -> dict[str, Tensor]:
        g, w, d = self._sliced(context.g), self._sliced(context.w), shared["d"]
        # d / d0 in place of d keeps both sums from underflow, and cancels in their ratio.
        total = state["gradient_sum"].mul_(self.beta3)
        _add_scaled_(total, g, (d if self.safeguard_warmup else context.rate) * (d / self.d0))
        moved = (state["initial"] - w).flatten()
        progress = torch.dot(g.flatten(), moved.to(g.dtype)).to(double(g.device)) * (context.rate * (d / self.d0))
        return {"numerator": progress, "denominator": context.direction.steepness(total, state).sum() * self.radius}

    def conclude(self, sums: dict[str, Tensor], shared: Shared) -> Shared:
        numerator = self.beta3 * shared["d_numerator"] + sums["numerator"]
        estimate = torch.where(sums["denominator"] > 0, self.d_coef * numerator / sums["denominator"], shared["d"])
        largest = torch.maximum(shared["d_max"], estimate)
        # The first estimate above d0 is taken whole; from there d grows by no more than growth_rate a step.
        before = torch.where(shared["d"] == self.d0, torch.maximum(shared["d"], estimate), shared["d"])
        d = torch.minimum(largest, before * self.growth_rate)
        return {"d": d, "d_max": largest, "d_numerator": numerator, "previous": shared["d"]}

    def weigh(self, g: Tensor, context: Context, shared: Numbers) -> Weighed:
        weighted = g * shared["previous"]
        return Weighed(weighted, weighted, shared["d"])

    def length(self, x: Tensor, d: Tensor, context: Context, shared: Numbers) -> Rate:
        return context.rate * self.radius

    def _sliced(self, x: Tensor) -> Tensor:
        """Every ``slice_p``-th entry of each matrix."""
        return x if self.slice_p == 1 else x.flatten(-2)[..., :: self.slice_p]


def _add_scaled_(total: Tensor, x: Tensor, factor: Rate) -> None:
    """``total += factor x``; a factor that is a tensor is cast to the dtype of ``x``."""
    if isinstance(factor, Tensor):
        total.addcmul_(x, factor.to(x.dtype))
    else:
        total.add_(x, alpha=factor)


@dataclass(frozen=True)
class DAdaptation(LearningRateFree):
    """D-Adaptation for any norm: like :class:`Prodigy`, with gradients weighted by ``d`` in place of ``d^2``.

    With ``s <- sqrt(beta) s + (1 - sqrt(beta)) rate g`` and the direction ``D`` with its state before this step,
    ``d <- max(d, r / ((1 - sqrt(beta)) dual_norm(s)))``, where ``r`` averages ``rate <g, D(s)>`` at the same decay
    rate. Momentum averages ``rate g``, second moments are taken of ``g`` (Defazio & Mishchenko, arXiv 2301.07733,
    algorithm 5, as in the dadaptation package). For a direction of degree 0, one without memory, ``D(s)`` does not
    depend on the length of ``s`` and so not on the distance covered: ``w_0 - w`` takes the place of
    ``D(s) / (1 - sqrt(beta))``.

    Args:
        d0: the first estimate, positive.
        growth_rate: the largest factor by which ``d`` may grow in one step, at least 1.
        radius: the length of this tensor's steps relative to the others; see :class:`Prodigy`.
        bias_correction: see :class:`Prodigy`.
        beta: the square of the decay rate of ``s`` and ``r``, in [0, 1).

    Memory: one more number for each parameter, two for directions without memory. Cost: one dual norm a step, and one
    more application of a direction with memory.

    Raises:
        ValueError: a number is out of range; in a rule, the direction has no dual norm or is neither of degree 1 nor 0.
    """

    reduces = "entry"
    beta: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "beta", self.beta, 0, 1)

    def check_composes(self, direction: Direction) -> None:
        """Raise a ``ValueError`` unless the direction has a dual norm, and degree 1 or 0."""
        super().check_composes(direction)
        if direction.degree is None:
            raise ValueError(f"DAdaptation: {direction} is neither linear nor independent of length; use Prodigy")

    def init_state(self, x: Tensor, weights: Callable[[], Tensor], direction: Stage) -> dict[str, Tensor]:
        initial = {} if direction.degree else {"initial": weights().clone()}
        return {"gradient_sum": torch.zeros_like(x), **initial}

    def init_shared(self) -> dict[str, float]:
        return {"d": self.d0, "d_numerator": 0.0}

    def survey(self, state: dict[str, Tensor], context: Context, shared: Numbers) -> dict[str, Tensor]:
        total, keep, direction = state["gradient_sum"], self.beta**0.5, context.direction
        weighted = context.g * context.rate
        if direction.degree:
            progress = (weighted * direction.apply(total, state, context)).sum() * self.radius
        else:
            progress = (weighted * (state["initial"] - context.w)).sum() * (1 - keep)
        total.mul_(keep).add_(weighted, alpha=1 - keep)
        return {"numerator": progress, "denominator": direction.steepness(total, state).sum() * self.radius}

    def conclude(self, sums: dict[str, Tensor], shared: Shared) -> Shared:
        keep = self.beta**0.5
        numerator = keep * shared["d_numerator"] + (1 - keep) * sums["numerator"]
        estimate = numerator / ((1 - keep) * sums["denominator"])
        grown = torch.minimum(estimate, shared["d"] * self.growth_rate)
        d = torch.where(sums["denominator"] > 0, torch.maximum(shared["d"], grown), shared["d"])
        return {"d": d, "d_numerator": numerator}

    def weigh(self, g: Tensor, context: Context, shared: Numbers) -> Weighed:
        return Weighed(g * context.rate, g)

    def length(self, x: Tensor, d: Tensor, context: Context, shared: Numbers) -> Rate:
        if not context.direction.degree:
            return context.rate * self.radius
        # The average already contains the rate; only at rate 0 the step must be 0.
        rate = context.rate
        return (torch.sign(rate) if isinstance(rate, Tensor) else float(rate > 0)) * self.radius
