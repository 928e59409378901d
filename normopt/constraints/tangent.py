"""AdamP's projection of updates to the tangent space."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from normopt.constraints.base import Constraint
from normopt.ingredient.stage import Context, Rate
from normopt.ingredient.validate import check_range


@dataclass(frozen=True)
class TangentProjection(Constraint):
    """AdamP's projection: the part along the weights is removed from updates of scale-invariant weights.

    Scale-invariant weights (before a normalization) are orthogonal to their gradients, and grow with every step. If all
    rows are orthogonal to their gradients, ``|cos| < delta / sqrt(in)``, the part along the row of weights is removed
    from each row of the update; otherwise, if the matrix as a whole is, ``|cos| < delta / sqrt(out in)``, the part
    along the matrix; otherwise nothing. Vectors and scalars are left alone. It includes weight decay, ``rate *
    weight_decay / (1 - momentum)``, multiplied by ``wd_ratio`` where there was a projection (Heo et al., arXiv
    2006.08217).

    Args:
        delta: threshold of ``|cos|``, relative to the cosine of random vectors.
        eps: smallest length of a row or matrix to divide by.
        wd_ratio: factor of the decay of projected matrices.
        weight_decay: decoupled weight decay, not negative.
        momentum: coefficient of a heavy ball, whose steps are ``1 / (1 - momentum)`` times as long, as is the decay.

    Raises:
        ValueError: a number out of range; or it stands beside a constraint that needs steps of bounded length
            (:class:`~normopt.FrankWolfe`, :class:`~normopt.SoftSpectralCap`): a projection can lengthen an update in
            norms that are not Euclidean.
    """

    lengthens = True
    delta: float = 0.1
    eps: float = 1e-8
    wd_ratio: float = 0.1
    weight_decay: float = 0.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        for name in ("delta", "eps", "wd_ratio", "weight_decay"):
            check_range(self, name, getattr(self, name), 0, float("inf"))
        check_range(self, "momentum", self.momentum, 0, 1)

    def update(self, d: Tensor, context: Context) -> tuple[Tensor, Rate]:
        ratio: Rate = 1.0
        if not context.is_vector and d.numel():
            w, g = context.w, context.raw
            along, size, slope = _dot(w, g), *(torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (w, g))
            size_of_all, slope_of_all = (torch.linalg.vector_norm(x, dim=-2, keepdim=True) for x in (size, slope))
            rows = self._at_right_angles(along, size, slope, w.shape[-1])
            whole = self._at_right_angles(_total(along), size_of_all, slope_of_all, w.shape[-1] * w.shape[-2])
            way = _dot(w, d)
            of_all = torch.where(whole, _total(way) / (size_of_all + self.eps) ** 2, 0.0)
            d = d.addcmul(w, torch.where(rows, way / (size + self.eps) ** 2, of_all), value=-1)
            ratio = torch.where(rows | whole, self.wd_ratio, 1.0).to(w.dtype)
        if not self.weight_decay:
            return d, 1.0
        decay = context.rate * self.weight_decay / (1 - self.momentum)
        return d, 1 - decay * ratio

    def _at_right_angles(self, products: Tensor, sizes: Tensor, slopes: Tensor, entries: int) -> Tensor:
        """Whether all pairs of vectors are orthogonal, from their products and lengths; shape ``(..., 1, 1)``."""
        cosines = products / sizes.clamp(min=self.eps) / slopes.clamp(min=self.eps)
        return cosines.abs().amax(dim=-2, keepdim=True) < self.delta / math.sqrt(entries)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner products of rows, shape ``(..., out, 1)``."""
    return torch.linalg.vecdot(a, b).unsqueeze(-1)


def _total(x: Tensor) -> Tensor:
    """The sum over rows, shape ``(..., 1, in)``."""
    return x.sum(dim=-2, keepdim=True)
