"""Directions with a basis that is updated by one step of subspace iteration: Dion, ARO and COSMOS."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from normopt.directions.algebra import Chain
from normopt.directions.balanced import Sinkhorn
from normopt.directions.smoothed import Smoothed
from normopt.ingredient.registry import read
from normopt.ingredient.stage import ROTATED, Context, Direction, substate
from normopt.ingredient.validate import check_count, check_range
from normopt.norms.entrywise import Euclidean, Max
from normopt.norms.spectral import Spectral
from normopt.numerics.eigen import eigh
from normopt.numerics.lengths import euclidean, normalize, normalized


@dataclass(frozen=True)
class LowRank(Direction):
    """Dion: a low-rank polar factor by one power iteration a step, with error feedback (arXiv 2504.05295).

    ``M <- M + x``; ``P``: the orthonormal factor of ``M Q``; ``R = M^T P``; ``M <- M - (1 - beta) P R^T``; ``Q``: ``R``
    with columns of length 1; result ``sqrt(out/in) P Q^T``. Wide matrices are transposed first, so that ``Q`` belongs
    to the shorter side. ``M`` is the momentum (use none before it): its low-rank part ``P R^T`` decays at the rate
    ``beta``, the rest does not decay. The result has Frobenius norm ``sqrt(rank out/in)``; at full rank it converges to
    the polar factor while gradients stay the same.

    Columns of ``R`` beyond the rank of ``M``, shorter than 2e-5 (in float32) of the Frobenius norm, are dropped from
    the result, and the columns of ``Q`` in their place are kept. ``Q`` starts from fixed random numbers.

    Args:
        rank_fraction: the rank divided by the shorter side, in (0, 1]; the rank is rounded up.
        beta: decay rate of the low-rank part of the momentum, in [0, 1).

    Memory: ``M``, and ``rank x min(out, in)`` numbers.
    """

    sees_weights = False
    needs_matrix = True
    decides_on_host = True
    degree = 0
    rank_fraction: float = 1.0
    beta: float = 0.95

    def __post_init__(self) -> None:
        check_range(self, "rank_fraction", self.rank_fraction, 1e-300, 1, closed=True)
        check_range(self, "beta", self.beta, 0, 1)

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
        tall.sub_(p @ r.mT, alpha=1 - self.beta)
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


@dataclass(frozen=True)
class LeadingSubspace(Direction):
    """COSMOS: one direction in the leading subspace of the gradients, another in the rest (arXiv 2502.17410).

    ``leading(x U) U^T + factor rest(x - x U U^T)``. The ``rank`` orthonormal columns of ``U`` follow the leading
    eigenvectors of an EMA of ``g^T g``: with ``T = beta U S U^T + (1 - beta) g^T g``, ``U`` becomes the orthonormal
    factor of ``T U``, a step of subspace iteration, and ``S`` becomes ``U^T T U``, all that is kept of the EMA. At the
    first step they are the leading eigenvectors of ``g^T g`` themselves. The memory of ``leading``, such as second
    moments of ``g U``, is not rotated when ``U`` changes, as in SOAP.

    A part of ``x`` that is no more than rounding errors is 0, so that neither direction magnifies it.

    Args:
        leading: the direction in the subspace, or its name; it sees matrices of shape ``(out, rank)``.
        rest: the direction of the rest, or its name.
        rank: dimension of the subspace; ``min(out, in)`` at most.
        beta: decay rate of the EMA, in [0, 1).
        factor: of the rest, not negative.

    Memory: ``rank in + rank^2`` numbers, and that of both directions.

    Raises:
        ValueError: a direction that has to see the first gradient before it moves, or a number out of range.
    """

    sees_weights = False
    needs_matrix = True
    decides_on_host = True
    squares = True
    degree = None
    leading: Direction = Smoothed(Max())
    rest: Direction = Chain(Spectral("unit"), Euclidean())
    rank: int = 64
    beta: float = 0.95
    factor: float = 0.2

    def __post_init__(self) -> None:
        read(self, "leading", Direction)
        read(self, "rest", Direction)
        check_count(self, "rank", self.rank)
        check_range(self, "beta", self.beta, 0, 1)
        check_range(self, "factor", self.factor, 0, float("inf"))
        for late in (direction for direction in (self.leading, self.rest) if direction.looks_first):
            raise ValueError(f"LeadingSubspace: {late} has to see the first gradient before it moves")

    @property
    def cell(self) -> tuple[str, str]:
        """The leading direction's row of the periodic table, in the column of rotated second moments."""
        return self.leading.cell[0], ROTATED

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        n, k = x.shape[-1], min(self.rank, *x.shape[-2:])
        inside = {f"leading.{name}": y for name, y in self.leading.init_state(x[..., :k]).items()}
        outside = {f"rest.{name}": y for name, y in self.rest.init_state(x).items()}
        basis, gram = x.new_zeros(*x.shape[:-2], n, k), x.new_zeros(*x.shape[:-2], k, k)
        return {"basis": basis, "gram": gram, **inside, **outside}

    @property
    def averages(self) -> frozenset[str]:
        inside = {f"leading.{name}" for name in self.leading.averages}
        return frozenset(inside | {f"rest.{name}" for name in self.rest.averages})

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        if x.numel() == 0:
            return x.clone()
        self._follow(context.g, state, is_first=bool(context.step == 1))
        return self._both(self.leading, self.rest, x, state, context)

    def apply(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        return self._both(self.leading.apply, self.rest.apply, x, state, context)

    def _follow(self, g: Tensor, state: dict[str, Tensor], is_first: bool) -> None:
        basis, gram = state["basis"], state["gram"]
        if is_first:
            new = eigh(g.mT @ g)[1].flip(-1)[..., : basis.shape[-1]].to(basis)
            old = torch.zeros_like(gram)
        else:
            new = torch.linalg.qr(self.beta * (basis @ gram) + (1 - self.beta) * (g.mT @ (g @ basis)))[0]
            turn = basis.mT @ new
            old = turn.mT @ gram @ turn
        seen = g @ new
        basis.copy_(new)
        gram.copy_(self.beta * old + (1 - self.beta) * (seen.mT @ seen))

    def _both(
        self,
        leading: Callable[..., Tensor],
        rest: Callable[..., Tensor],
        x: Tensor,
        state: dict[str, Tensor],
        context: Context,
    ) -> Tensor:
        basis = state["basis"]
        noise = euclidean(x, (-2, -1), keepdim=True) * (4 * torch.finfo(x.dtype).eps)
        seen = x @ basis
        seen = torch.where(seen.abs() > noise, seen, 0.0)
        inside = leading(seen, substate(state, "leading."), context.through(lambda t: t @ basis)) @ basis.mT
        left = x - seen @ basis.mT
        left = torch.where(euclidean(left, (-2, -1), keepdim=True) > noise * x.shape[-1] ** 0.5, left, 0.0)
        there = context.through(lambda t: t - (t @ basis) @ basis.mT)
        return inside + self.factor * rest(left, substate(state, "rest."), there)


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
