"""How a polar factor is computed: the quintic iterations, in two forms, and the decompositions of the exact one."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from normopt.host import are_exact, host_may_look, power_of_two

Row = tuple[float, float, float]

#: The largest error that eigenvalues of a Gram matrix may cause in an exact polar factor in float64.
ACCURACY = 1000 * torch.finfo(torch.float64).eps


def normalized(g: Tensor, margin: float = 1.0) -> Tensor:
    """``g`` over ``margin`` times its Frobenius norm, a new tensor in float32 or better; 0 stays 0.

    Dividing by a power of two near the largest entry first keeps the squares of 1e-30 and of 1e30 inside the range of
    float32; it is left out, to the same result, where the host sees that there is no need.
    """
    g = g.to(torch.promote_types(g.dtype, torch.float32))
    size = torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True) if host_may_look(g) else None
    if size is not None and are_exact(size):
        return g / size.mul_(margin)
    tiny = torch.finfo(g.dtype).tiny
    largest = torch.maximum(g.amax(dim=(-2, -1), keepdim=True), -g.amin(dim=(-2, -1), keepdim=True))
    g = g / power_of_two(largest)
    return g.div_(torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True).mul_(margin).clamp_(min=tiny))


def direct(x: Tensor, rows: list[Row], tight: float | None = None) -> Tensor:
    """The steps ``X <- a X + (b A + c A^2) X``, ``A = X X^T``, on ``x`` of shape ``(batch, m, n)``, m <= n.

    Tall matrices take the same steps from the right, ``A = X^T X``. ``tight`` divides ``x`` first by that many times
    its Schatten-8 norm, which the first step's products give for free.
    """
    for i, row in enumerate(rows):
        if tight is not None and i == 0:
            _, poly, shrink = _shrunk(x, row, tight)
            x = _times(_with_diagonal(poly, row[0]).mul_(shrink), x)
        else:
            poly = _polynomial(_gram(x), row)
            x = torch.baddbmm(x, x, poly, beta=row[0]) if _is_tall(x) else torch.baddbmm(x, poly, x, beta=row[0])
    return x


def through_gram(x: Tensor, rows: list[Row], tight: float | None = None) -> Tensor:
    """The steps of :func:`direct` on ``A`` alone, m x m, and one product with ``x`` at the end of each segment.

    ``Q <- Q (a + b A + c A^2)`` gathers what ``x`` is to be multiplied with, and ``A <- A (a + b A + c A^2)^2``.
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


def segments(rows: list[Row], dtype: torch.dtype) -> list[list[Row]]:
    """The rows, cut where the Gram form has to compute ``A`` anew from ``x``.

    A step multiplies the smallest eigenvalues of ``A`` by ``a^2`` and the rounding errors beside them too, which start
    at the dtype's epsilon and may be negative; at 1 the iteration has no bound. bfloat16 allows two steps at first.
    """
    parts: list[list[Row]] = []
    error = 1.0
    for row in rows:
        if error >= 1:
            parts.append([])
            error = torch.finfo(dtype).eps
        parts[-1].append(row)
        error *= row[0] ** 2
    return parts


def _shrunk(x: Tensor, row: Row, tight: float) -> tuple[Tensor, Tensor, Tensor]:
    """``A`` and ``b A + c A^2`` of ``x / s``, ``s = tight ||(x x^T)^2||_F^(1/4)``, and ``1 / s``."""
    gram = _gram(x)
    square = torch.bmm(gram, gram)
    size = torch.linalg.vector_norm(square, dim=(-2, -1), keepdim=True).mul_(tight**4)
    # A number of x's dtype: b A and c A^2 nearly cancel, so both must be divided by powers of exactly the same one.
    shrink = size.clamp_(min=1e-6).rsqrt_()
    poly = torch.mul(gram, row[1]).addcmul_(square, shrink, value=row[2]).mul_(shrink)
    return gram.mul_(shrink), poly, shrink.sqrt_()


def _is_tall(x: Tensor) -> bool:
    return x.shape[-2] > x.shape[-1]


def _gram(x: Tensor) -> Tensor:
    """``A``, as large as the shorter side."""
    return torch.bmm(x.mT, x) if _is_tall(x) else torch.bmm(x, x.mT)


def _times(q: Tensor, x: Tensor) -> Tensor:
    """``x`` times a polynomial ``q`` of its ``A``."""
    return torch.bmm(x, q) if _is_tall(x) else torch.bmm(q, x)


def _with_diagonal(q: Tensor, a: float) -> Tensor:
    """``q + a I``, in place."""
    q.diagonal(dim1=-2, dim2=-1).add_(a)
    return q


def _polynomial(gram: Tensor, row: Row) -> Tensor:
    return torch.baddbmm(gram, gram, gram, beta=row[1], alpha=row[2])


def exact(g: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``U_r V_r^T`` in ``dtype``, float32 or better; see :func:`normopt.polar.polar`.

    ``(G G^T)^(-1/2) G`` from eigenvalues in float64, whose rounding errors grow with the square of the condition
    number; matrices for which they would exceed float32's epsilon (condition 2e4), or 2e-13 for float64 (condition 30),
    and those without full rank take a singular value decomposition.
    """
    if g.numel() == 0:
        return g.clone()
    x = g.to(torch.promote_types(dtype or g.dtype, torch.float32))
    if min(x.shape[-2:]) == 1:
        return normalized(x).to(g.dtype)
    return (_factor(x) if x.shape[-2] <= x.shape[-1] else _factor(x.mT).mT).to(g.dtype)


def _factor(x: Tensor) -> Tensor:
    """The polar factor of wide matrices."""
    if x.device.type == "mps":  # It has no float64.
        return _by_singular_values(x)
    factor, trusted = _by_eigenvalues(x)
    if not bool(trusted.all()):
        factor[~trusted] = _by_singular_values(x[~trusted])
    return factor


def _by_eigenvalues(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(x x^T)^(-1/2) x``, and for each matrix whether its rounding errors are small enough."""
    wide = normalized(x.double())
    try:
        values, vectors = torch.linalg.eigh(wide @ wide.mT)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return x.clone(), torch.zeros(x.shape[:-2], dtype=torch.bool, device=x.device)
    allowed = max(ACCURACY, torch.finfo(x.dtype).eps)
    trusted = values[..., 0] * allowed > values[..., -1] * torch.finfo(torch.float64).eps
    root = (vectors * values.clamp(min=torch.finfo(torch.float64).tiny).rsqrt().unsqueeze(-2)) @ vectors.mT
    return (root @ wide).to(x.dtype), trusted


def _by_singular_values(x: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(normalized(x), full_matrices=False)
    kept = s > s.amax(dim=-1, keepdim=True) * max(x.shape[-2:]) * torch.finfo(x.dtype).eps
    return (u * kept.unsqueeze(-2)) @ vh
