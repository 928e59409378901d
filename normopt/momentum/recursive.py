"""STORM's recursive momentum, which compares two gradients of one sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normopt.ingredient.stage import Context
from normopt.ingredient.validate import check_range
from normopt.momentum.base import Momentum


@dataclass(frozen=True)
class Recursive(Momentum):
    """STORM's recursive momentum: ``d <- g + beta (d - g')``, and ``d = g`` at the first step (arXiv 1905.10018).

    ``g'`` is the gradient of the same sample at the weights before the last step, so that without noise ``d`` is the
    gradient itself, and the variance of ``d`` falls over the steps. ``step`` needs a closure, which is called twice a
    step.

    Args:
        beta: decay rate, in [0, 1]; ``None``: ``1 - a`` with the ``a`` of :class:`~normopt.stepsize.Storm`.

    Memory: two numbers for each parameter, ``d`` and the previous weight.

    Raises:
        ValueError: ``beta=None`` without that step size, or a step size that rescales gradients.
    """

    looks_back = True
    decides_on_host = True
    beta: float | None = 0.9

    def __post_init__(self) -> None:
        if self.beta is not None:
            check_range(self, "beta", self.beta, 0, 1, closed=True)

    @property
    def averages(self) -> frozenset[str]:
        return frozenset()  # the momentum sums differences of gradients, whose rounding errors do not fade

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"a"} if self.beta is None else ())

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(x), "previous": torch.zeros_like(x)}

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        d = state["momentum"]
        if context.step == 1:
            d.copy_(x)
        else:
            d.sub_(context.previous).mul_(1 - context.shared["a"] if self.beta is None else self.beta).add_(x)
        state["previous"].copy_(context.w)
        return d
