"""The exact polar factor: from eigenvalues in float64 where they are accurate enough, else from singular values."""

from __future__ import annotations

import torch
from torch import Tensor

from normopt.numerics.eigen import LinAlgError
from normopt.numerics.lengths import normalized

#: The largest error of an exact polar factor in float64 for which eigenvalues of the Gram matrix are used.
ACCURACY = 1000 * torch.finfo(torch.float64).eps


def exact(g: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``U_r V_r^T``, computed in ``dtype``, float32 or better; see :func:`normopt.polar.polar`.

    ``(G G^T)^(-1/2) G`` from eigenvalues in float64, whose rounding errors grow with the square of the condition
    number. A singular value decomposition is used for matrices where the errors would exceed float32's epsilon
    (condition 2e4), or 2e-13 for float64 (condition 30), and for matrices without full rank.
    """
    if g.numel() == 0:
        return g.clone()
    x = g.to(torch.promote_types(dtype or g.dtype, torch.float32))
    if min(x.shape[-2:]) == 1:
        return normalized(x).to(g.dtype)
    return (_factor(x) if x.shape[-2] <= x.shape[-1] else _factor(x.mT).mT).to(g.dtype)


def _factor(x: Tensor) -> Tensor:
    """The polar factor of wide matrices."""
    if x.device.type == "mps":  # which has no float64
        return _by_singular_values(x)
    factor, trusted = _by_eigenvalues(x)
    if not bool(trusted.all()):
        factor[~trusted] = _by_singular_values(x[~trusted])
    return factor


def _by_eigenvalues(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(x x^T)^(-1/2) x``, and for each matrix whether the rounding errors of the result are small enough."""
    wide = normalized(x.double())
    try:
        values, vectors = torch.linalg.eigh(wide @ wide.mT)
    except LinAlgError:
        return x.clone(), torch.zeros(x.shape[:-2], dtype=torch.bool, device=x.device)
    allowed = max(ACCURACY, torch.finfo(x.dtype).eps)
    trusted = values[..., 0] * allowed > values[..., -1] * torch.finfo(torch.float64).eps
    root = (vectors * values.clamp(min=torch.finfo(torch.float64).tiny).rsqrt().unsqueeze(-2)) @ vectors.mT
    return (root @ wide).to(x.dtype), trusted


def _by_singular_values(x: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(normalized(x), full_matrices=False)
    kept = s > s.amax(dim=-1, keepdim=True) * max(x.shape[-2:]) * torch.finfo(x.dtype).eps
    return (u * kept.unsqueeze(-2)) @ vh
