"""One norm, with momentum and decoupled weight decay and nothing else."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from normopt.constraints import WeightDecay
from normopt.ingredient import option
from normopt.momentum import EMA
from normopt.norms import Column, Euclidean, Max, Norm, Nuclear, Row, Spectral
from normopt.norms.base import Scale
from normopt.polar import PolarCoefficients
from normopt.roles.options import Geometry
from normopt.rule import Rule
from normopt.zoo.base import DeclaredOptimizer, arg


class NormDescent(DeclaredOptimizer):
    """``m <- momentum m + (1 - momentum) g``; ``w <- (1 - lr weight_decay) w - lr dualize(m)``."""

    _abstract: ClassVar[bool] = True

    lr: float | Tensor = arg(default=1e-3, doc="learning rate: the norm of an update.")
    momentum: float = 0.9
    weight_decay: float = 0.0
    scale: Scale = arg(default="rms", kw_only=True)

    def table(self) -> Geometry:
        """Given a whole model, all matrices move by the norm, vectors and scalars by signs and without decay."""
        sign = {"norm": Max(), "weight_decay": 0.0}
        return {"vector": sign, "scalar": sign}

    def norm(self) -> Norm:
        """Whose duality map."""
        raise NotImplementedError

    def rule(self) -> Rule:
        return Rule(self.norm(), EMA(option("momentum")), constraint=(WeightDecay(option("weight_decay")),))


class NormalizedSGD(NormDescent):
    """Gradient descent with steps of one length: the Euclidean norm (Hazan et al., arXiv 1507.02030).

    ``m <- momentum m + (1 - momentum) g``; ``w <- (1 - lr weight_decay) w - lr m / ||m||`` for each tensor.
    """

    scale: Scale = arg(
        default="unit",
        doc='with ``"rms"``, updates have a root mean square of ``lr``. See :class:`~normopt.norms.Norm`.',
        kw_only=True,
    )

    def norm(self) -> Norm:
        return Euclidean(self.scale)


class SpectralDescent(NormDescent):
    """Steps along the polar factor: the spectral norm (Carlson et al. 2015; Bernstein & Newhouse, arXiv 2409.20325).

    ``m <- momentum m + (1 - momentum) g``; ``w <- (1 - lr weight_decay) w - lr scale polar(m)``. :class:`Muon` differs
    in Nesterov momentum, a cheaper polar factor, and AdamW beside it.
    """

    orthogonalize: str | PolarCoefficients = arg(default="auto", kw_only=True)
    orthogonalize_dtype: torch.dtype | str | None = arg(default=None, kw_only=True)

    def norm(self) -> Norm:
        return Spectral(self.scale, self.orthogonalize, None, self.orthogonalize_dtype)


class ColumnDescent(NormDescent):
    """Every column, one input, moves equally far: the largest column's norm (arXiv 2409.20325).

    ``m <- momentum m + (1 - momentum) g``; each column ``w_j <- (1 - lr weight_decay) w_j - lr scale m_j / ||m_j||``.
    """

    def norm(self) -> Norm:
        return Column(self.scale)


class RowDescent(NormDescent):
    """Every row, one output, moves equally far: the largest row's norm (arXiv 2409.20325).

    ``m <- momentum m + (1 - momentum) g``; each row ``w_i <- (1 - lr weight_decay) w_i - lr scale m_i / ||m_i||``.
    """

    def norm(self) -> Norm:
        return Row(self.scale)


class NuclearDescent(NormDescent):
    """Steps of rank one: the nuclear norm.

    ``m <- momentum m + (1 - momentum) g``; ``w <- (1 - lr weight_decay) w - lr scale u v^T``, with ``u``, ``v`` the
    leading singular vectors of ``m``.
    """

    def norm(self) -> Norm:
        return Nuclear(self.scale)
