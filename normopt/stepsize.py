"""How far do we go? The learning rate, and what multiplies it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from normopt.ingredient import Ingredient, check_range
from normopt.norms.base import axes

Shared = dict[str, Tensor]


class StepSize(Ingredient):
    """The length of a step, in units of the direction: ``w <- w - rate * length * d``.

    The loop calls, at each step and in this order: ``weigh`` (before momentum and memory see the gradient), ``measure``
    for every batch, then, when all batches are measured and before any weight moves, ``conclude`` with the sums over all
    batches; then ``rate`` and ``length`` for every batch.
    """

    #: True when a step needs the sums over all batches: then no weight moves before every direction is known.
    joint: ClassVar[bool] = False
    #: True when ``weigh`` or ``measure`` or ``length`` reads the weights.
    reads_weight: ClassVar[bool] = False
    #: ``"entry"``, or ``"all"`` when the length differs from matrix to matrix.
    reduces: ClassVar[str] = "entry"

    def init_state(self, x: Tensor, w: Tensor | None) -> dict[str, Tensor]:
        """State for each parameter, like a stage's; ``w`` holds the initial weights if ``reads_weight``."""
        return {}

    def init_shared(self) -> dict[str, float]:
        """State of the whole optimizer; it is kept in the param groups under these names, as 0-dimensional tensors."""
        return {}

    def weigh(self, g: Tensor, w: Tensor | None, shared: Shared) -> Tensor:
        """The gradient as momentum and memory should see it."""
        return g

    def measure(
        self, x: Tensor, g: Tensor, d: Tensor, w: Tensor | None, state: dict[str, Tensor], rate: float
    ) -> dict[str, Tensor]:
        """This batch's summands, by name: ``x`` the averaged and ``g`` the raw gradient, ``d`` the direction."""
        return {}

    def conclude(self, sums: dict[str, Tensor], shared: Shared) -> Shared:
        """What ``rate`` and ``length`` get, from the sums of ``measure`` over all batches."""
        return shared

    def rate(self, lr: float, shared: Shared) -> float | Tensor:
        """The learning rate, as the constraints see it too."""
        return lr

    def length(self, x: Tensor, d: Tensor, w: Tensor | None, shared: Shared) -> float | Tensor:
        """What else multiplies the direction: a number, or one for each matrix, shape ``(..., 1, 1)``."""
        return 1.0


@dataclass(frozen=True)
class Constant(StepSize):
    """The learning rate times a fixed ``radius``: an update of norm ``lr * radius``, the ball's radius in Scion.

    Args:
        radius: positive; 1 by default.
    """

    radius: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "radius", self.radius, 0, float("inf"))

    def length(self, x: Tensor, d: Tensor, w: Tensor | None, shared: Shared) -> float | Tensor:
        return self.radius


@dataclass(frozen=True)
class Dual(StepSize):
    """The learning rate times the dual norm, summed over all layers: true steepest descent (Anthology, Prop. 7).

    Under the modular norm ``max_l ||W_l||`` the minimizer of ``<g, dW> + ||dW||^2 / (2 lr)`` moves every layer by the same
    ``lr * sum_l dual_norm(g_l)`` along its duality map. The dual norm is taken as ``<x, d>``, which for a norm's duality
    map it is.
    """

    joint: ClassVar[bool] = True

    def measure(
        self, x: Tensor, g: Tensor, d: Tensor, w: Tensor | None, state: dict[str, Tensor], rate: float
    ) -> dict[str, Tensor]:
        return {"dual_norm": (x * d).sum()}

    def conclude(self, sums: dict[str, Tensor], shared: Shared) -> Shared:
        return sums

    def length(self, x: Tensor, d: Tensor, w: Tensor | None, shared: Shared) -> float | Tensor:
        return shared["dual_norm"]


@dataclass(frozen=True)
class Sharp(StepSize):
    """The learning rate times each tensor's own dual norm: every layer's own steepest descent, ``dual_norm(x) d``.

    With the Euclidean norm at scale ``"unit"`` this is the gradient itself (SGD), with the spectral norm PolarGrad
    (arXiv 2505.21799). The dual norm is taken as ``<x, d>`` for each matrix.
    """

    reduces: ClassVar[str] = "all"

    def length(self, x: Tensor, d: Tensor, w: Tensor | None, shared: Shared) -> float | Tensor:
        return torch.sum(x * d, dim=axes(x), keepdim=True)
