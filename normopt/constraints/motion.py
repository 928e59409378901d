"""How far weights may move in one step, beside their own size: the radial brake and the floor of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normopt.constraints.along import AlongAxis
from normopt.constraints.base import Constraint
from normopt.ingredient.stage import Context, Rate
from normopt.ingredient.validate import check_positive, check_range
from normopt.numerics.lengths import euclidean


@dataclass(frozen=True)
class RadialBrake(Constraint):
    """Each matrix may grow only by ``factor`` times the radial part of its step.

    With ``s = w' - w`` the step, decay included, and ``r = <s, w> / ||w||_F`` its radial part, ``w'`` gets the norm
    ``||w||_F + r`` where ``r <= 0``, and ``||w||_F + factor r`` otherwise. The length that the tangential part of a
    step adds, of second order in the learning rate, is taken away too. With ``factor=0`` matrices never grow. A rule of
    the speed runs of modded-nanogpt, with 0.5. Matrices of 0, vectors and scalars are left alone.

    Args:
        factor: what is left of growth, in [0, 1].
    """

    reduces = "all"
    compares = True
    place = 1
    factor: float = 0.5

    def __post_init__(self) -> None:
        check_range(self, "factor", self.factor, 0, 1, closed=True)

    def weight(self, w: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        if context.is_vector:
            return w
        size, new = (euclidean(x, (-2, -1), keepdim=True) for x in (context.w, w))
        radial = ((w - context.w) * (context.w / size)).sum(dim=(-2, -1), keepdim=True)
        radius = size + torch.where(radial > 0, self.factor * radial, radial)
        return torch.where((size > 0) & (new > 0) & (radius > 0), w * (radius / new), w)


@dataclass(frozen=True)
class RowFloor(AlongAxis):
    """No row of an update shorter than ``ratio`` times its row of weights.

    ``d_i <- d_i max(1, ratio ||w_i|| / ||d_i||)``, where ``d`` is the update before the learning rate; rows of 0
    stay 0, and the step size sees the longer rows. A rule of the speed runs of modded-nanogpt, with 0.3825 for updates
    of the polar factor. Vectors and scalars are left alone.

    Args:
        ratio: the smallest ratio of lengths, positive.
        axis: -1, the default: rows, the weights of one output. -2: columns, the weights of one input.

    Raises:
        ValueError: a number out of range; or it stands beside a constraint that needs steps of bounded length
            (:class:`~normopt.FrankWolfe`, :class:`~normopt.SoftSpectralCap`).
    """

    lengthens = True
    ratio: float = 0.3825
    axis: int = -1

    def __post_init__(self) -> None:
        check_positive(self, "ratio", self.ratio)
        super().__post_init__()

    def update(self, d: Tensor, context: Context) -> tuple[Tensor, Rate]:
        if context.is_vector:
            return d, 1.0
        wanted, length = (euclidean(x, self.axis, keepdim=True) for x in (context.w, d))
        factor = (self.ratio * wanted / length).clamp_(min=1.0)
        return d * torch.where(length > 0, factor, 1.0), 1.0
