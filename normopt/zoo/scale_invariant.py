"""Optimizers that keep scale-invariant weights from growing: AdamP and SGDP."""

from __future__ import annotations

from normopt.constraints import TangentProjection
from normopt.directions import Identity, Smoothed
from normopt.ingredient import option
from normopt.ingredient.view import View
from normopt.momentum import EMA, HeavyBall
from normopt.norms import Max
from normopt.roles.options import Geometry
from normopt.rule import Rule
from normopt.zoo.base import DeclaredOptimizer, arg


class _TokensAsRows(DeclaredOptimizer):
    def table(self) -> Geometry:
        """Given a whole model, vectors and scalars are not decayed, and a token's embedding counts as a row."""
        return {**super().table(), "embedding": {"view": View()}}


class AdamP(_TokensAsRows):
    """:class:`AdamW` whose updates of scale-invariant weights lose their part along the weights (arXiv 2006.08217).

    ``u = m / (sqrt(v) + eps)``, ``m`` and ``v`` Adam's. Where ``|cos(w, g)| < delta / sqrt(n)``, by rows or as a whole,
    ``u <- u - w <w, u> / ||w||^2`` and the decay is multiplied by ``wd_ratio``; ``w <- (1 - lr weight_decay) w - lr
    u``, see :class:`~normopt.constraints.TangentProjection`. Arguments and defaults are those of the adamp package.
    Tensors are projected as the matrices that their view shows: a fused QKV of a model as three.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = arg(default=1e-8, doc="added to the root of the second moment; the least length of weights too.")
    weight_decay: float = 0.0
    delta: float = 0.1
    wd_ratio: float = 0.1
    nesterov: bool = False

    def rule(self) -> Rule:
        adam = Smoothed(Max(), option("betas", 1), option("eps"))
        average = EMA(option("betas", 0), option("nesterov"), bias_correction=True)
        tangent = TangentProjection(option("delta"), option("eps"), option("wd_ratio"), option("weight_decay"))
        return Rule(adam, average, constraint=(tangent,))


class SGDP(_TokensAsRows):
    """:class:`SGD` whose updates of scale-invariant weights lose their part along the weights (arXiv 2006.08217).

    ``u = b``, the heavy ball of SGD, is projected as by :class:`AdamP`. The weight decay is decoupled and follows the
    length of the momentum's sum, ``w <- (1 - lr weight_decay / (1 - momentum)) w - lr u``. Arguments and defaults are
    those of the adamp package, which has none for ``lr``, takes ``nesterov`` with ``dampening`` or without momentum,
    and dampens where there is no momentum; here these are as in torch.optim.SGD. Without ``nesterov`` it projects the
    momentum itself, which then forgets what was along the weights; here the momentum remains the sum of gradients.
    """

    momentum: float = arg(default=0.0, doc="decay rate of the heavy ball ``b``; 0 keeps no state.")
    dampening: float = arg(default=0.0, doc="how much of each gradient is left out, the first included.")
    weight_decay: float = 0.0
    nesterov: bool = arg(default=False, doc="step along ``g + momentum b``.")
    eps: float = arg(default=1e-8, doc="the least length of weights.")
    delta: float = 0.1
    wd_ratio: float = 0.1

    def rule(self) -> Rule:
        beta, decay = option("momentum"), option("weight_decay")
        ball = HeavyBall(beta, option("dampening"), option("nesterov"), damp_first=True)
        tangent = TangentProjection(option("delta"), option("eps"), option("wd_ratio"), decay, beta)
        return Rule(Identity(), ball, constraint=(tangent,))
