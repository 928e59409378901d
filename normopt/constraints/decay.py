"""Weight decay: decoupled decay, L2 regularization and Frank-Wolfe."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from normopt.constraints.base import Constraint
from normopt.ingredient.stage import Context, Rate
from normopt.ingredient.traits import trait
from normopt.ingredient.validate import check_range


@dataclass(frozen=True)
class WeightDecay(Constraint):
    """Decoupled weight decay: ``w <- (1 - rate * weight_decay) w`` before the update (AdamW, arXiv 1711.05101).

    Args:
        weight_decay: the rate of decay, not negative.
        after: decay the weights after the update in place of the weights before it (SOAP).
        cautious: decay only entries that the update does not move away from 0, where update ``d`` and weight do not
            differ in sign (arXiv 2510.12402, algorithm 1).

    Raises:
        ValueError: ``after`` with ``cautious``, or a number out of range.
    """

    reduces = "entry"
    weight_decay: float = 0.1
    after: bool = False
    cautious: bool = False

    def __post_init__(self) -> None:
        check_range(self, "weight_decay", self.weight_decay, 0, float("inf"))
        if self.after is True and self.cautious is True:
            raise ValueError("WeightDecay: a cautious decay is one of the weights before the update; leave after False")

    @trait
    def sees_weights(self) -> bool:
        """Whether the decay is cautious."""
        return bool(self.cautious) and self.weight_decay != 0

    def shrink(self, rate: Rate) -> Rate:
        none = not isinstance(self.weight_decay, Tensor) and self.weight_decay == 0
        return 1.0 if none or self.cautious else 1 - rate * self.weight_decay

    def update(self, d: Tensor, context: Context) -> tuple[Tensor, Rate]:
        if not self.cautious:
            return d * (1 - context.rate * self.weight_decay), 1.0
        agree = (d.sign() * context.w.sign() >= 0).to(context.w.dtype)
        return d, 1 - context.rate * self.weight_decay * agree

    def overrides(self, *methods: str) -> bool:
        """Whether it does anything in ``methods``: in ``update`` only with ``after`` or a cautious decay above 0."""
        updates = self.after or (self.cautious and self.weight_decay != 0)
        return super().overrides(*(method for method in methods if method != "update" or updates))


@dataclass(frozen=True)
class L2(Constraint):
    """L2 regularization: ``g <- g + weight_decay w`` before momentum and second moments (torch.optim.SGD and Adam).

    Args:
        weight_decay: the coefficient, not negative.
    """

    reduces = "entry"
    weight_decay: float

    def __post_init__(self) -> None:
        check_range(self, "weight_decay", self.weight_decay, 0, float("inf"))

    @trait
    def sees_weights(self) -> bool:
        """Whether there is anything to add."""
        return self.weight_decay != 0

    def gradient(self, g: Tensor, context: Context) -> Tensor:
        return g.add(context.w, alpha=self.weight_decay)

    def overrides(self, *methods: str) -> bool:
        """Whether it does anything in ``methods``: nothing at weight decay 0."""
        return self.weight_decay != 0 and super().overrides(*methods)


@dataclass(frozen=True)
class FrankWolfe(Constraint):
    """Frank-Wolfe: ``w <- (1 - rate) w - rate * radius * d``, a convex combination of ``w`` and a vertex of the ball.

    With a norm's duality map as ``d`` and ``Constant(radius)`` as step size, weights that start in the ball of that
    radius never leave it, for any gradient (constrained Scion, arXiv 2502.07529). It is decoupled weight decay of
    ``1 / radius`` at learning rate ``lr * radius``. An inexact duality map (a Newton-Schulz iteration) enlarges the
    ball by the factor by which the norm of its result exceeds 1.

    Raises:
        ValueError: the learning rate exceeds 1; or the step size is one whose length is not the rate times a constant
            (``Dual``, ``Sharp``, trust ratios).
    """

    reduces = "entry"
    sees_weights = False
    needs_bounded_step = True

    def shrink(self, rate: Rate) -> Rate:
        if (not isinstance(rate, Tensor) or rate.device.type == "cpu") and rate > 1:
            raise ValueError(f"FrankWolfe: the learning rate must not exceed 1, got {rate!r}")
        return 1 - rate
