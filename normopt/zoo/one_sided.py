"""Adam in a basis of one side: of the momentum (MOSO), or of the leading subspace beside a polar factor (COSMOS)."""

from __future__ import annotations

import torch
from torch import Tensor

from normopt.directions import Chain, Eigenbasis, Identity, LeadingSubspace, Rotated, Smoothed
from normopt.ingredient import option
from normopt.momentum import EMA
from normopt.norms import Euclidean, Max, Spectral
from normopt.polar import PolarCoefficients
from normopt.rule import Rule
from normopt.stepsize import Constant
from normopt.zoo.base import arg
from normopt.zoo.matrices import FixedStepMatrixOptimizer, MatrixOptimizer


class MOSO(MatrixOptimizer):
    """RMSprop of the momentum in the momentum's eigenbasis, of the smaller side: one-sided SOAP of averages.

    ``m <- momentum m + (1 - momentum) g``; ``Q`` the basis of an average of ``m m^T`` for wide matrices, of ``m^T m``
    for tall and square ones; ``v <- rms_beta v + (1 - rms_beta) (Q^T m)^2``, ``w <- (1 - lr weight_decay) w - lr Q (Q^T
    m / (sqrt(v) + eps))``. Arguments and defaults are those of NVIDIA-NeMo/Emerging-Optimizers (2026), which learns the
    basis before each step and takes the left one of square matrices; here, as in SOAP, the first gradient only builds
    it, and each step's momentum changes it for the next.
    """

    lr: float | Tensor = 3e-4
    momentum: float = 0.95
    rms_beta: float = arg(default=0.95, doc="decay rate of ``v``.")
    shampoo_beta: float = arg(default=0.95, doc="decay rate of the average of ``m m^T``.")
    eps: float = arg(default=1e-8, doc="added to the root of ``v``.")
    weight_decay: float = 0.01

    def rule(self) -> Rule:
        adam = Smoothed(Max(), option("rms_beta"), option("eps"), bias_correction=False)
        basis = Eigenbasis(option("shampoo_beta"), 1, sides="smaller", of="momentum")
        # In a chain the second moments are those of the stage before: of the momentum.
        return Rule(Rotated(Chain(Identity(), adam), basis), EMA(option("momentum")))


class COSMOS(FixedStepMatrixOptimizer):
    """SOAP in the leading subspace of the gradients, Muon in the rest (arXiv 2502.17410).

    ``m`` is the bias-corrected average of gradients, ``U`` the leading subspace of an average of ``g^T g``, see
    :class:`~normopt.LeadingSubspace`; ``d = adam(m U) U^T + gamma o / rms(o)`` with ``o = polar(m - m U U^T)``; ``w <-
    (1 - lr weight_decay) w - lr scale d / rms(d)``. Arguments and defaults are those of lliu606/COSMOS (the betas of
    its README; ``scale`` is called ``lr_ratio`` there), whose newer code has a Nesterov momentum in place of the
    average of the older one.
    """

    betas: tuple[float, float] = arg(default=(0.9, 0.95), doc="decay rates of ``m``, and of all other averages.")
    eps: float = arg(default=1e-8, doc="added to the root of Adam's second moments.")
    scale: float = arg(default=0.1, doc="root mean square of an update over ``lr``.")
    rank: int = arg(default=64, doc="dimension of the leading subspace.")
    gamma: float = arg(default=0.2, doc="root mean square of the rest's part of ``d``.")
    weight_decay: float = 0.0
    ns_steps: int | None = None
    orthogonalize: str | PolarCoefficients = arg(default="newton-schulz", kw_only=True)
    orthogonalize_dtype: torch.dtype | str | None = arg(default="auto", kw_only=True)

    def rule(self) -> Rule:
        adam = Smoothed(Max(), option("betas", 1), option("eps"))
        polar = Spectral("unit", self.orthogonalize, self.ns_steps, self.orthogonalize_dtype)
        both = LeadingSubspace(adam, Chain(polar, Euclidean()), self.rank, option("betas", 1), option("gamma"))
        average = EMA(option("betas", 0), bias_correction=True)
        return Rule(Chain(both, Euclidean()), average, Constant(self.scale))
