"""Gram matrices: powers, eigenvectors, averages, and bases that follow the eigenvectors by power iteration."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normopt.numerics.host import can_read_values

#: The error of a decomposition that does not converge.
LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]

#: What is added to statistics before a root is taken: a number, or a tensor, whose value is never read.
Eps = float | Tensor


def matrix_power(stats: Tensor, exponent: float, eps: Eps = 0.0) -> Tensor:
    """``(stats + eps)^exponent`` of symmetric positive semidefinite matrices, for negative exponents.

    Eigenvectors whose eigenvalue plus ``eps`` does not exceed the rounding errors, sqrt(n) times the dtype's epsilon
    times the largest eigenvalue, are left out (a pseudo-inverse): their eigenvalues are not known, and a tiny ``eps``
    would magnify a gradient's part along them. The result is 0 for a matrix that is 0 or has an entry that is not
    finite.
    """
    if stats.numel() == 0:
        return stats.clone()
    eigenvalues, vectors = eigh(stats)
    largest = eigenvalues.amax(dim=-1, keepdim=True)
    known = torch.isfinite(stats).all(dim=-1).all(dim=-1, keepdim=True) & (largest > 0)
    shifted = eigenvalues.clamp(min=0.0) + eps
    kept = known & (shifted > largest * (math.sqrt(stats.shape[-1]) * torch.finfo(stats.dtype).eps))
    powers = torch.where(kept, shifted, 1.0) ** exponent * kept
    return (vectors * powers.unsqueeze(-2)) @ vectors.mT


def eigh(stats: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, in ascending order, and eigenvectors of symmetric matrices, in float32 or better; it never raises.

    Matrices are divided by their largest entry first; infinite entries and eigenvalues are replaced by the dtype's
    largest number, NaNs by 0. If the decomposition does not converge, it is repeated in float64 with 1e-7 added to the
    diagonal, which is subtracted from the eigenvalues; if that fails too, the matrix is replaced by its diagonal.
    """
    working = torch.promote_types(stats.dtype, torch.float32)
    a = torch.nan_to_num(stats.to(working))
    if a.numel() == 0:
        return a.diagonal(dim1=-2, dim2=-1).clone(), a
    largest = a.abs().amax(dim=(-2, -1), keepdim=True)
    a = a / torch.where(largest == 0, 1.0, largest)
    values, vectors = _eigh(a)
    return torch.nan_to_num(values * largest.squeeze(-1)), vectors


def _eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    jitter = 1e-7
    found = _attempt(a)
    if found is None:
        found = _attempt(a.cpu().double() + jitter * torch.eye(a.shape[-1], dtype=torch.float64))
        if found is None:
            values, order = a.diagonal(dim1=-2, dim2=-1).sort(dim=-1)
            return values, torch.nn.functional.one_hot(order, a.shape[-1]).mT.to(a)
        found = found[0] - jitter, found[1]
    return found[0].to(a), found[1].to(a)


def _attempt(a: Tensor) -> tuple[Tensor, Tensor] | None:
    """``torch.linalg.eigh``; ``None`` where it raises, or returns NaNs, as it can for matrices with rows of 0."""
    try:
        values, vectors = torch.linalg.eigh(a)
    except LinAlgError:
        return None
    return (values, vectors) if bool((values.isfinite() & vectors.isfinite().all(dim=-2)).all()) else None


def gram_matrix(g: Tensor, side: str) -> Tensor:
    """``g g^T`` for ``side="left"``, ``g^T g`` for ``"right"``."""
    return g @ g.mT if side == "left" else g.mT @ g


def average_(old: Tensor, new: Tensor, beta: float) -> Tensor:
    """``old <- beta old + (1 - beta) new`` in place, except for matrices of ``new`` whose sum is not finite."""
    finite = new.sum(dim=(-2, -1), keepdim=True).isfinite()
    all_are = can_read_values(finite) and bool(finite.all())
    return old.lerp_(new if all_are else torch.where(finite, new, old), 1 - beta)


def power_iteration_(basis: Tensor, gram: Tensor, ordered: bool = True) -> Tensor:
    """Replace ``basis`` by the orthonormal factor of ``gram @ basis``, its columns sorted by their Rayleigh quotients.

    Args:
        basis: orthonormal columns, shape ``(..., n, n)``, modified.
        gram: symmetric positive semidefinite matrices of the same shape.
        ordered: whether to sort.

    Returns:
        The new order as indices of the old columns, shape ``(..., n)``: by Rayleigh quotient, the largest first; 0, 1,
        2 ... unless ``ordered``.
    """
    if not basis.numel():
        return torch.arange(basis.shape[-1], device=basis.device).expand(basis.shape[:-1])
    largest = gram.abs().amax(dim=(-2, -1), keepdim=True)
    product = (gram / torch.where(largest == 0, 1.0, largest)) @ basis
    order = torch.arange(basis.shape[-1], device=basis.device).expand(basis.shape[:-1])
    if ordered:
        order = (basis * product).sum(dim=-2).argsort(dim=-1, descending=True, stable=True)
        product = _ordered(product, order, "right")
    q = torch.linalg.qr(product)[0]
    finite = q.sum(dim=(-2, -1), keepdim=True).isfinite()
    basis.copy_(torch.where(finite, q, _ordered(basis, order, "right")))
    return order


def reorder_(x: Tensor, order: Tensor, side: str) -> None:
    """Put the rows (``side="left"``) or columns of ``x`` in ``order``, in place, if ``x`` has as many as ``order``."""
    if x.shape[-2 if side == "left" else -1] == order.shape[-1]:
        x.copy_(_ordered(x, order, side))


def _ordered(x: Tensor, order: Tensor, side: str) -> Tensor:
    """The rows or columns of ``x`` in ``order``. Not by torch.take_along_dim, which also checks the sign of indices."""
    along, across = (-2, -1) if side == "left" else (-1, -2)
    return x.gather(along, order.unsqueeze(across).expand(x.shape))
