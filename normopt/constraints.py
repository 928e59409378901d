"""Where may the weights live? Decay, and bounds that hold after every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from normopt.ingredient import Context, Ingredient, check_range

Rate = float | Tensor


class Constraint(Ingredient):
    """What happens to the weights beside the update. Override any of four methods; the others cost nothing.

    In order: ``gradient`` (before momentum and memory), ``update``, ``shrink``, then the step
    ``w <- shrink w - length d``, then ``weight``. Tensors have the batch's layout ``(..., out, in)`` and are never
    modified in place.
    """

    #: What one entry of the result depends on, as for stages: ``"entry"``, ``"row"`` ...
    reduces: ClassVar[str] = "matrix"
    #: Whether it holds only if the step's length is the rate times a constant.
    needs_bounded_step: ClassVar[bool] = False

    def gradient(self, g: Tensor, context: Context) -> Tensor:
        """The gradient that the optimizer works with."""
        return g

    def update(self, d: Tensor, context: Context) -> Tensor:
        """The update ``d``, to be multiplied by ``-length``; the context has the weights and the raw gradient."""
        return d

    def shrink(self, rate: Rate) -> Rate:
        """What the weights are multiplied by before the update is added."""
        return 1.0

    def weight(self, w: Tensor, rate: Rate) -> Tensor:
        """The new weights after the update."""
        return w

    def overrides(self, *methods: str) -> bool:
        """Whether this constraint does anything in one of ``methods``."""
        return any(getattr(type(self), method) is not getattr(Constraint, method) for method in methods)


@dataclass(frozen=True)
class WeightDecay(Constraint):
    """Decoupled weight decay: ``w <- (1 - rate * weight_decay) w`` before the update (AdamW, arXiv 1711.05101).

    Args:
        weight_decay: not negative.
        after: decay the new weights instead, the update included (SOAP).
    """

    reduces: ClassVar[str] = "entry"
    weight_decay: float = 0.1
    after: bool = False

    def __post_init__(self) -> None:
        check_range(self, "weight_decay", self.weight_decay, 0, float("inf"))

    def shrink(self, rate: Rate) -> Rate:
        return 1 - rate * self.weight_decay

    def update(self, d: Tensor, context: Context) -> Tensor:
        return d * (1 - context.rate * self.weight_decay)

    def overrides(self, *methods: str) -> bool:
        """``update`` only with ``after``."""
        return super().overrides(*(method for method in methods if method != "update" or self.after))


@dataclass(frozen=True)
class L2(Constraint):
    """L2 regularization: ``g <- g + weight_decay w`` before momentum and memory (torch.optim.SGD and Adam).

    Args:
        weight_decay: not negative.
    """

    reduces: ClassVar[str] = "entry"
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_range(self, "weight_decay", self.weight_decay, 0, float("inf"))

    def gradient(self, g: Tensor, context: Context) -> Tensor:
        return g.add(context.w, alpha=self.weight_decay)

    def overrides(self, *methods: str) -> bool:
        """Nothing at weight decay 0."""
        return self.weight_decay != 0 and super().overrides(*methods)


@dataclass(frozen=True)
class FrankWolfe(Constraint):
    """``w <- (1 - rate) w - rate * length * d``: a convex combination of the weights and a vertex of the ball.

    With a norm's duality map as ``d`` and ``Constant(radius)`` as step size, weights that start in the ball of that
    radius never leave it, for any gradient (constrained Scion, arXiv 2502.07529). It is decoupled weight decay of
    ``1 / radius`` at learning rate ``lr * radius``. An inexact duality map (a Newton-Schulz iteration) enlarges the
    ball by as much as its result exceeds norm 1. The learning rate must not exceed 1, and step sizes that go further
    where the gradient is larger (``Dual``, ``Sharp``, trust ratios) are refused.
    """

    reduces: ClassVar[str] = "entry"
    needs_bounded_step: ClassVar[bool] = True

    def shrink(self, rate: Rate) -> Rate:
        if (not isinstance(rate, Tensor) or rate.device.type == "cpu") and rate > 1:
            raise ValueError(f"FrankWolfe: the learning rate must not exceed 1, got {rate!r}")
        return 1 - rate
