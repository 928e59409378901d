"""MARS' momentum, which corrects each gradient by its change since the last step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from normopt.ingredient.stage import Context
from normopt.ingredient.validate import check_positive, check_range
from normopt.momentum.base import Momentum
from normopt.numerics.lengths import axes, clip_norm


@dataclass(frozen=True)
class Corrected(Momentum):
    """MARS' momentum: ``m <- beta m + (1 - beta) c``, ``c = g + gamma beta / (1 - beta) (g - g')``.

    ``g'`` is the gradient of the last step, 0 at the first, and ``c`` of each matrix is clipped to a Frobenius norm of
    ``clip``. It approximates :class:`~normopt.momentum.Recursive`, which compares two gradients of one sample, without
    a closure. Before the polar factor it is MARS-M (arXiv 2510.21800; MARS: arXiv 2411.10438).

    Args:
        beta: decay rate of the average, in [0, 1).
        gamma: how much of the correction is made, not negative.
        clip: the largest Frobenius norm of ``c``, positive; ``inf``: no clipping.

    Memory: two numbers for each parameter, ``m`` and ``g'``.
    """

    sees_weights = False
    degree = None
    reduces = "all"
    beta: float = 0.95
    gamma: float = 0.025
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "beta", self.beta, 0, 1)
        check_range(self, "gamma", self.gamma, 0, math.inf)
        if self.clip != math.inf:
            check_positive(self, "clip", self.clip)

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(x), "previous_gradient": torch.zeros_like(x)}

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        previous = state["previous_gradient"]
        c = x.add(x - previous, alpha=self.gamma * self.beta / (1 - self.beta))
        previous.copy_(x)
        c = c if self.clip == math.inf else clip_norm(c, axes(c), self.clip)
        return state["momentum"].lerp_(c, 1 - self.beta)
