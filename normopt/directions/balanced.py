"""Directions that rescale a gradient and are no norm's duality map: SinkGD, AuON, powers of singular values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normopt.directions.base import UnitRMS
from normopt.ingredient.stage import Context, Direction
from normopt.ingredient.validate import check_count, check_range
from normopt.norms.entrywise import Euclidean
from normopt.norms.rows_columns import Column, Row
from normopt.numerics.lengths import axes, normalize
from normopt.numerics.singular import map_spectrum


@dataclass(frozen=True)
class Sinkhorn(UnitRMS):
    """Rows, then columns, normalized to a root mean square of 1, repeatedly (SinkGD, arXiv 2502.06742).

    The limit is the one matrix ``D1 x D2``, with positive diagonal ``D1`` and ``D2``, whose rows and columns all have a
    root mean square of 1: Sinkhorn's iteration on the squares of the entries. It alternates the duality maps of
    :class:`~normopt.Row` and :class:`~normopt.Column`, and is the duality map of neither norm. After a finite number of
    iterations the columns are exact. Rows and columns of zeros stay 0.

    Args:
        iterations: number of iterations; each normalizes rows and columns once.
    """

    sees_weights = False
    needs_matrix = True
    degree = 0
    iterations: int = 5

    def __post_init__(self) -> None:
        check_count(self, "iterations", self.iterations)

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        rows, columns = Row("unit"), Column("rms")
        for _ in range(self.iterations):
            x = columns.dualize(rows.dualize(x))
        return x


@dataclass(frozen=True)
class CoshScaled(Direction):
    """AuON's scaling: ``x / rms(cosh(gamma x / ||x||))`` (arXiv 2509.24320).

    It hardly changes ``x``: since ``cosh^2 = 1 + sinh^2`` and the argument has length ``gamma``, the square of the
    divisor lies between ``1 + gamma^2 / size`` and ``1 + sinh(gamma)^2 / size``, which for ``gamma=1.5`` and 128 x 128
    entries is within 0.03% of 1.

    Args:
        gamma: Euclidean length of the argument of cosh, not negative.
    """

    sees_weights = False
    reduces = "all"
    sets_length = False
    gamma: float = 1.5

    def __post_init__(self) -> None:
        check_range(self, "gamma", self.gamma, 0, float("inf"))

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        waves = torch.cosh(normalize(x, axes(x)).mul_(self.gamma))
        return x / waves.square_().mean(dim=axes(x), keepdim=True).sqrt_()


@dataclass(frozen=True)
class SingularPower(UnitRMS):
    """A power of the singular values, ``U S^power V^T`` with a root mean square of 1, also powers of 0 and below.

    Power 0 is the polar factor, a positive one the duality map of ``Schatten(1 + 1 / power)``, both at another length.
    A negative one, for which there is no norm, moves the most where the gradient is small: DynMuon goes from 0.25 to
    -0.25 over a run, Freon (arXiv 2605.11181) has ``power = q - 1 < 0``. By a singular value decomposition; singular
    values that may be rounding errors stay 0.

    Args:
        power: in [-1, 1]; an :class:`~normopt.Option` for a schedule.
    """

    sees_weights = False
    needs_matrix = True
    rotation_invariant = True
    decides_on_host = True
    degree = 0
    power: float = 0.0

    def __post_init__(self) -> None:
        check_range(self, "power", self.power, -1, 1, closed=True)

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        d = map_spectrum(x, lambda s: torch.where(s > 0, s, 1.0) ** self.power * (s > 0))
        return Euclidean().dualize(d)
