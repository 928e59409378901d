"""Norms that do not depend on how the entries are arranged: the largest entry, and the Euclidean norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normopt.ingredient.traits import trait
from normopt.norms.base import SCALES, Norm
from normopt.numerics.lengths import axes, clip_norm, euclidean, normalize


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
