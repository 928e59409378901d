"""Optimizers that change the singular values of an update: a power of them, the leading ones alone, or a cut."""

from __future__ import annotations

from torch import Tensor

from normopt.directions import Chain, Clipped, Smoothed
from normopt.ingredient import check_positive, check_range, option
from normopt.momentum import EMA
from normopt.norms import DualKyFan, Max, Schatten, Spectral
from normopt.norms.base import Scale
from normopt.rule import Rule
from normopt.zoo.base import arg
from normopt.zoo.matrices import HALF_LR, MatrixOptimizer


class HTMuon(MatrixOptimizer):
    """:class:`Muon` that keeps a power of the singular values: the Schatten norm with ``p = 1 + 1 / power``.

    ``m <- momentum m + (1 - momentum) g = U S V^T``; ``w <- (1 - lr weight_decay) w - lr scale U S^power V^T / c``,
    ``scale = sqrt(max(1, out / in))`` (arXiv 2603.10067). The divisor ``c``, which gives all updates Schatten norm 1,
    is 1 in the paper, where updates shrink with the gradient to the power ``power``. Power 0 would be Muon.
    """

    aux_ratio = 0.5
    lr: float | Tensor = 0.02
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = False
    power: float = arg(default=0.125, doc="exponent of the singular values, in (0, 1].")
    aux_lr: float | None = arg(default=None, doc=HALF_LR, kw_only=True)

    def rule(self) -> Rule:
        check_positive(self, "power", self.power)
        check_range(self, "power", self.power, 0, 1, closed=True)
        return Rule(Schatten(1 + 1 / self.power, scale="max1"), EMA(option("momentum"), option("nesterov")))


class NuMuon(MatrixOptimizer):
    """:class:`Muon` with the leading singular pairs alone, for weights of low rank (arXiv 2603.03597).

    ``m <- momentum m + (1 - momentum) g``; ``w <- (1 - lr weight_decay) w - lr scale U_k V_k^T`` with the ``k =
    ceil(rank_fraction min(out, in))`` leading singular pairs of ``m``: the dual of the Ky Fan norm. Change
    ``rank_fraction`` in the param groups to schedule it. Singular pairs are exact here, by randomized block Krylov
    iterations in the paper. Fraction 1 is Muon, one pair :class:`NuclearDescent`.
    """

    aux_ratio = 0.5
    lr: float | Tensor = 0.02
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = False
    rank_fraction: float = arg(default=0.25, doc="``k`` over the shorter side, in (0, 1].")
    scale: Scale = arg(default="unit", doc="see :class:`~normopt.norms.Norm`.", kw_only=True)
    aux_lr: float | None = arg(default=None, doc=HALF_LR, kw_only=True)

    def rule(self) -> Rule:
        leading = DualKyFan(rank_fraction=option("rank_fraction"), scale=self.scale)
        return Rule(leading, EMA(option("momentum"), option("nesterov")))


class SPECTRA(MatrixOptimizer):
    """:class:`AdamW` whose updates have no singular value above ``clip`` (spectral clipping, arXiv 2603.14315).

    ``w <- (1 - lr weight_decay) w - lr U min(S, clip) V^T``, where ``U S V^T`` is Adam's ``m / (sqrt(v) + eps)``.
    The cut is exact, by a singular value decomposition; in the paper it is a soft one by Newton-Schulz iterations,
    ``(1 + S^2 / clip^2)^(-1/2) S``. A random sign matrix has the largest singular value ``sqrt(out) + sqrt(in)``.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = arg(default=10.0, doc="the largest singular value of an update over ``lr``, positive.")

    def rule(self) -> Rule:
        adam = Smoothed(Max(), option("betas", 1), option("eps"))
        clipped = Chain(adam, Clipped(Spectral("unit"), option("clip")))
        return Rule(clipped, EMA(option("betas", 0), bias_correction=True))
