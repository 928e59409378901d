"""Where may the weights live? What pulls them back; ``normopt.bounds`` has what holds after every step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from normopt.ingredient import Context, Ingredient, check_range
from normopt.norms import Direction
from normopt.stepsize import StepSize
from normopt.view import View

Rate = float | Tensor


class Constraint(Ingredient):
    """What happens to the weights beside the update. Override any of these methods; the others cost nothing.

    In order: ``whole`` (whenever weights are looked at), ``gradient`` (before momentum and memory), ``update``,
    ``shrink``, then the step ``w <- shrink w - length d``, then ``weight``. Tensors have the batch's layout
    ``(..., out, in)`` and are never modified in place; a constraint's own state is, as a stage's.
    """

    #: What one entry of the result depends on, as for stages: ``"entry"``, ``"row"`` ...
    reduces: ClassVar[str] = "matrix"
    #: Whether it holds only if the step's length is the rate times a constant.
    needs_bounded_step: ClassVar[bool] = False
    #: Bounds beside an optimizer's own constraints are applied in the order of this number.
    place: ClassVar[int] = 0

    def whole(self, w: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The weights, of which ``w`` in float32 or better is what the parameters have room for."""
        return w

    def gradient(self, g: Tensor, context: Context) -> Tensor:
        """The gradient that the optimizer works with."""
        return g

    def update(self, d: Tensor, context: Context) -> Tensor:
        """The update ``d``, to be multiplied by ``-length``; the context has the weights and the raw gradient.

        A decay that depends on the update multiplies ``context.shrink`` here.
        """
        return d

    def shrink(self, rate: Rate) -> Rate:
        """What the weights are multiplied by before the update is added."""
        return 1.0

    def init_state(self, x: Tensor, weights: Callable[[], Tensor]) -> dict[str, Tensor]:
        """State for each parameter, like a stage's; ``weights`` returns the initial weights."""
        return {}

    def weight(self, w: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        """The weights after the update ``w``, in float32 or better, brought to where they may live."""
        return w

    def seen_through(self, view: View) -> Constraint:
        """The same constraint of a parameter as it is stored, where the optimizer sees it through ``view``."""
        return self

    def check_composes(self, direction: Direction, step_size: StepSize) -> None:
        """Raise a ``ValueError`` for directions and step sizes that this constraint makes no sense with."""

    def overrides(self, *methods: str) -> bool:
        """Whether this constraint does anything in one of ``methods``."""
        return any(getattr(type(self), method) is not getattr(Constraint, method) for method in methods)


@dataclass(frozen=True)
class WeightDecay(Constraint):
    """Decoupled weight decay: ``w <- (1 - rate * weight_decay) w`` before the update (AdamW, arXiv 1711.05101).

    Args:
        weight_decay: not negative.
        after: decay the new weights instead, the update included (SOAP).
        cautious: decay only entries that the update does not move away from 0: update and weight do not differ in sign
            (arXiv 2510.12402, algorithm 1).

    Raises:
        ValueError: ``after`` with ``cautious``, or a number out of range.
    """

    reduces: ClassVar[str] = "entry"
    weight_decay: float = 0.1
    after: bool = False
    cautious: bool = False

    def __post_init__(self) -> None:
        check_range(self, "weight_decay", self.weight_decay, 0, float("inf"))
        if self.after is True and self.cautious is True:
            raise ValueError("WeightDecay: a cautious decay is one of the weights before the update; leave after False")

    def shrink(self, rate: Rate) -> Rate:
        none = not isinstance(self.weight_decay, Tensor) and self.weight_decay == 0
        return 1.0 if none or self.cautious else 1 - rate * self.weight_decay

    def update(self, d: Tensor, context: Context) -> Tensor:
        if not self.cautious:
            return d * (1 - context.rate * self.weight_decay)
        agree = (d.sign() * context.w.sign() >= 0).to(context.w.dtype)
        context.shrink = context.shrink * (1 - context.rate * self.weight_decay * agree)
        return d

    def overrides(self, *methods: str) -> bool:
        """``update`` only with ``after``, or a cautious decay that is not 0."""
        updates = self.after or (self.cautious and self.weight_decay != 0)
        return super().overrides(*(method for method in methods if method != "update" or updates))


@dataclass(frozen=True)
class TangentProjection(Constraint):
    """AdamP's projection: updates of weights whose scale does not matter lose their part along the weights.

    Scale-invariant weights (before a normalization) have gradients at right angles to them, and grow with every step.
    Where all rows are at right angles to their gradients, ``|cos| < delta / sqrt(in)``, each row of the update loses
    its part along the row of weights; otherwise, where the matrix as a whole is, ``|cos| < delta / sqrt(out in)``, it
    loses its part along the matrix; otherwise nothing happens. Vectors and scalars are left alone. Brings its own
    weight decay, ``rate * weight_decay / (1 - momentum)``, which is multiplied by ``wd_ratio`` where there was a
    projection (Heo et al., arXiv 2006.08217).

    Args:
        delta: largest ``|cos|``, in units of that of random vectors.
        eps: least length of a row or matrix that is divided by.
        wd_ratio: factor of the decay of projected matrices.
        weight_decay: decoupled weight decay, not negative.
        momentum: of a heavy ball, whose steps are ``1 / (1 - momentum)`` times as long, for the decay to follow.
    """

    delta: float = 0.1
    eps: float = 1e-8
    wd_ratio: float = 0.1
    weight_decay: float = 0.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        for name in ("delta", "eps", "wd_ratio", "weight_decay"):
            check_range(self, name, getattr(self, name), 0, float("inf"))
        check_range(self, "momentum", self.momentum, 0, 1)

    def update(self, d: Tensor, context: Context) -> Tensor:
        ratio: Rate = 1.0
        if not context.is_vector and d.numel():
            w, g = context.w, context.raw
            along, size, slope = _dot(w, g), *(torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (w, g))
            size_of_all, slope_of_all = (torch.linalg.vector_norm(x, dim=-2, keepdim=True) for x in (size, slope))
            rows = self._at_right_angles(along, size, slope, w.shape[-1])
            whole = self._at_right_angles(_total(along), size_of_all, slope_of_all, w.shape[-1] * w.shape[-2])
            way = _dot(w, d)
            of_all = torch.where(whole, _total(way) / (size_of_all + self.eps) ** 2, 0.0)
            d = d.addcmul(w, torch.where(rows, way / (size + self.eps) ** 2, of_all), value=-1)
            ratio = torch.where(rows | whole, self.wd_ratio, 1.0).to(w.dtype)
        if self.weight_decay:
            decay = context.rate * self.weight_decay / (1 - self.momentum)
            context.shrink = context.shrink * (1 - decay * ratio)
        return d

    def _at_right_angles(self, products: Tensor, sizes: Tensor, slopes: Tensor, entries: int) -> Tensor:
        """Whether all vectors of so many entries are, from their products and lengths; shape ``(..., 1, 1)``."""
        cosines = products / sizes.clamp(min=self.eps) / slopes.clamp(min=self.eps)
        return cosines.abs().amax(dim=-2, keepdim=True) < self.delta / math.sqrt(entries)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner products of rows, shape ``(..., out, 1)``."""
    return torch.linalg.vecdot(a, b).unsqueeze(-1)


def _total(x: Tensor) -> Tensor:
    return x.sum(dim=-2, keepdim=True)


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
    """``w <- (1 - rate) w - rate * radius * d``: a convex combination of the weights and a vertex of the ball.

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
