"""Bounds that hold for the weights after every step: bounds of rows and columns, spheres and balls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from normopt.constraints.along import AlongAxis
from normopt.constraints.base import Constraint
from normopt.ingredient.registry import read
from normopt.ingredient.stage import Context
from normopt.ingredient.traits import like
from normopt.ingredient.validate import check_positive
from normopt.ingredient.view import View
from normopt.norms.base import Norm
from normopt.norms.spectral import Spectral
from normopt.numerics.lengths import euclidean


@dataclass(frozen=True)
class _OfLengths(AlongAxis):
    """A bound of the lengths of rows (``axis=-1``) or columns (``axis=-2``)."""

    _abstract = True
    place = 1
    radius: float = 1.0
    axis: int = -1

    def __post_init__(self) -> None:
        check_positive(self, "radius", self.radius)
        super().__post_init__()

    def _factor(self, w: Tensor, context: Context) -> Tensor:
        return _factor(w, -1 if context.is_vector else self.axis, self.radius)


@dataclass(frozen=True)
class RowBound(_OfLengths):
    """No row longer than ``radius``: ``w_i <- w_i / max(1, ||w_i|| / radius)`` after every step.

    anGPT's bound, whose weights also start with rows of length ``radius`` (Franke et al., arXiv 2505.22014, section
    4.2). ``Ball(Row(scale="unit"), radius)`` is the same.

    Args:
        radius: the largest length of a row, positive.
        axis: -1, the default: rows, the weights of one output. -2: columns, the weights of one input.
    """

    def weight(self, w: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        return w * self._factor(w, context).clamp_(max=1.0)


@dataclass(frozen=True)
class Sphere(_OfLengths):
    """All rows exactly of length ``radius``: ``w_i <- radius w_i / ||w_i||`` after every step; rows of 0 stay 0.

    nGPT's bound (Loshchilov et al., arXiv 2410.01131, section 2.6).

    Args:
        radius: the length of a row, positive.
        axis: -1, the default: rows, the weights of one output. -2: columns, the weights of one input.
    """

    def weight(self, w: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        return w * self._factor(w, context)


@dataclass(frozen=True)
class FrobeniusSphere(Constraint):
    """Each matrix of Frobenius norm ``radius``: ``w <- radius w / ||w||_F`` after every step.

    The projection of Normalize-and-Project (Lyle et al., arXiv 2407.01800) and of Hyperball (Wen et al. 2025). Vectors
    and scalars are left alone.

    Args:
        radius: positive; ``None``, the default: the Frobenius norm of each matrix before its first step, which is kept
            in the state. A matrix that starts at 0 is then left alone.
    """

    reduces = "all"
    radius: float | None = None

    def __post_init__(self) -> None:
        if self.radius is not None:
            check_positive(self, "radius", self.radius)

    def init_state(self, x: Tensor, weights: Callable[[], Tensor]) -> dict[str, Tensor]:
        return {} if self.radius is not None else {"sphere_radius": euclidean(weights(), (-2, -1), keepdim=True)}

    def weight(self, w: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        if context.is_vector:
            return w
        return w * _factor(w, (-2, -1), state["sphere_radius"] if self.radius is None else self.radius)


def _factor(w: Tensor, dim: int | tuple[int, ...], radius: float | Tensor) -> Tensor:
    """The factor that brings ``w`` to length ``radius`` along ``dim``; 1 where it is that long to rounding, or 0."""
    lengths = euclidean(w, dim, keepdim=True)
    factor = radius / lengths
    there = ((factor - 1).abs() <= 8 * torch.finfo(w.dtype).eps) | (lengths == 0) | (factor == 0) | factor.isinf()
    return torch.where(there, 1.0, factor)


@dataclass(frozen=True)
class Ball(Constraint):
    """The norm ball ``norm(w) <= radius``: the weights are projected onto it after every step.

    Args:
        norm: any norm with a projection, or its name. The projections of the library's norms are exact; norms of
            singular values need a singular value decomposition, for which :class:`SpectralCap` uses polar factors.
        radius: the radius of the ball, positive.
    """

    reduces = like("norm")
    norm: Norm = Spectral()
    radius: float = 1.0

    def __post_init__(self) -> None:
        read(self, "norm", Norm)
        check_positive(self, "radius", self.radius)

    @property
    def decides_on_host(self) -> bool:
        return self.norm.reduces == "matrix"

    def seen_through(self, view: View) -> Constraint:
        return Transposed(self) if view.transpose else self

    def weight(self, w: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        return self.norm.project(w, self.radius)


@dataclass(frozen=True)
class Transposed(Constraint):
    """A bound for parameters that the optimizer sees transposed, such as embeddings: ``bound(w^T)^T``.

    Args:
        bound: the bound of the weights as they are stored.
    """

    bound: Constraint

    def init_state(self, x: Tensor, weights: Callable[[], Tensor]) -> dict[str, Tensor]:
        return self.bound.init_state(x.mT, lambda: weights().mT)

    def weight(self, w: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        return self.bound.weight(w.mT, state, context).mT
