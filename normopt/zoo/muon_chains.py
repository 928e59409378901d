"""The polar factor in a chain: after Adam's denominator or rows and columns of one size; before a sign or a length."""

from __future__ import annotations

import torch
from torch import Tensor

from normopt.directions import AdaScaled, Chain, Factored, Identity, Smoothed
from normopt.ingredient import check_choice, option
from normopt.momentum import EMA
from normopt.norms import Column, Direction, Max, Row, Spectral
from normopt.polar import PolarCoefficients
from normopt.rule import Rule
from normopt.stepsize import Constant
from normopt.zoo.base import arg, check_beta1
from normopt.zoo.matrices import HALF_LR, FixedStepMatrixOptimizer, MatrixOptimizer

#: What MuonEq does before the polar factor. ``Factored`` without memory divides by rows and columns at once.
EQUILIBRATIONS: dict[str, Direction] = {
    "row": Row("unit"),
    "column": Column("unit"),
    "both": Chain(Identity(), Factored(exponent=0.0, eps=0.0)),
}


class Muon2(MatrixOptimizer):
    """Adam's denominator, then the polar factor: :class:`Muon` of ``m / sqrt(v)`` (arXiv 2604.09967).

    ``m <- beta1 m + (1 - beta1) g``, ``v <- beta2 v + (1 - beta2) g^2``; ``w <- (1 - lr weight_decay) w - lr
    sqrt(out/in) polar(m / sqrt(v + eps))``. The first beta and the weight decay are those of
    :class:`Muon`, the rate is Keller Jordan's.
    """

    aux_ratio = 0.5
    lr: float | Tensor = 0.02
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.95, 0.95)
    eps: float = arg(default=1e-8, doc="added to ``v``.")
    ns_steps: int | None = None
    orthogonalize: str | PolarCoefficients = arg(default="newton-schulz", kw_only=True)
    orthogonalize_dtype: torch.dtype | str | None = arg(default="auto", kw_only=True)
    aux_lr: float | None = arg(default=None, doc=HALF_LR, kw_only=True)

    def rule(self) -> Rule:
        check_beta1(self, self.betas)
        adam = Smoothed(Max(), option("betas", 1), option("eps"), bias_correction=False, eps_at="moment")
        polar = Spectral("rms", self.orthogonalize, self.ns_steps, self.orthogonalize_dtype)
        return Rule(Chain(adam, polar), EMA(option("betas", 0)))


class OLion(FixedStepMatrixOptimizer):
    """The sign of a polar factor: ``w <- (1 - lr weight_decay) w - lr 0.2 sign(polar(u))`` (arXiv 2602.01105).

    ``m <- momentum_2 m + (1 - momentum_2) g``, ``u = momentum m + (1 - momentum) g`` with Nesterov, else ``m``.
    Arguments and defaults are those of kv-wang/OLion, whose code at its head takes the sign of ``u`` itself; the polar
    factor before it is the paper's.
    """

    lr: float | Tensor = 0.02
    weight_decay: float = 0.01
    momentum: float = arg(default=0.95, doc="weight of ``m`` in ``u``.")
    momentum_2: float = arg(default=0.98, doc="decay rate of ``m``.")
    nesterov: bool = True
    ns_steps: int | None = None
    orthogonalize: str | PolarCoefficients = arg(default="newton-schulz", kw_only=True)
    orthogonalize_dtype: torch.dtype | str | None = arg(default="auto", kw_only=True)

    def rule(self) -> Rule:
        polar = Spectral("unit", self.orthogonalize, self.ns_steps, self.orthogonalize_dtype)
        average = EMA(option("momentum_2"), self.nesterov and option("momentum"))
        return Rule(Chain(polar, Max()), average, Constant(0.2))


class MuonEq(MatrixOptimizer):
    """:class:`Muon` of a matrix whose rows, columns or both have been given one size (arXiv 2603.28254).

    ``u`` is Muon's average; ``w <- (1 - lr weight_decay) w - lr 0.2 sqrt(max(out, in)) polar(D_r^(-1/2) u D_c^(-1/2))``
    with the row sums ``D_r`` and column sums ``D_c`` of ``u^2``, of which ``"row"`` and ``"column"`` take one. The
    paper's momentum and rate change with the step number; here they are numbers, whose defaults are Muon's.
    """

    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int | None = None
    equilibrate: str = arg(default="row", doc='``"row"``, ``"column"`` or ``"both"``, at once.')
    orthogonalize: str | PolarCoefficients = arg(default="newton-schulz", kw_only=True)
    orthogonalize_dtype: torch.dtype | str | None = arg(default="auto", kw_only=True)

    def rule(self) -> Rule:
        check_choice(self, "equilibrate", self.equilibrate, EQUILIBRATIONS)
        polar = Spectral("adamw", self.orthogonalize, self.ns_steps, self.orthogonalize_dtype)
        return Rule(Chain(EQUILIBRATIONS[self.equilibrate], polar), EMA(option("momentum"), option("nesterov")))


class RMNP(MatrixOptimizer):
    """:class:`Muon` with rows of length 1 in place of the polar factor (arXiv 2603.20527).

    ``m <- momentum m + (1 - momentum) g``; each row ``w_i <- (1 - lr weight_decay) w_i - lr m_i / ||m_i||``: the
    largest row's norm. :class:`RowDescent` differs in its scale, and by no AdamW beside it.
    """

    aux_ratio = 0.5
    lr: float | Tensor = 0.02
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = False
    aux_lr: float | None = arg(default=None, doc=HALF_LR, kw_only=True)

    def rule(self) -> Rule:
        return Rule(Row("unit"), EMA(option("momentum"), option("nesterov")))


class AdaGO(MatrixOptimizer):
    """The polar factor at AdaGrad's length, one number for each matrix (arXiv 2509.02981).

    ``m <- momentum m + (1 - momentum) g``; ``v^2 <- v^2 + min(||g||_F, gamma)^2``; ``w <- (1 - lr weight_decay) w -
    max(eps, lr min(||g||_F, gamma) / v) polar(m)``. Arguments and defaults but ``v`` are those of pytorch-optimizer,
    which divides by ``v^2``.
    """

    aux_ratio = 0.5
    lr: float | Tensor = 0.05
    weight_decay: float = 0.0
    momentum: float = 0.95
    nesterov: bool = False
    gamma: float = arg(default=10.0, doc="the largest length of a gradient.")
    eps: float = arg(default=5e-4, doc="the smallest length of a step, in the spectral norm.")
    v: float = arg(default=1e-3, doc="``v`` before the first step.")
    orthogonalize: str | PolarCoefficients = arg(default="newton-schulz", kw_only=True)
    orthogonalize_dtype: torch.dtype | str | None = arg(default="auto", kw_only=True)
    aux_lr: float | None = arg(default=None, doc=HALF_LR, kw_only=True)

    def rule(self) -> Rule:
        polar = Spectral("unit", self.orthogonalize, None, self.orthogonalize_dtype)
        length = AdaScaled(self.gamma, self.eps, self.v)
        return Rule(Chain(polar, length), EMA(option("momentum"), option("nesterov")))
