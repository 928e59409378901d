"""How far do we go? The learning rate, and what multiplies it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from normopt.ingredient import Context, Ingredient, check_range
from normopt.norms.base import Direction, axes

Shared = dict[str, Tensor]
Rate = float | Tensor


class StepSize(Ingredient):
    """The length of a step, in units of the direction: ``w <- w - rate * length * d``.

    At each step the loop calls ``rate``, ``weigh`` (before momentum and memory see the gradient) and ``measure`` for
    every batch; then, if ``joint``, before any weight moves, ``conclude`` with the sums over all batches; then
    ``length`` for every batch.
    """

    #: True when a step needs the sums over all batches: then no weight moves before every direction is known.
    joint: ClassVar[bool] = False
    #: As for stages; ``"entry"`` when one length serves all entries, ``"all"`` when it differs from matrix to matrix.
    reduces: ClassVar[str] = "matrix"

    def init_state(self, x: Tensor, weights: Callable[[], Tensor]) -> dict[str, Tensor]:
        """State for each parameter, like a stage's; ``weights`` returns the initial weights."""
        return {}

    def init_shared(self) -> dict[str, float]:
        """State of the whole optimizer; it is kept in the param groups under these names, as 0-dimensional tensors."""
        return {}

    def scale(self, shared: Shared) -> Rate:
        """What gradients are multiplied by before momentum and memory see them."""
        return 1.0

    def weigh(self, g: Tensor, context: Context) -> Tensor:
        """The gradient as momentum and memory should see it: multiplied by ``scale``."""
        return g if isinstance(context.scale, float) and context.scale == 1.0 else g * context.scale

    def measure(
        self, x: Tensor, d: Tensor, state: dict[str, Tensor], context: Context, norm: Direction
    ) -> dict[str, Tensor]:
        """This batch's summands, by name.

        Args:
            x: the averaged gradient.
            d: the direction.
            state: this step size's tensors among the batch's, updated in place.
            context: the gradient, the weights, the rate.
            norm: what made ``d`` of ``x``.
        """
        return {}

    def conclude(self, sums: dict[str, Tensor], shared: Shared) -> Shared:
        """What ``rate`` and ``length`` get, from the sums of ``measure`` over all batches."""
        return shared

    def rate(self, lr: Rate, step: float, shared: Shared) -> Rate:
        """The learning rate of this step, as the constraints see it too; ``shared`` is from before ``conclude``."""
        return lr

    def length(self, x: Tensor, d: Tensor, context: Context, shared: Shared) -> Rate:
        """What else multiplies the direction: a number, or one for each matrix, shape ``(..., 1, 1)``."""
        return 1.0


@dataclass(frozen=True)
class Constant(StepSize):
    """The learning rate times a fixed ``radius``: an update of norm ``lr * radius``, the ball's radius in Scion.

    Args:
        radius: positive; 1 by default.
    """

    reduces: ClassVar[str] = "entry"
    radius: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "radius", self.radius, 0, float("inf"))

    def length(self, x: Tensor, d: Tensor, context: Context, shared: Shared) -> Rate:
        return self.radius


@dataclass(frozen=True)
class Dual(StepSize):
    """The learning rate times the dual norm, summed over all layers: true steepest descent (Anthology, Prop. 7).

    Under the modular norm ``max_l ||W_l||`` the minimizer of ``<g, dW> + ||dW||^2 / (2 lr)`` moves every layer by the
    same ``lr * sum_l dual_norm(g_l)`` along its duality map. The dual norm is taken as ``<x, d>``, which for a norm's
    duality map it is.
    """

    joint: ClassVar[bool] = True
    reduces: ClassVar[str] = "entry"

    def measure(
        self, x: Tensor, d: Tensor, state: dict[str, Tensor], context: Context, norm: Direction
    ) -> dict[str, Tensor]:
        return {"dual_norm": (x * d).sum()}

    def conclude(self, sums: dict[str, Tensor], shared: Shared) -> Shared:
        return sums

    def length(self, x: Tensor, d: Tensor, context: Context, shared: Shared) -> Rate:
        return shared["dual_norm"]


@dataclass(frozen=True)
class Sharp(StepSize):
    """The learning rate times each tensor's own dual norm: every layer's own steepest descent, ``dual_norm(x) d``.

    With the Euclidean norm at scale ``"unit"`` this is the gradient itself (SGD), with the spectral norm PolarGrad
    (arXiv 2505.21799). The dual norm is taken as ``<x, d>`` for each matrix.
    """

    reduces: ClassVar[str] = "all"

    def length(self, x: Tensor, d: Tensor, context: Context, shared: Shared) -> Rate:
        return torch.sum(x * d, dim=axes(x), keepdim=True)


@dataclass(frozen=True)
class Prodigy(StepSize):
    """A learning rate found on the way, for any norm: ``d``, a lower bound of the distance to the solution.

    ``d <- max(d, d_coef sum <g, w_0 - w> / dual_norm(sum g))``, where both sums weight each gradient by ``lr d^2`` and
    forget at the rate ``beta3``, and run over all tensors. The step is ``lr d``; momentum and memory see ``d g`` in
    place of ``g``, so that their past keeps its scale while ``d`` grows. The norm matters only through its dual: with
    the largest-entry norm it is the l1 norm of Mishchenko & Defazio (arXiv 2306.06101), with the spectral norm the
    nuclear norm. Without averages and with ``beta3 = 0`` under sign descent it is the Anthology's escape-velocity rule
    (arXiv 2409.20325, section 3.3).

    Args:
        beta3: weight of the past in both sums, in [0, 1).
        d0: the first estimate.
        d_coef: factor on the estimate.
        growth_rate: the most that ``d`` may grow by in one step; ``None`` is without bound.

    Memory: two more numbers for each parameter. ``d`` is in every param group.
    """

    joint: ClassVar[bool] = True
    reduces: ClassVar[str] = "entry"
    beta3: float = 0.999**0.5
    d0: float = 1e-6
    d_coef: float = 1.0
    growth_rate: float | None = None

    def __post_init__(self) -> None:
        check_range(self, "beta3", self.beta3, 0, 1)
        for name in ("d0", "d_coef"):
            check_range(self, name, getattr(self, name), 1e-300, float("inf"))
        if self.growth_rate is not None:
            check_range(self, "growth_rate", self.growth_rate, 1, float("inf"))

    def init_state(self, x: Tensor, weights: Callable[[], Tensor]) -> dict[str, Tensor]:
        return {"initial": weights().clone(), "gradient_sum": torch.zeros_like(x)}

    def init_shared(self) -> dict[str, float]:
        return {"d": self.d0, "d_max": self.d0, "d_numerator": 0.0}

    def scale(self, shared: Shared) -> Rate:
        return shared["d"]

    def measure(
        self, x: Tensor, d: Tensor, state: dict[str, Tensor], context: Context, norm: Direction
    ) -> dict[str, Tensor]:
        # 1 / d0 keeps both sums away from underflow and cancels in their ratio.
        weighted = context.g * (context.rate / self.d0)
        total = state["gradient_sum"].mul_(self.beta3).add_(weighted)
        progress = (weighted * (state["initial"] - context.w)).sum()
        return {"numerator": progress, "denominator": norm.dual_norm(total).sum()}

    def conclude(self, sums: dict[str, Tensor], shared: Shared) -> Shared:
        numerator = self.beta3 * shared["d_numerator"] + sums["numerator"]
        estimate = torch.where(sums["denominator"] > 0, self.d_coef * numerator / sums["denominator"], shared["d"])
        largest = torch.maximum(shared["d_max"], estimate)
        grown = largest if self.growth_rate is None else torch.minimum(largest, shared["d"] * self.growth_rate)
        return {"d": grown, "d_max": largest, "d_numerator": numerator}

    def rate(self, lr: Rate, step: float, shared: Shared) -> Rate:
        return shared["d"] * lr
