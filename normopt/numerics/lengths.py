"""Euclidean lengths of rows, columns and matrices that neither overflow nor underflow."""

from __future__ import annotations

import torch
from torch import Tensor

from normopt.numerics.host import are_exact, can_read_values, power_of_two


def axes(x: Tensor) -> tuple[int, ...]:
    """The dimensions of one matrix, ``(-2, -1)``; for a vector or scalar, all its dimensions."""
    return (-2, -1) if x.ndim > 1 else tuple(range(x.ndim))


def euclidean(x: Tensor, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
    """Euclidean norms along ``dim``, in float32 or better, that neither overflow nor underflow.

    Entries are first divided by a power of two near the largest one. Where values can be read for free and show that no
    square leaves the range, the division is skipped; the result is the same.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.ndim == 0 or x.numel() == 0:
        return torch.linalg.vector_norm(x, dim=dim, keepdim=keepdim)
    sizes = _norms(x, dim) if can_read_values(x) else None
    if sizes is None or not are_exact(sizes):
        scale = power_of_two(torch.maximum(x.amax(dim=dim, keepdim=True), -x.amin(dim=dim, keepdim=True)))
        sizes = _norms(x / scale, dim).mul_(scale)
    return sizes if keepdim else sizes.squeeze(dim)


def _norms(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    if dim in (-2, (-2,)):  # torch.linalg.vector_norm along columns takes ten times as long on a CPU
        return x.square().sum(dim=dim, keepdim=True).sqrt_()
    return torch.linalg.vector_norm(x, dim=dim, keepdim=True)


def normalize(g: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """``g`` divided by its Euclidean norm along ``dim``, 0 where that norm is 0; a new tensor."""
    return (g / _nonzero(euclidean(g, dim, keepdim=True))).to(g.dtype)


def clip_norm(w: Tensor, dim: int | tuple[int, ...], radius: float) -> Tensor:
    """``w`` shortened along ``dim`` to at most ``radius``; a new tensor."""
    return (w * (radius / _nonzero(euclidean(w, dim, keepdim=True))).clamp_(max=1.0)).to(w.dtype)


def _nonzero(x: Tensor) -> Tensor:
    """``x`` with 1 in place of 0, to divide by."""
    return torch.where(x == 0, 1.0, x)


def normalized(g: Tensor, margin: float = 1.0) -> Tensor:
    """``g`` divided by ``margin`` times its Frobenius norm, a new tensor in float32 or better; 0 stays 0.

    As in :func:`euclidean`, entries are first divided by a power of two near the largest one, so that the squares of
    1e-30 and of 1e30 stay inside the range of float32.
    """
    g = g.to(torch.promote_types(g.dtype, torch.float32))
    size = torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True) if can_read_values(g) else None
    if size is not None and are_exact(size):
        return g / size.mul_(margin)
    tiny = torch.finfo(g.dtype).tiny
    largest = torch.maximum(g.amax(dim=(-2, -1), keepdim=True), -g.amin(dim=(-2, -1), keepdim=True))
    g = g / power_of_two(largest)
    return g.div_(torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True).mul_(margin).clamp_(min=tiny))
