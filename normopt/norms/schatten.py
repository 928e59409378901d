"""Norms of the singular values: their common base, the nuclear norm (the sum) and the Schatten norms."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from normopt.ingredient.validate import check_range
from normopt.norms.base import Norm, Scale
from normopt.numerics.lengths import normalized
from normopt.numerics.singular import (
    _power_norm,
    _project_power,
    map_singular_values,
    map_spectrum,
    simplex_shift,
    singular_values,
)


@dataclass(frozen=True)
class UnitarilyInvariant(Norm):
    """A norm of the singular values, which orthonormal changes of basis of rows and of columns leave as it is."""

    _abstract = True
    rotation_invariant = True
    reduces = "matrix"
    decides_on_host = True

    def unit_rms(self, m: int, n: int) -> float:
        """sqrt(out/in), the RMS -> RMS norm."""
        return math.sqrt(m / max(n, 1))


@torch.no_grad()
def gaussian_(w: Tensor, norm: Norm, generator: torch.Generator | None = None) -> Tensor:
    """Fill ``w`` with a Gaussian matrix divided by its norm, of full rank. Returns ``w``."""
    noise = torch.empty_like(w, dtype=torch.promote_types(w.dtype, torch.float32)).normal_(generator=generator)
    return w.copy_(noise / norm.norm(noise)[..., None, None]) if w.numel() else w


@dataclass(frozen=True)
class Nuclear(UnitarilyInvariant):
    """The sum of the singular values, the dual of the spectral norm.

    Dual norm: the largest singular value. Duality map: ``u_1 v_1^T``, the leading singular pair, from a singular value
    decomposition. No second moment. Scale ``"rms"``: sqrt(out/in).
    """

    def unit_norm(self, w: Tensor) -> Tensor:
        return singular_values(w).sum(dim=-1)

    def unit_dual_norm(self, g: Tensor) -> Tensor:
        return singular_values(g).amax(dim=-1) if g.numel() else g.sum(dim=(-2, -1))

    def unit_dualize(self, g: Tensor) -> Tensor:
        if g.numel() == 0:
            return g.clone()
        u, s, vh = torch.linalg.svd(normalized(g), full_matrices=False)
        return (u[..., :1] @ vh[..., :1, :] * (s[..., :1, None] > 0)).to(g.dtype)

    def unit_project(self, w: Tensor, radius: float) -> Tensor:
        return map_singular_values(w, lambda s: (s - simplex_shift(s, radius)).clamp_(min=0))

    def unit_update_rms(self, m: int, n: int) -> float:
        return 1.0 / math.sqrt(max(m * n, 1))

    def initialize_(self, w: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Fill ``w`` with a Gaussian matrix over its norm (the duality map would have rank one). Returns ``w``."""
        return gaussian_(w, self, generator)


@dataclass(frozen=True)
class Schatten(UnitarilyInvariant):
    """The l_p norm of the singular values, ``(sum s_i^p)^(1/p)``: p = 1 nuclear, 2 Frobenius, ``inf`` spectral.

    Dual norm: Schatten-q, ``1/p + 1/q = 1``. Duality map: ``U diag(s^(q-1)) V^T / ||s||_q^(q-1)``, by a singular value
    decomposition: the larger ``p``, the flatter the result's spectrum. Singular values that may be rounding errors, up
    to max(out, in) times the dtype's epsilon times the largest, count as 0. ``project`` is exact, by iteration. No
    second moment. Scale ``"rms"``: sqrt(out/in), as for the spectral norm (``Euclidean``'s is the RMS of the entries).

    Args:
        p: from 1 to ``inf``. At 1, the duality map averages the singular pairs whose singular values are exactly equal
            to the largest.
        scale: see :class:`~normopt.norms.Norm`; by keyword.
    """

    scale: Scale = field(default="rms", kw_only=True)
    p: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "p", self.p, 1, math.inf, closed=True)

    @property
    def q(self) -> float:
        """The exponent of the dual norm, ``p / (p - 1)``."""
        return 1.0 if self.p == math.inf else math.inf if self.p == 1 else self.p / (self.p - 1)

    def unit_norm(self, w: Tensor) -> Tensor:
        return _power_norm(singular_values(w), self.p)

    def unit_dual_norm(self, g: Tensor) -> Tensor:
        return _power_norm(singular_values(g), self.q)

    def unit_dualize(self, g: Tensor) -> Tensor:
        return map_spectrum(g, self._dual_values)

    def _dual_values(self, s: Tensor) -> Tensor:
        powers = s ** (self.q - 1) * (s > 0)
        total = (powers * s).sum(dim=-1, keepdim=True)
        return powers / torch.where(total == 0, 1.0, total) ** (1 / self.p)

    def unit_project(self, w: Tensor, radius: float) -> Tensor:
        return map_singular_values(w, lambda s: _project_power(s, self.p, radius))

    def unit_update_rms(self, m: int, n: int) -> float:
        """Known for ``p`` = 1, 2 and ``inf``; otherwise it depends on the gradient's spectrum."""
        rank = {1.0: 1, 2.0: 1, math.inf: min(m, n)}.get(self.p, math.nan)
        return math.sqrt(rank / max(m * n, 1))
