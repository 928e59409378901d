"""Step sizes proportional to the size of the weights: LARS, LAMB, Adafactor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from normopt.ingredient.stage import Context, Rate
from normopt.ingredient.validate import check_range
from normopt.numerics.lengths import axes, euclidean
from normopt.stepsize.base import Numbers, Shared, StepSize, Weighed, _sum_of_squares


@dataclass(frozen=True)
class GradientTrust(StepSize):
    """LARS' local rate: each gradient is multiplied by ``coefficient ||w|| / (||g|| + weight_decay ||w||)``.

    Momentum averages the products, so that the length of a step is the rate times the size of the weights. The factor
    is 1 where weights or gradient are 0; ``g`` is the gradient without L2 (You et al., arXiv 1708.03888). Vectors and
    scalars are left alone, and L2 does not reach them, as in the references.

    Args:
        coefficient: the trust coefficient, not negative.
        weight_decay: the weight decay of the rule's :class:`~normopt.constraints.L2`, not negative.
    """

    reduces = "all"
    coefficient: float = 1e-3
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_range(self, "coefficient", self.coefficient, 0, float("inf"))
        check_range(self, "weight_decay", self.weight_decay, 0, float("inf"))

    def weigh(self, g: Tensor, context: Context, shared: Numbers) -> Weighed:
        if context.is_vector:
            return Weighed(context.raw, context.raw)
        size, slope = (euclidean(x, axes(x), keepdim=True) for x in (context.w, context.raw))
        trusted = g * _ratio(size, slope + self.weight_decay * size, self.coefficient)
        return Weighed(trusted, trusted)


@dataclass(frozen=True)
class TrustRatio(StepSize):
    """LAMB's trust ratio ``||w|| / ||d||`` for each matrix: a step as long as the rate times the size of the weights.

    The ratio is 1 where either norm is 0 (You et al., arXiv 1904.00962).

    Args:
        weight_decay: without weight decay the ratio is 1 unless ``always_adapt``, as in timm.
        always_adapt: use the ratio without weight decay too.
        clip: the largest ratio, positive.
        max_grad_norm: all gradients together are first clipped to this Euclidean norm, positive.
    """

    times = "trust ratio"
    reduces = "all"
    survey_sums = ("square",)
    weight_decay: float = 0.0
    always_adapt: bool = True
    clip: float = float("inf")
    max_grad_norm: float = float("inf")

    def __post_init__(self) -> None:
        check_range(self, "weight_decay", self.weight_decay, 0, float("inf"))
        for name in ("clip", "max_grad_norm"):
            check_range(self, name, getattr(self, name), 1e-300, float("inf"), closed=True)

    def overrides(self, method: str) -> bool:
        """Whether this step size does anything in ``method``: in ``survey`` only with a ``max_grad_norm``."""
        return super().overrides(method) and (method != "survey" or self.max_grad_norm != float("inf"))

    def survey(self, state: dict[str, Tensor], context: Context, shared: Numbers) -> dict[str, Tensor]:
        return {"square": _sum_of_squares(context.raw)}

    def conclude(self, sums: dict[str, Tensor], shared: Shared) -> Shared:
        return {"shrink": (self.max_grad_norm / sums["square"].sqrt()).clamp(max=1.0)}

    def weigh(self, g: Tensor, context: Context, shared: Numbers) -> Weighed:
        g = g if self.max_grad_norm == float("inf") else g * shared["shrink"]
        return Weighed(g, g)

    def length(self, x: Tensor, d: Tensor, context: Context, shared: Numbers) -> Rate:
        if not self.weight_decay and not self.always_adapt:
            return context.rate
        size, length = (euclidean(y, axes(y), keepdim=True) for y in (context.w, d))
        return _ratio(size, length).clamp_(max=self.clip) * context.rate


@dataclass(frozen=True)
class Relative(StepSize):
    """Adafactor's relative step size: ``min(lr, 1 / sqrt(step))`` times the root mean square of each weight matrix.

    A root mean square below ``eps`` counts as ``eps`` (Shazeer & Stern, arXiv 1804.04235, section 8). Constraints see
    ``lr`` itself.

    Args:
        eps: the smallest root mean square, not negative.
    """

    times = "size of the weights"
    reduces = "all"
    eps: float = 1e-3

    def __post_init__(self) -> None:
        check_range(self, "eps", self.eps, 0, float("inf"))

    def length(self, x: Tensor, d: Tensor, context: Context, shared: Numbers) -> Rate:
        entries = math.prod(context.w.shape[-2:])
        size = euclidean(context.w, axes(context.w), keepdim=True) / math.sqrt(max(entries, 1))
        limit, rate = context.step**-0.5, context.rate
        if isinstance(limit, Tensor):
            limit, rate = rate, limit
        return size.clamp_(min=self.eps) * (rate.clamp(max=limit) if isinstance(rate, Tensor) else min(rate, limit))


def _ratio(a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
    """``factor a / b``, and 1 where ``a`` or ``b`` is 0."""
    return torch.where((a > 0) & (b > 0), a / b * factor, 1.0)
