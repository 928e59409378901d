"""Optimizers that measure each layer by one size, of its weights or of its gradient: LARS, LAMB, NovoGrad."""

from __future__ import annotations

from normopt.constraints import L2, WeightDecay
from normopt.directions import Chain, Decayed, Identity, Smoothed
from normopt.ingredient import check_range, option
from normopt.momentum import EMA, HeavyBall
from normopt.norms import Euclidean, Max
from normopt.rule import Rule
from normopt.stepsize import GradientTrust, TrustRatio
from normopt.zoo.base import L2_DECAY, DeclaredOptimizer, FixedStepOptimizer, arg


class LARS(FixedStepOptimizer):
    """:class:`SGD` whose gradients are made as long as ``trust_coefficient ||w||`` first (arXiv 1708.03888).

    ``g <- (g + weight_decay w) trust_coefficient ||w|| / (||g|| + weight_decay ||w||)``, ``b <- momentum b +
    (1 - dampening) g``, ``w <- w - lr b``. Vectors and scalars move by plain SGD without decay. Arguments and defaults
    are those of pytorch_optimizer's LARS.
    """

    weight_decay: float = arg(default=0.0, doc=L2_DECAY)
    momentum: float = arg(default=0.9, doc="decay rate of the heavy ball ``b``; 0 keeps no state.")
    dampening: float = 0.0
    trust_coefficient: float = arg(default=1e-3, doc="length of a gradient, in units of the weights.")
    nesterov: bool = arg(default=False, doc="step along ``g + momentum b``.")

    def rule(self) -> Rule:
        ball = HeavyBall(option("momentum"), option("dampening"), option("nesterov"), damp_first=True)
        trust = GradientTrust(option("trust_coefficient"), option("weight_decay"))
        return Rule(Identity(), ball, trust, (L2(option("weight_decay")),))


class LAMB(FixedStepOptimizer):
    """:class:`AdamW` whose updates are made as long as the weights: ``w <- w - lr u ||w|| / ||u||`` (arXiv 1904.00962).

    ``u = m / (sqrt(v) + eps) + weight_decay w``, with Adam's averages of gradients that have been shortened, all
    together, to ``max_grad_norm``. Arguments and defaults are those of timm's Lamb. What is not decayed is not rescaled
    either, unless ``always_adapt``.
    """

    bias_correction: bool = arg(default=True, doc="correct both averages for the zero that they start from.")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = arg(default=0.01, doc="part of the update, and of its length.")
    max_grad_norm: float | None = arg(
        default=1.0, doc="largest Euclidean norm of all gradients together; ``None``: any.", kw_only=True
    )
    trust_clip: bool = arg(default=False, doc="lengthen no update: ``||w|| / ||u||`` is at most 1.", kw_only=True)
    always_adapt: bool = arg(default=False, doc="rescale updates without weight decay too.", kw_only=True)

    def rule(self) -> Rule:
        adam = Smoothed(Max(), option("betas", 1), option("eps"), option("bias_correction"))
        largest = float("inf") if self.max_grad_norm is None else option("max_grad_norm")
        clip = 1.0 if self.trust_clip else float("inf")
        trust = TrustRatio(option("weight_decay"), option("always_adapt"), clip, largest)
        average = EMA(option("betas", 0), bias_correction=option("bias_correction"))
        return Rule(Chain(adam, Decayed(option("weight_decay"))), average, trust)


class NovoGrad(DeclaredOptimizer):
    """The Euclidean norm with memory, and momentum after it: unit gradients, added up (arXiv 1905.11286).

    ``v <- beta2 v + (1 - beta2) ||g||^2`` for each tensor, from the first gradient's ``||g||^2``; ``b <- beta1 b +
    g / (sqrt(v) + eps) + weight_decay w``, ``w <- w - lr b``. With both betas, eps and weight decay 0 it is normalized
    gradient descent. Arguments and defaults are those of pytorch_optimizer's NovoGrad without ``fixed_decay``.
    """

    betas: tuple[float, float] = arg(default=(0.95, 0.98), doc="decay rates of the sum and of the second moment.")
    weight_decay: float = arg(default=0.0, doc="added after the normalization.")
    grad_averaging: bool = arg(
        default=False,
        doc="average instead of adding up: all but the first summand are multiplied by ``1 - beta1``.",
        kw_only=True,
    )
    eps: float = arg(default=1e-8, kw_only=True)
    weight_decouple: bool = arg(
        default=False, doc="shrink the weights by ``1 - lr weight_decay`` before the update instead.", kw_only=True
    )

    def rule(self) -> Rule:
        check_range(self, "betas[0]", self.betas[0], 0, 1)
        beta, decay = option("betas", 0), option("weight_decay")
        unit = Smoothed(Euclidean("unit"), option("betas", 1), option("eps"), initial="first")
        summed = HeavyBall(beta, dampening=beta if self.grad_averaging else 0.0)
        if self.weight_decouple:
            return Rule(Chain(unit, summed), constraint=(WeightDecay(decay),))
        return Rule(Chain(unit, Decayed(decay), summed))
