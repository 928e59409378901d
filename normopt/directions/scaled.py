"""AdaGO's length of a step: the gradient's over the root of the sum of its squares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normopt.ingredient.stage import Context, Direction
from normopt.ingredient.validate import check_positive, check_range
from normopt.numerics.lengths import euclidean


@dataclass(frozen=True)
class AdaScaled(Direction):
    """AdaGrad's length for each matrix, a stage of a ``Chain``: ``x max(min(||g||, cap) / v, floor / lr)``.

    ``v^2 <- v^2 + min(||g||, cap)^2``, with the Frobenius norm of the raw gradient and ``v = first`` before the first
    step. After the polar factor it is AdaGO's step size, which is never below ``floor`` (arXiv 2509.02981).

    Args:
        cap: the largest length of a gradient, positive.
        floor: the smallest length of a step, not negative.
        first: ``v`` before the first step, positive.
    """

    reduces = "all"
    sees_weights = False
    degree = None
    squares = True
    cap: float = 10.0
    floor: float = 0.0
    first: float = 1e-3

    def __post_init__(self) -> None:
        check_positive(self, "cap", self.cap)
        check_range(self, "floor", self.floor, 0, float("inf"))
        check_positive(self, "first", self.first)

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        return {"square_sum": x.new_full((*x.shape[:-2], 1, 1), self.first**2)}

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        state["square_sum"].add_(self._length(context).square())
        return self.apply(x, state, context)

    def apply(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        rate = context.rate  # at 0 nothing moves, whatever the length
        least = self.floor / (rate.clamp(min=1e-20) if isinstance(rate, Tensor) else max(rate, 1e-20))
        factor = self._length(context) / state["square_sum"].sqrt()
        if isinstance(least, Tensor):
            return x * torch.maximum(factor, least.to(factor.dtype))
        return x * factor.clamp_(min=least)

    def _length(self, context: Context) -> Tensor:
        return euclidean(context.raw, (-2, -1), keepdim=True).clamp(max=self.cap)
