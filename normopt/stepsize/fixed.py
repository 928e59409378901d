"""Step sizes from the learning rate, the number of the step and dual norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normopt.ingredient.stage import Context, Rate
from normopt.ingredient.validate import check_range
from normopt.numerics.lengths import axes
from normopt.stepsize.base import Numbers, Shared, StepSize, _sum_of_squares


@dataclass(frozen=True)
class Constant(StepSize):
    """The learning rate times a fixed ``radius``: updates of norm ``lr * radius`` (Scion's radius of the ball).

    Args:
        radius: the factor, not negative; 1 by default.
    """

    sees_weights = False
    reduces = "entry"
    radius: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "radius", self.radius, 0, float("inf"))

    @property
    def reach(self) -> float | None:
        return self.radius

    def length(self, x: Tensor, d: Tensor, context: Context, shared: Numbers) -> Rate:
        return context.rate * self.radius


@dataclass(frozen=True)
class InverseTime(StepSize):
    """Inverse-time decay of the learning rate, ``lr / (1 + (step - 1) lr_decay)`` (torch.optim.Adagrad's ``lr_decay``).

    Args:
        lr_decay: the rate of decay, not negative.
    """

    sees_weights = False
    reduces = "entry"
    lr_decay: float = 0.0

    def __post_init__(self) -> None:
        check_range(self, "lr_decay", self.lr_decay, 0, float("inf"))

    def rate(self, lr: Rate, step: float, shared: Numbers) -> Rate:
        return lr / (1 + (step - 1) * self.lr_decay)


@dataclass(frozen=True)
class Dual(StepSize):
    """The learning rate times the dual norm, summed over all layers: true steepest descent (Anthology, Prop. 7).

    Under the modular norm ``max_l ||W_l||`` the minimizer of ``<g, dW> + ||dW||^2 / (2 lr)`` moves every layer by the
    same ``lr * sum_l dual_norm(g_l)`` along its duality map. The dual norm is computed as ``<x, d>``, which it equals
    for a norm's duality map ``d``.
    """

    sees_weights = False
    times = "dual norm"
    reduces = "entry"
    measure_sums = ("dual_norm",)

    def measure(self, x: Tensor, d: Tensor, context: Context) -> dict[str, Tensor]:
        return {"dual_norm": (x * d).sum()}

    def conclude(self, sums: dict[str, Tensor], shared: Shared) -> Shared:
        return sums

    def length(self, x: Tensor, d: Tensor, context: Context, shared: Numbers) -> Rate:
        return context.rate * shared["dual_norm"]


@dataclass(frozen=True)
class Sharp(StepSize):
    """The learning rate times each tensor's own dual norm: each layer's own steepest descent, ``dual_norm(x) d``.

    Named after the sharp operator of Carlson et al. (2015), which maps ``x`` to ``dual_norm(x) d``. With the Euclidean
    norm at scale ``"unit"`` it is the gradient itself (SGD), with the spectral norm PolarGrad (arXiv 2505.21799). The
    dual norm is computed as ``<x, d>`` for each matrix.
    """

    sees_weights = False
    times = "dual norm"
    reduces = "all"

    def length(self, x: Tensor, d: Tensor, context: Context, shared: Numbers) -> Rate:
        return torch.sum(x * d, dim=axes(x), keepdim=True) * context.rate


@dataclass(frozen=True)
class Storm(StepSize):
    """STORM+'s rate, the same for all tensors: ``lr (sum of |d_i|^2 / a_(i+1) / b0)^(-1/3)`` (arXiv 2111.01040).

    ``d_i`` are the averaged gradients, ``a_(i+1) = (1 + sum up to i of |g_i|^2 / a0)^(-2/3)``, and both sums run over
    all tensors and steps; they are kept in every param group. :class:`~normopt.momentum.Recursive` with ``beta=None``
    has decay rate ``1 - a_i`` at step i.

    Args:
        a0: divisor of the sum of squared gradients, positive; 1 in the paper.
        b0: divisor of the sum of squared averages, positive; 1 in the paper.
    """

    sees_weights = False
    times = "STORM+ rate"
    provides = frozenset({"a"})
    reduces = "entry"
    survey_sums = ("gradients",)
    measure_sums = ("averages",)
    a0: float = 1.0
    b0: float = 1.0

    def __post_init__(self) -> None:
        for name in ("a0", "b0"):
            check_range(self, name, getattr(self, name), 1e-300, float("inf"))

    def init_shared(self) -> dict[str, float]:
        return {"gradient_squares": 0.0, "average_squares": 0.0}

    def survey(self, state: dict[str, Tensor], context: Context, shared: Numbers) -> dict[str, Tensor]:
        return {"gradients": _sum_of_squares(context.g)}

    def measure(self, x: Tensor, d: Tensor, context: Context) -> dict[str, Tensor]:
        return {"averages": _sum_of_squares(x)}

    def conclude(self, sums: dict[str, Tensor], shared: Shared) -> Shared:
        if "gradients" in sums:
            past = shared["gradient_squares"]
            return {**shared, "a": self._a(past), "gradient_squares": past + sums["gradients"]}
        total = shared["average_squares"] + sums["averages"] / self._a(shared["gradient_squares"])
        factor = torch.where(total > 0, (total / self.b0) ** (-1 / 3), 0.0)
        return {**shared, "average_squares": total, "factor": factor}

    def _a(self, squares: Tensor) -> Tensor:
        return (1 + squares / self.a0) ** (-2 / 3)

    def length(self, x: Tensor, d: Tensor, context: Context, shared: Numbers) -> Rate:
        return context.rate * shared["factor"]
