"""Norms that do not depend on how the entries are arranged: the largest entry, the Euclidean norm, l_p norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from normopt.ingredient.traits import trait
from normopt.ingredient.validate import check_range
from normopt.norms.base import SCALES, Norm, Scale
from normopt.numerics.lengths import axes, clip_norm, euclidean, normalize
from normopt.numerics.singular import _power_norm, _project_power


@dataclass(frozen=True)
class Max(Norm):
    """The largest entry, ``max |w_ij|``: the l1 -> linf operator norm (Bernstein & Newhouse, Prop. 2 and 3).

    Dual norm: ``sum |g_ij|``. Duality map: ``sign(g)`` (signSGD). Second moment: ``g^2``, so that ``Smoothed(Max())``
    divides by Adam's denominator. Scale ``"rms"``: 1.
    """

    needs_matrix = False

    @trait
    def reduces(self) -> str:
        """``"entry"``; ``"all"`` if the scale depends on the shape, which tensors laid end to end do not have."""
        return "all" if self.scale in SCALES and self.scale != "unit" else "entry"

    def unit_rms(self, m: int, n: int) -> float:
        return 1.0

    def unit_norm(self, w: Tensor) -> Tensor:
        w = w.to(torch.promote_types(w.dtype, torch.float32))
        return w.abs().amax(dim=axes(w)) if w.numel() else w.abs().sum(dim=axes(w))

    def unit_dual_norm(self, g: Tensor) -> Tensor:
        return g.abs().sum(dim=axes(g), dtype=torch.promote_types(g.dtype, torch.float32))

    def unit_dualize(self, g: Tensor) -> Tensor:
        return g.sign()

    def unit_project(self, w: Tensor, radius: float) -> Tensor:
        return w.clamp(-radius, radius)

    def unit_update_rms(self, m: int, n: int) -> float:
        return 1.0

    def second_moment(self, g: Tensor) -> tuple[Tensor, ...]:
        """``g^2``, of the shape of ``g``."""
        return (g.square(),)

    def remember_(self, stats: Sequence[Tensor], g: Tensor, keep: float, add: float) -> None:
        stats[0].mul_(keep).addcmul_(g, g, value=add)


@dataclass(frozen=True)
class Euclidean(Norm):
    """The Frobenius norm ``sqrt(sum w_ij^2)``, its own dual (Schatten-2).

    Duality map: ``g / ||g||``. Second moment: ``sum g_ij^2``, one number for each matrix (NovoGrad's). Scale ``"rms"``:
    sqrt(numel), the root-mean-square norm.
    """

    needs_matrix = False
    rotation_invariant = True
    reduces = "all"

    def unit_rms(self, m: int, n: int) -> float:
        return math.sqrt(m * n)

    def unit_norm(self, w: Tensor) -> Tensor:
        return euclidean(w, axes(w))

    def unit_dual_norm(self, g: Tensor) -> Tensor:
        return euclidean(g, axes(g))

    def unit_dualize(self, g: Tensor) -> Tensor:
        return normalize(g, axes(g))

    def unit_project(self, w: Tensor, radius: float) -> Tensor:
        return clip_norm(w, axes(w), radius)

    def unit_update_rms(self, m: int, n: int) -> float:
        return 1.0 / math.sqrt(max(m * n, 1))

    def second_moment(self, g: Tensor) -> tuple[Tensor, ...]:
        """``sum g^2`` of each matrix, shape ``(..., 1, 1)``."""
        return (torch.sum(g.square(), dim=axes(g), keepdim=True),)


@dataclass(frozen=True)
class Lp(Norm):
    """The l_p norm of the entries, ``(sum |w_ij|^p)^(1/p)``: 2 Euclidean, ``inf`` the largest entry.

    Dual norm: l_q, ``1/p + 1/q = 1``. Duality map: ``sign(g) |g|^(q-1) / ||g||_q^(q-1)``, a power of every entry
    (PowerStep, arXiv 2605.10335, up to its length); at p = 1, entries that are exactly equal to the largest share it.
    ``project`` is exact, by iteration. No second moment. Scale ``"rms"``: numel^(1/p), which takes means in place of
    sums. :class:`~normopt.Schatten` is the same of the singular values.

    Args:
        p: from 1 to ``inf``.
        scale: see :class:`~normopt.norms.Norm`; by keyword.
    """

    scale: Scale = field(default="rms", kw_only=True)
    needs_matrix = False
    reduces = "all"
    p: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "p", self.p, 1, math.inf, closed=True)

    @trait
    def rotation_invariant(self) -> bool:
        """Only the Euclidean norm is, ``p = 2``."""
        return self.p == 2

    @property
    def q(self) -> float:
        """The exponent of the dual norm, ``p / (p - 1)``."""
        return 1.0 if self.p == math.inf else math.inf if self.p == 1 else self.p / (self.p - 1)

    def unit_rms(self, m: int, n: int) -> float:
        return float(m * n) ** (1 / self.p)

    def unit_norm(self, w: Tensor) -> Tensor:
        return _power_norm(_descending(w)[0], self.p)

    def unit_dual_norm(self, g: Tensor) -> Tensor:
        return _power_norm(_descending(g)[0], self.q)

    def unit_dualize(self, g: Tensor) -> Tensor:
        size = g.abs().to(torch.promote_types(g.dtype, torch.float32))
        largest = size.amax(dim=axes(g), keepdim=True) if g.numel() else size
        size = size / torch.where(largest == 0, 1.0, largest)
        powers = size ** (self.q - 1) * (size > 0)
        total = torch.sum(powers * size, dim=axes(g), keepdim=True)
        return (powers / torch.where(total == 0, 1.0, total) ** (1 / self.p) * g.sign()).to(g.dtype)

    def unit_project(self, w: Tensor, radius: float) -> Tensor:
        s, order = _descending(w)
        near = torch.empty_like(s).scatter_(-1, order, _project_power(s, self.p, radius)) if w.numel() else s
        return (near.reshape(w.shape) * w.sign()).to(w.dtype)

    def unit_update_rms(self, m: int, n: int) -> float:
        """Known for ``p`` = 1, 2 and ``inf``; otherwise it depends on the gradient's entries."""
        size = max(m * n, 1)
        return {1.0: 1 / math.sqrt(size), 2.0: 1 / math.sqrt(size), math.inf: 1.0}.get(self.p, math.nan)


def _descending(x: Tensor) -> tuple[Tensor, Tensor]:
    """The sizes of all entries of each matrix in descending order, in float32 or better, and where they come from."""
    flat = x.flatten(-2) if x.ndim > 1 else x.reshape(-1)
    return flat.abs().to(torch.promote_types(x.dtype, torch.float32)).sort(dim=-1, descending=True)
