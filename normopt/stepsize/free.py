"""Step sizes that find the learning rate."""

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
    """What :class:`Prodigy` and :class:`DAdaptation` share: the step is ``lr d radius`` with one ``d`` for all tensors.

    The learning rate is then a factor for schedules, 1 at its largest.
    """

    _abstract = True
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
        """Raise a ``ValueError`` unless the dual norm can be measured."""
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
    """A learning rate found on the way, for any norm: ``d``, a lower bound of the distance to the solution.

    ``d <- max(d, d_coef sum <g, w_0 - w> / dual_norm(sum g))``, where both sums weight each gradient by ``lr d^2`` and
    forget at the rate ``beta3``, and run over all tensors. The step is ``lr d``; momentum and memory see ``d g`` in
    place of ``g``, so that their past keeps its scale while ``d`` grows. The norm matters only through its dual: with
    the largest-entry norm it is the l1 norm of Mishchenko & Defazio (arXiv 2306.06101), with the spectral norm the
    nuclear norm; with several norms it is the sum, the dual of their largest (Anthology, Prop. 7). Without averages and
    with ``beta3 = 0`` under sign descent it is the Anthology's escape-velocity rule (arXiv 2409.20325, section 3.3).

    Args:
        d0: the first estimate.
        growth_rate: the most that ``d`` may grow by in one step.
        radius: how far this tensor goes beside the others: the step is ``lr d radius``, the dual norm is ``radius``
            times as large, and distances are measured by the largest of all ``norm(w - w_0) / radius``.
        bias_correction: the betas of Adam whose correction ``sqrt(1 - beta2^step) / (1 - beta1^step)`` multiplies the
            step, or ``None``.
        beta3: weight of the past in both sums, in [0, 1).
        d_coef: factor on the estimate.
        safeguard_warmup: leave the learning rate and the bias correction out of the dual norm's sum, so that a small
            learning rate at the start does not inflate ``d``.
        slice_p: take both sums over every ``slice_p``-th entry of each tensor only, to save memory; for directions that
            work entry by entry.

    Memory: two more numbers for each parameter, over ``slice_p``. Cost: one dual norm a step; for the spectral norm one
    more polar factor. ``d`` is in every param group.
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
        """Raise a ``ValueError`` unless the dual norm can be measured, on slices if need be."""
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
        # d / d0 in place of d keeps both sums away from underflow and cancels in their ratio.
        total = state["gradient_sum"].mul_(self.beta3)
        _add_scaled_(total, g, (d if self.safeguard_warmup else context.rate) * (d / self.d0))
        moved = (state["initial"] - w).flatten()
        progress = torch.dot(g.flatten(), moved.to(g.dtype)).to(double(g.device)) * (context.rate * (d / self.d0))
        return {"numerator": progress, "denominator": context.direction.steepness(total, state).sum() * self.radius}

    def conclude(self, sums: dict[str, Tensor], shared: Shared) -> Shared:
        numerator = self.beta3 * shared["d_numerator"] + sums["numerator"]
        estimate = torch.where(sums["denominator"] > 0, self.d_coef * numerator / sums["denominator"], shared["d"])
        largest = torch.maximum(shared["d_max"], estimate)
        d = torch.minimum(largest, shared["d"] * self.growth_rate)
        return {"d": d, "d_max": largest, "d_numerator": numerator, "previous": shared["d"]}

    def weigh(self, g: Tensor, context: Context, shared: Numbers) -> Weighed:
        weighted = g * shared["previous"]
        return Weighed(weighted, weighted, shared["d"])

    def length(self, x: Tensor, d: Tensor, context: Context, shared: Numbers) -> Rate:
        return context.rate * self.radius

    def _sliced(self, x: Tensor) -> Tensor:
        return x if self.slice_p == 1 else x.flatten(-2)[..., :: self.slice_p]


def _add_scaled_(total: Tensor, x: Tensor, factor: Rate) -> None:
    """``total += factor x``; factors in tensors take the dtype of ``x``."""
    if isinstance(factor, Tensor):
        total.addcmul_(x, factor.to(x.dtype))
    else:
        total.add_(x, alpha=factor)


@dataclass(frozen=True)
class DAdaptation(LearningRateFree):
    """D-Adaptation, for any norm: like :class:`Prodigy`, with gradients weighted by ``d`` and not by its square.

    With ``s <- sqrt(beta) s + (1 - sqrt(beta)) rate g`` and the direction ``D`` with its memory as it stands,
    ``d <- max(d, r / ((1 - sqrt(beta)) dual_norm(s)))``, where ``r`` averages ``rate <g, D(s)>`` alike. Momentum sees
    ``rate g``, memory the gradient itself (Defazio & Mishchenko, arXiv 2301.07733, algorithm 5, as in the dadaptation
    package). A direction that ignores the length of ``s``, one without memory, says nothing of the way that has been
    gone: there ``w_0 - w`` stands for ``D(s) / (1 - sqrt(beta))``.

    Args:
        d0: the first estimate.
        growth_rate: the most that ``d`` may grow by in one step.
        radius: how far this tensor goes beside the others; see :class:`Prodigy`.
        bias_correction: see :class:`Prodigy`.
        beta: the square of the weight of the past in ``s`` and ``r``, in [0, 1).

    Memory: one more number for each parameter, two for directions without memory. Cost: one dual norm a step, and one
    more application of the direction where it has memory.
    """

    reduces = "entry"
    beta: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "beta", self.beta, 0, 1)

    def check_composes(self, direction: Direction) -> None:
        """Raise a ``ValueError`` unless the dual norm can be measured, and averages of ``rate g`` have a meaning."""
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
        # The average has the rate in it; at rate 0 nothing moves all the same.
        rate = context.rate
        return (torch.sign(rate) if isinstance(rate, Tensor) else float(rate > 0)) * self.radius
