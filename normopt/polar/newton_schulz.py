"""Newton-Schulz iterations, on the matrix itself and on its Gram matrix."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from normopt.polar.coefficients import Quintic


def direct(x: Tensor, rows: list[Quintic], tight: float | None = None) -> Tensor:
    """The steps ``X <- a X + (b A + c A^2) X``, ``A = X X^T``, on ``x`` of shape ``(batch, m, n)``, m <= n.

    For tall matrices the steps are ``X <- a X + X (b A + c A^2)``, ``A = X^T X``. With ``tight``, ``x`` is first
    divided by ``tight`` times its Schatten-8 norm, for which the first step's products suffice.
    """
    for i, row in enumerate(rows):
        if tight is not None and i == 0:
            _, poly, shrink = _shrunk(x, row, tight)
            x = _times(_with_diagonal(poly, row[0]).mul_(shrink), x)
        else:
            poly = _polynomial(_gram(x), row)
            x = torch.baddbmm(x, x, poly, beta=row[0]) if _is_tall(x) else torch.baddbmm(x, poly, x, beta=row[0])
    return x


def through_gram(x: Tensor, rows: list[Quintic], tight: float | None = None) -> Tensor:
    """The steps of :func:`direct` on ``A`` alone, m x m, and one product with ``x`` at the end of each segment.

    ``Q <- Q (a + b A + c A^2)`` accumulates the factor of ``x``, and ``A <- A (a + b A + c A^2)^2``.
    """
    for i, segment in enumerate(segments(rows, x.dtype)):
        if tight is not None and i == 0:
            gram, poly, shrink = _shrunk(x, segment[0], tight)
            q = _with_diagonal(poly.clone(), segment[0][0]).mul_(shrink)
        else:
            gram = _gram(x)
            poly = _polynomial(gram, segment[0])
            q = _with_diagonal(poly.clone(), segment[0][0])
        for (a, _, _), row in itertools.pairwise(segment):
            half = torch.baddbmm(gram, gram, poly, beta=a)
            gram = torch.baddbmm(half, poly, half, beta=a)
            poly = _polynomial(gram, row)
            q = torch.baddbmm(q, q, poly, beta=row[0])
        x = _times(q, x)
    return x


def segments(rows: list[Quintic], dtype: torch.dtype) -> list[list[Quintic]]:
    """The rows, cut where the Gram form has to compute ``A`` from ``x`` again.

    A step multiplies the smallest eigenvalues of ``A`` by ``a^2``, and their rounding errors too, which start at the
    dtype's epsilon and may be negative; an error of 1 makes the iteration diverge. bfloat16 allows two steps at first.
    """
    parts: list[list[Quintic]] = []
    error = 1.0
    for row in rows:
        if error >= 1:
            parts.append([])
            error = torch.finfo(dtype).eps
        parts[-1].append(row)
        error *= row[0] ** 2
    return parts


def _shrunk(x: Tensor, row: Quintic, tight: float) -> tuple[Tensor, Tensor, Tensor]:
    """``A`` and ``b A + c A^2`` of ``x / s``, ``s = tight ||(x x^T)^2||_F^(1/4)``, and ``1 / s``."""
    gram = _gram(x)
    square = torch.bmm(gram, gram)
    size = torch.linalg.vector_norm(square, dim=(-2, -1), keepdim=True).mul_(tight**4)
    # Rounded to x's dtype here: b A and c A^2 nearly cancel, so both must be divided by powers of the same number.
    shrink = size.clamp_(min=1e-6).rsqrt_()
    poly = torch.mul(gram, row[1]).addcmul_(square, shrink, value=row[2]).mul_(shrink)
    return gram.mul_(shrink), poly, shrink.sqrt_()


def _is_tall(x: Tensor) -> bool:
    return x.shape[-2] > x.shape[-1]


def _gram(x: Tensor) -> Tensor:
    """``A``, a square matrix of the size of the shorter side."""
    return torch.bmm(x.mT, x) if _is_tall(x) else torch.bmm(x, x.mT)


def _times(q: Tensor, x: Tensor) -> Tensor:
    """``x`` times a polynomial ``q`` of its ``A``."""
    return torch.bmm(x, q) if _is_tall(x) else torch.bmm(q, x)


def _with_diagonal(q: Tensor, a: float) -> Tensor:
    """``q + a I``, in place."""
    q.diagonal(dim1=-2, dim2=-1).add_(a)
    return q


def _polynomial(gram: Tensor, row: Quintic) -> Tensor:
    """``b A + c A^2``."""
    return torch.baddbmm(gram, gram, gram, beta=row[1], alpha=row[2])
