"""Newton-Schulz iterations, on the matrix itself and on its Gram matrix."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from normopt.polar.coefficients import Quintic

#: On a CPU, of products that are symmetric only three quarters are computed from this size on, in float32; below, and
#: in bfloat16, two smaller products take as long as the whole.
HALVED_FROM = 384


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
            half = _symmetric(gram, poly, gram, a)
            gram = _symmetric(poly, half, half, a)
            poly = _polynomial(gram, row)
            q = _symmetric(q, poly, q, row[0])
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


def products_of(form: str, rows: list[Quintic], dtype: torch.dtype) -> tuple[int, int, int]:
    """How many products ``X X^T``, of two ``A``, and of a polynomial of ``A`` with ``X``, a form computes."""
    if form == "direct":
        return len(rows), len(rows), len(rows)
    parts = segments(rows, dtype)
    return len(parts), sum(4 * len(part) - 3 for part in parts), len(parts)


def _shrunk(x: Tensor, row: Quintic, tight: float) -> tuple[Tensor, Tensor, Tensor]:
    """``A`` and ``b A + c A^2`` of ``x / s``, ``s = tight ||(x x^T)^2||_F^(1/4)``, and ``1 / s``."""
    gram = _gram(x)
    square = _symmetric(gram, gram)
    size = torch.linalg.vector_norm(square, dim=(-2, -1), keepdim=True).mul_(tight**4)
    # Rounded to x's dtype here: b A and c A^2 nearly cancel, so both must be divided by powers of the same number.
    shrink = size.clamp_(min=1e-6).rsqrt_()
    poly = torch.mul(gram, row[1]).addcmul_(square, shrink, value=row[2]).mul_(shrink)
    return gram.mul_(shrink), poly, shrink.sqrt_()


def _is_tall(x: Tensor) -> bool:
    return x.shape[-2] > x.shape[-1]


def _gram(x: Tensor) -> Tensor:
    """``A``, a square matrix of the size of the shorter side."""
    return _symmetric(x.mT, x) if _is_tall(x) else _symmetric(x, x.mT)


def _times(q: Tensor, x: Tensor) -> Tensor:
    """``x`` times a polynomial ``q`` of its ``A``."""
    return torch.bmm(x, q) if _is_tall(x) else torch.bmm(q, x)


def _with_diagonal(q: Tensor, a: float) -> Tensor:
    """``q + a I``, in place."""
    q.diagonal(dim1=-2, dim2=-1).add_(a)
    return q


def _polynomial(gram: Tensor, row: Quintic) -> Tensor:
    """``b A + c A^2``."""
    return _symmetric(gram, gram, gram, *row[1:])


def _symmetric(x: Tensor, y: Tensor, base: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """``x y``, or ``beta base + alpha x y``, where that is a symmetric matrix, as of polynomials of one ``A``."""
    if not is_halved(x.shape[-2], x.dtype, x.device):
        return torch.bmm(x, y) if base is None else torch.baddbmm(base, x, y, beta=beta, alpha=alpha)
    middle = x.shape[-2] // 2
    out = x.new_empty(x.shape[0], x.shape[-2], x.shape[-2])
    for rows, columns in ((slice(middle), slice(middle)), (slice(middle, None), slice(None))):
        left, right = x[:, rows], y[..., columns]
        if base is None:
            out[:, rows, columns] = torch.bmm(left, right)
        else:
            out[:, rows, columns] = torch.baddbmm(base[:, rows, columns], left, right, beta=beta, alpha=alpha)
    out[:, :middle, middle:] = out[:, middle:, :middle].mT
    return out


def is_halved(size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether symmetric products of this size leave out a quarter, which is the transpose of another one."""
    return size >= HALVED_FROM and dtype == torch.float32 and device.type == "cpu"
