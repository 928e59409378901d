"""Muon's relatives: the polar factor rescaled, signs before it, the dual norm's length, a low rank, a cosh after it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from normopt.directions import Chain, CoshScaled, EqualRows, Grafted, Identity, LowRank, Smoothed
from normopt.ingredient import check_choice, option
from normopt.momentum import EMA
from normopt.norms import Column, Euclidean, Max, Norm, Row, Spectral
from normopt.polar import PolarCoefficients
from normopt.rule import Rule
from normopt.stepsize import Constant, Sharp
from normopt.zoo.base import arg
from normopt.zoo.matrices import HALF_LR, FixedStepMatrixOptimizer, MatrixOptimizer

#: What MuonPlus normalizes after the polar factor, in order.
NORMALIZATIONS: dict[str, tuple[type[Norm], ...]] = {
    "none": (),
    "row": (Row,),
    "col": (Column,),
    "row_col": (Row, Column),
    "col_row": (Column, Row),
}

#: What ``aux_lr`` means for AuON.
TENTH_LR = "learning rate of AdamW for all other tensors; ``None``: ``lr / 10``."


class NorMuon(MatrixOptimizer):
    """:class:`Muon` whose rows are brought to one size over time: the polar factor, then the row norm with memory.

    ``u`` is Muon's average, ``o = polar(u)``; ``v``, one number for each row, averages the squares of ``o``'s rows;
    ``w <- (1 - lr weight_decay) w - lr sqrt(max(1, m/n)) o / (sqrt(v) + eps)``, rescaled to the Frobenius norm of ``o``
    (arXiv 2510.05491). Arguments and defaults are those of zichongli5/NorMuon; ``eps`` is added to the root of a sum of
    squares here, of a mean there.
    """

    aux_ratio = 0.5
    lr: float | Tensor = 0.02
    weight_decay: float = 0.0
    momentum: float = 0.95
    beta2: float = 0.95
    nesterov: bool = True
    ns_steps: int | None = None
    eps: float = arg(default=1e-10, doc="added to the roots of ``v``.")
    orthogonalize: str | PolarCoefficients = arg(default="newton-schulz", kw_only=True)
    orthogonalize_dtype: torch.dtype | str | None = arg(default="auto", kw_only=True)
    aux_lr: float | None = arg(default=None, doc=HALF_LR, kw_only=True)

    def rule(self) -> Rule:
        polar = Spectral("max1", self.orthogonalize, self.ns_steps, self.orthogonalize_dtype)
        rows = Smoothed(Row("unit"), option("beta2"), option("eps"), bias_correction=False)
        return Rule(Chain(polar, Grafted(rows, Identity())), EMA(option("momentum"), option("nesterov")))


class AdaMuon(FixedStepMatrixOptimizer):
    """Adam's denominator after the polar factor of a sign: ``polar(sign(u))``, then the max norm with memory.

    ``u`` is Muon's average, ``o = polar(sign(u))``; ``v <- momentum v + (1 - momentum) o^2``;
    ``w <- (1 - lr weight_decay) w - lr 0.2 d / rms(d)`` with ``d = o / (sqrt(v) + eps)`` (arXiv 2507.11005). Arguments
    and defaults are those of Chongjie-Si/AdaMuon.
    """

    lr: float | Tensor = 0.02
    weight_decay: float = 0.01
    momentum: float = arg(default=0.95, doc="decay rate of the averages of gradients and of ``o^2``.")
    nesterov: bool = True
    ns_steps: int | None = None
    eps: float = arg(default=1e-8, doc="added to the root of ``v``.")
    orthogonalize: str | PolarCoefficients = arg(default="newton-schulz", kw_only=True)
    orthogonalize_dtype: torch.dtype | str | None = arg(default="auto", kw_only=True)

    def rule(self) -> Rule:
        polar = Spectral("unit", self.orthogonalize, self.ns_steps, self.orthogonalize_dtype)
        adapted = Smoothed(Max(), option("momentum"), option("eps"), bias_correction=False)
        momentum = EMA(option("momentum"), option("nesterov"))
        return Rule(Chain(Max(), polar, adapted, Euclidean()), momentum, Constant(0.2))


class MuonPlus(MatrixOptimizer):
    """:class:`Muon` whose rows or columns are normalized after the polar factor (arXiv 2602.21545).

    ``w <- (1 - lr weight_decay) w - lr sqrt(m/n) normalize(polar(u))``, where ``u`` is Muon's average: the authors'
    sum of gradients has the same polar factor. The rows of a wide polar factor and the columns of a tall one have
    length 1 already, so that it is the other side that counts. Arguments and defaults are those of K1seki221/MuonPlus,
    where ``normalize`` is ``norm_mode`` (``"none"`` in the code, ``"row_col"`` in its documentation).
    """

    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int | None = None
    normalize: str = arg(
        default="row_col", doc='``"none"``, ``"row"``, ``"col"``, ``"row_col"`` (rows, then columns) or ``"col_row"``.'
    )
    orthogonalize: str | PolarCoefficients = arg(default="newton-schulz", kw_only=True)
    orthogonalize_dtype: torch.dtype | str | None = arg(default="auto", kw_only=True)

    def rule(self) -> Rule:
        check_choice(self, "normalize", self.normalize, NORMALIZATIONS)
        norms: list[Norm] = [Spectral("unit", self.orthogonalize, self.ns_steps, self.orthogonalize_dtype)]
        norms += [norm("unit") for norm in NORMALIZATIONS[self.normalize]]
        norms[-1] = replace(norms[-1], scale="ratio")
        return Rule(Chain(*norms), EMA(option("momentum"), option("nesterov")))


class PolarGrad(FixedStepMatrixOptimizer):
    """Steepest descent under the spectral norm, as long as the dual norm: nuclear norm times polar factor.

    ``m <- momentum m + (1 - momentum) g``; ``w <- (1 - lr weight_decay) w - lr ||m||_nuclear polar(m)``, where the
    nuclear norm is taken as ``<m, polar(m)>`` (arXiv 2505.21799). Arguments and defaults are those of
    timlautk/polargrad without ``polar_first``; its polar factor is a converged one, as here. Unlike Muon's, steps
    shrink with the gradient.
    """

    aux_ratio = 0.5
    lr: float | Tensor = 0.02
    weight_decay: float = 0.0
    momentum: float = 0.95
    orthogonalize: str | PolarCoefficients = arg(default="polar-express", kw_only=True)
    orthogonalize_dtype: torch.dtype | str | None = arg(default=None, kw_only=True)
    aux_lr: float | None = arg(default=None, doc=HALF_LR, kw_only=True)

    def rule(self) -> Rule:
        polar = Spectral("unit", self.orthogonalize, None, self.orthogonalize_dtype)
        return Rule(polar, EMA(option("momentum")), Sharp())


class Dion(MatrixOptimizer):
    """A low-rank :class:`Muon`, with a power iteration in place of the polar factor and error feedback.

    ``B = m + g``; ``P`` an orthonormal basis of ``B Q``, ``R = B^T P``, ``m <- B - (1 - mu) P R^T``; ``Q`` is ``R``
    with columns of length 1; ``w <- (1 - lr weight_decay) w - lr sqrt(m/n) P Q^T`` (arXiv 2504.05295), see
    :class:`~normopt.LowRank`. Arguments and defaults are those of microsoft/dion on one device.
    """

    lr: float | Tensor = 0.01
    mu: float = arg(default=0.95, doc="decay rate of what the low-rank part takes out of the momentum.")
    weight_decay: float = 0.01
    rank_fraction: float = arg(default=1.0, doc="rank of an update over the shorter side, in (0, 1].")

    def rule(self) -> Rule:
        return Rule(LowRank(self.rank_fraction, option("mu")))


class Aurora(MatrixOptimizer):
    """:class:`Muon` whose updates have equally long rows (of wide matrices: columns) and stay semi-orthogonal.

    ``w <- (1 - lr weight_decay) w - lr sqrt(max(1, m/n)) equal_rows(u)``, ``u`` Muon's average, see
    :class:`~normopt.EqualRows` (tilde-research/aurora-release, 2026). Square matrices move as Muon's. Momentum and
    decay are those of :class:`Muon` here, the rate is Keller Jordan's.
    """

    aux_ratio = 0.5
    lr: float | Tensor = 0.02
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    rounds: int = arg(default=2, doc="number of polar factors.")
    ns_steps: int | None = None
    orthogonalize: str | PolarCoefficients = arg(default="newton-schulz", kw_only=True)
    orthogonalize_dtype: torch.dtype | str | None = arg(default="auto", kw_only=True)
    aux_lr: float | None = arg(default=None, doc=HALF_LR, kw_only=True)

    def rule(self) -> Rule:
        polar = Spectral("max1", self.orthogonalize, self.ns_steps, self.orthogonalize_dtype)
        return Rule(EqualRows(polar, self.rounds), EMA(option("momentum"), option("nesterov")))


class AuON(MatrixOptimizer):
    """Averaged gradients over a brake that hardly brakes: :class:`~normopt.CoshScaled` (arXiv 2509.24320).

    ``u`` is Muon's average with Nesterov; ``w <- (1 - lr weight_decay) w - lr u / rms(cosh(gamma u / ||u||))``: up to a
    factor 1 + O(1/size), SGD with momentum. Arguments and defaults are those of ryyzn9/AuON at its head, whose updates
    are not normalized; in the paper's first version they are. AdamW beside it is that of the authors' training script.
    """

    aux_ratio = 0.1
    lr: float | Tensor = 0.24
    momentum: float = 0.95
    weight_decay: float = 0.0
    gamma: float = 1.5
    aux_betas: tuple[float, float] = arg(default=(0.8, 0.95), kw_only=True)
    aux_lr: float | None = arg(default=None, doc=TENTH_LR, kw_only=True)

    def rule(self) -> Rule:
        return Rule(CoshScaled(option("gamma")), EMA(option("momentum"), nesterov=True))


class HybridAuON(MatrixOptimizer):
    """:class:`AuON` after a polar factor: :class:`Muon` without a scale (arXiv 2509.24320).

    ``w <- (1 - lr weight_decay) w - lr o / rms(cosh(gamma o / ||o||))`` with ``o = polar(u)``, ``u`` Muon's average
    with Nesterov. Arguments and defaults are those of ryyzn9/AuON at its head, in float32 as there.
    """

    aux_ratio = 0.1
    lr: float | Tensor = 0.24
    momentum: float = 0.95
    weight_decay: float = 0.0
    gamma: float = 1.5
    ns_steps: int | None = None
    orthogonalize: str | PolarCoefficients = arg(default="newton-schulz", kw_only=True)
    orthogonalize_dtype: torch.dtype | str | None = arg(default=None, kw_only=True)
    aux_betas: tuple[float, float] = arg(default=(0.8, 0.95), kw_only=True)
    aux_lr: float | None = arg(default=None, doc=TENTH_LR, kw_only=True)

    def rule(self) -> Rule:
        polar = Spectral("unit", self.orthogonalize, self.ns_steps, self.orthogonalize_dtype)
        return Rule(Chain(polar, CoshScaled(option("gamma"))), EMA(option("momentum"), nesterov=True))
