"""The sum of the k largest singular values, and the dual of that norm."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from normopt.ingredient.validate import check_count, check_positive, check_range
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


@dataclass(frozen=True)
class DualKyFan(UnitarilyInvariant):
    """The dual of :class:`KyFan`, ``max(s_1, sum(s) / k)``: nuclear for k = 1, spectral for k = min(out, in) and above.

    Dual norm: the sum of the ``k`` largest singular values. Duality map: ``U_k V_k^T``, the polar factor of the ``k``
    leading singular pairs, by a singular value decomposition (NuMuon, arXiv 2603.03597). ``project`` is exact, by
    bisection. No second moment. Scale ``"rms"``: sqrt(out/in).

    Args:
        k: the number of singular values, 1 or more; 2 where neither ``k`` nor ``rank_fraction`` is given.
        rank_fraction: ``k`` over the shorter side, in (0, 1], rounded up, in place of ``k``.
        scale: see :class:`~normopt.norms.Norm`; by keyword.
    """

    scale: Scale = field(default="rms", kw_only=True)
    k: int | None = None
    rank_fraction: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k is not None and self.rank_fraction is not None:
            raise ValueError(
                f"DualKyFan: k and rank_fraction are two ways to say one number, "
                f"got k={self.k!r} and rank_fraction={self.rank_fraction!r}; give one of them"
            )
        if self.k is not None:
            check_count(self, "k", self.k)
        if self.rank_fraction is not None:
            check_positive(self, "rank_fraction", self.rank_fraction)
            check_range(self, "rank_fraction", self.rank_fraction, 0, 1, closed=True)

    def count(self, m: int, n: int) -> int:
        """``k`` for an (m x n) matrix."""
        if self.rank_fraction is None:
            return 2 if self.k is None else self.k
        part = self.rank_fraction * min(m, n)
        return max(1, math.ceil(part - 1e-9 * part))

    def unit_norm(self, w: Tensor) -> Tensor:
        s = singular_values(w)
        total = s.sum(dim=-1)
        return torch.maximum(s[..., 0], total / self.count(*w.shape[-2:])) if w.numel() else total

    def unit_dual_norm(self, g: Tensor) -> Tensor:
        return singular_values(g)[..., : self.count(*g.shape[-2:])].sum(dim=-1)

    def unit_dualize(self, g: Tensor) -> Tensor:
        k = self.count(*g.shape[-2:])
        return map_spectrum(g, lambda s: (s > 0) & (torch.arange(s.shape[-1], device=s.device) < k))

    def unit_project(self, w: Tensor, radius: float) -> Tensor:
        k = self.count(*w.shape[-2:])
        return map_singular_values(w, lambda s: _project_dual(s, k * radius, radius))

    def unit_update_rms(self, m: int, n: int) -> float:
        return math.sqrt(min(self.count(m, n), m, n) / max(m * n, 1))

    def initialize_(self, w: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Fill ``w`` with a Gaussian matrix over its norm (the duality map would have rank k). Returns ``w``."""
        return gaussian_(w, self, generator)


def _project_dual(s: Tensor, total: float, largest: float) -> Tensor:
    """The point nearest to ``s >= 0`` whose entries are at most ``largest`` and have a sum of at most ``total``.

    It is ``clamp(s - shift, 0, largest)``, whose sum falls as the shift grows.
    """
    low, high = torch.zeros_like(s[..., :1]), s[..., :1]
    fits = s.clamp(max=largest).sum(dim=-1, keepdim=True) <= total
    for _ in range(BISECTIONS):
        shift = (low + high) / 2
        enough = (s - shift).clamp(0, largest).sum(dim=-1, keepdim=True) <= total
        low, high = torch.where(enough, low, shift), torch.where(enough, shift, high)
    return (s - torch.where(fits, 0.0, high)).clamp(0, largest)


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
