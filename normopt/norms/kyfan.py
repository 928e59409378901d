"""The sum of the k largest singular values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from normopt.ingredient.validate import check_count
from normopt.norms.base import Scale
from normopt.norms.schatten import UnitarilyInvariant, gaussian_
from normopt.numerics.singular import map_singular_values, map_spectrum, simplex_shift, singular_values

#: Bisection steps that reach the last bit of float64.
BISECTIONS = 60


@dataclass(frozen=True)
class KyFan(UnitarilyInvariant):
    """The sum of the ``k`` largest singular values: spectral for k = 1, nuclear for k = min(out, in) and above.

    Dual norm: ``max(s_1, sum(s) / k)``. Duality map, by a singular value decomposition: the polar factor over k,
    ``U V^T / k``, where ``sum(s) / k`` is the larger of the two, else the leading pair ``u_1 v_1^T``; it is not
    continuous between the two cases. ``project`` is exact, by bisection. No second moment. Scale ``"rms"``:
    sqrt(out/in).

    Args:
        k: the number of singular values, 1 or more.
        scale: see :class:`~normopt.norms.Norm`; by keyword.
    """

    scale: Scale = field(default="rms", kw_only=True)
    k: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "k", self.k)

    def unit_norm(self, w: Tensor) -> Tensor:
        return singular_values(w)[..., : self.k].sum(dim=-1)

    def unit_dual_norm(self, g: Tensor) -> Tensor:
        s = singular_values(g)
        total = s.sum(dim=-1)
        return torch.maximum(s[..., 0], total / self.k) if g.numel() else total

    def unit_dualize(self, g: Tensor) -> Tensor:
        return map_spectrum(g, self._dual_values)

    def _dual_values(self, s: Tensor) -> Tensor:
        kept = (s > 0).to(s.dtype)
        leading = torch.nn.functional.pad(kept[..., :1], (0, s.shape[-1] - 1))
        return torch.where(s.sum(dim=-1, keepdim=True) >= self.k * s[..., :1], kept / self.k, leading)

    def unit_project(self, w: Tensor, radius: float) -> Tensor:
        return map_singular_values(w, lambda s: _project(s, min(self.k, s.shape[-1]), radius))

    def unit_update_rms(self, m: int, n: int) -> float:
        """Known where the duality map has rank one whatever the gradient, and for k = 1."""
        rank = min(m, n) if self.k == 1 else 1 if self.k >= min(m, n) else math.nan
        return math.sqrt(rank / max(m * n, 1))

    def initialize_(self, w: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Fill ``w`` with a Gaussian matrix over its norm (the duality map could have rank one). Returns ``w``."""
        return gaussian_(w, self, generator)


def _project(s: Tensor, k: int, radius: float) -> Tensor:
    """The point nearest to ``s >= 0``, in descending order, whose k largest entries have a sum of at most ``radius``.

    It is ``min(s, max(level, s - shift))``: entries far above a level are reduced by the shift, entries just above it
    to the level. The stationarity of the distance, ``sum min((s - level)+, shift) = k shift``, gives the shift of a
    level, and the level is found by bisection; where it is 0, the k largest are projected alone.
    """

    def shift_of(level: Tensor) -> Tensor:
        above = (s - level).clamp_(min=0)
        tails = above.flip(-1).cumsum(dim=-1).flip(-1)[..., :k]
        return (tails / torch.arange(k, 0, -1, dtype=s.dtype, device=s.device)).amin(dim=-1, keepdim=True)

    top = s[..., :k]
    low, high = torch.zeros_like(top[..., -1:]), top[..., -1:]
    for _ in range(BISECTIONS):
        level = (low + high) / 2
        fits = torch.maximum(top - shift_of(level), level).sum(dim=-1, keepdim=True) <= radius
        low, high = torch.where(fits, level, low), torch.where(fits, high, level)
    shift = torch.maximum(shift_of(low), simplex_shift(top, radius))
    nearest = torch.minimum(torch.maximum(s - shift, low), s)
    return torch.where(top.sum(dim=-1, keepdim=True) <= radius, s, nearest)
