"""Directions with a basis that is updated by one step of subspace iteration: Dion's low rank and ARO's rotation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from normopt.directions.balanced import Sinkhorn
from normopt.ingredient.registry import read
from normopt.ingredient.stage import Context, Direction
from normopt.ingredient.validate import check_range
from normopt.numerics.lengths import euclidean, normalize, normalized


@dataclass(frozen=True)
class LowRank(Direction):
    """Dion: a low-rank polar factor by one power iteration a step, with error feedback (arXiv 2504.05295).

    ``M <- M + x``; ``P``: the orthonormal factor of ``M Q``; ``R = M^T P``; ``M <- M - (1 - mu) P R^T``; ``Q``: ``R``
    with columns of length 1; result ``sqrt(out/in) P Q^T``. Wide matrices are transposed first, so that ``Q`` belongs
    to the shorter side. ``M`` is the momentum (use none before it): its low-rank part ``P R^T`` decays at the rate
    ``mu``, the rest does not decay. The result has Frobenius norm ``sqrt(rank out/in)``; at full rank it converges to
    the polar factor while gradients stay the same.

    Columns of ``R`` beyond the rank of ``M``, shorter than 2e-5 (in float32) of the Frobenius norm, are dropped from
    the result, and the columns of ``Q`` in their place are kept. ``Q`` starts from fixed random numbers.

    Args:
        rank_fraction: the rank divided by the shorter side, in (0, 1]; the rank is rounded up.
        mu: decay rate of the low-rank part of the momentum, in [0, 1).

    Memory: ``M``, and ``rank x min(out, in)`` numbers.
    """

    sees_weights = False
    needs_matrix = True
    decides_on_host = True
    degree = 0
    rank_fraction: float = 1.0
    mu: float = 0.95

    def __post_init__(self) -> None:
        check_range(self, "rank_fraction", self.rank_fraction, 1e-300, 1, closed=True)
        check_range(self, "mu", self.mu, 0, 1)

    def _rank(self, shape: tuple[int, ...]) -> int:
        return math.ceil(self.rank_fraction * min(shape[-2:]))

    @property
    def averages(self) -> frozenset[str]:
        return frozenset({"buffer"})

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        shape = min(x.shape[-2:]), self._rank(x.shape)
        basis = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(x)
        return {"buffer": torch.zeros_like(x), "basis": basis.expand(*x.shape[:-2], *shape).clone()}

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        tall = _tall(state["buffer"].add_(x))
        p, r, q = self._factors(tall, state["basis"])
        tall.sub_(p @ r.mT, alpha=1 - self.mu)
        state["basis"].copy_(torch.where(q.any(dim=-2, keepdim=True), q, state["basis"]))
        return self._product(p, q, x.shape)

    def apply(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        p, _, q = self._factors(_tall(x), state["basis"])
        return self._product(p, q, x.shape)

    def _factors(self, x: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``P``, ``R`` and the new ``Q`` of tall matrices; columns of ``Q`` beyond the rank are 0."""
        p = torch.linalg.qr(x @ basis)[0]
        r = x.mT @ p
        known = euclidean(r, -2, keepdim=True) > rounding(x) * euclidean(x, (-2, -1), keepdim=True)
        return p, r, normalize(r, -2) * known

    def _product(self, p: Tensor, q: Tensor, shape: tuple[int, ...]) -> Tensor:
        m, n = shape[-2:]
        return (p @ q.mT if m >= n else q @ p.mT).mul_(math.sqrt(m / max(n, 1)))

    def rms(self, shape: tuple[int, ...]) -> float:
        """``sqrt(rank) / in``: the product of orthonormal columns and columns of length 1."""
        return math.sqrt(self._rank(shape)) / max(shape[-1], 1)

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """``<g, apply(g)>``: ``sqrt(out/in)`` times the sum of the lengths of the columns of ``R``."""
        p, _, q = self._factors(_tall(g), state["basis"])
        return (g * self._product(p, q, g.shape)).sum(dim=(-2, -1))


@dataclass(frozen=True)
class Aligned(Direction):
    """ARO: a direction in rotated rows, ``R f(R^T x)``, with the rotation ``R`` aligned to ``f`` (arXiv 2602.09006).

    At each step, ``R`` becomes the orthonormal factor ``Q`` of ``x f(R^T x)^T``, a step towards the rotation in which
    ``<R^T x, f(R^T x)>`` is largest; it starts from the identity. While ``x`` stays the same and ``f`` divides rows by
    their lengths, this is a subspace iteration that converges to the polar factor. ``x`` is the output of momentum.

    Tall matrices are transposed first: the shorter side is rotated, and ``f`` sees it as rows. Rows of ``R^T x``
    shorter than 2e-5 (in float32) of the Frobenius norm are set to 0, so that ``f`` does not magnify rounding errors
    outside the range of ``x``. This fails where ``x f(R^T x)^T`` has a lower rank than ``x``, for example if two rows
    of ``R^T x`` have the same signs under ``Max()``: then ``R`` leaves the range of ``x``.

    Args:
        direction: ``f``, without memory and of degree 0: ``Sinkhorn()``, ``Max()``, ``Row()``; or its name.

    Memory: one square matrix of the size of the shorter side.

    Raises:
        ValueError: ``f`` is the same in every basis, has memory, or depends on the length of its input.
    """

    sees_weights = False
    needs_matrix = True
    decides_on_host = True
    degree = 0
    direction: Direction = Sinkhorn()

    def __post_init__(self) -> None:
        read(self, "direction", Direction)
        if self.direction.rotation_invariant:
            raise ValueError(f"Aligned: {self.direction} is the same in every basis; leave the rotation out")
        if self.direction.degree != 0 or self.direction.init_state(torch.zeros(2, 2)):
            raise ValueError(f"Aligned: {self.direction} must have no memory and ignore the length of its input")

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        k = min(x.shape[-2:])
        return {"rotation": torch.eye(k, dtype=x.dtype, device=x.device).expand(*x.shape[:-2], k, k).clone()}

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        if x.numel() == 0:
            return x.clone()
        wide = _wide(normalized(x))
        cross = wide @ self._inner(wide, state["rotation"], context).mT
        state["rotation"].copy_(torch.linalg.qr(cross)[0])
        return self.apply(x, state, context)

    def apply(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        wide = _wide(normalized(x))
        d = state["rotation"] @ self._inner(wide, state["rotation"], context)
        return d.mT if x.shape[-2] > x.shape[-1] else d

    def _inner(self, x: Tensor, rotation: Tensor, context: Context) -> Tensor:
        """``f(R^T x)`` for wide matrices of Frobenius norm 1."""
        rows = rotation.mT @ x
        known = euclidean(rows, -1, keepdim=True) > rounding(x)
        return self.direction(rows * known, {}, context)

    def rms(self, shape: tuple[int, ...]) -> float:
        """The direction's root mean square."""
        return self.direction.rms((min(shape[-2:]), max(shape[-2:])))

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The direction's steepness in the rotated coordinates."""
        return self.direction.steepness(state["rotation"].mT @ _wide(g), {})


def _tall(x: Tensor) -> Tensor:
    """``x``, or its transpose where it is wide."""
    return x if x.shape[-2] >= x.shape[-1] else x.mT


def _wide(x: Tensor) -> Tensor:
    """``x``, or its transpose where it is tall."""
    return x if x.shape[-2] <= x.shape[-1] else x.mT


def rounding(x: Tensor) -> float:
    """The size, relative to 1, up to which numbers count as rounding errors: epsilon^(2/3), 2e-5 in float32.

    Outside the range of a matrix, a factorization leaves errors of its condition number times epsilon.
    """
    return float(torch.finfo(x.dtype).eps ** (2 / 3))
