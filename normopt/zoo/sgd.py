"""Gradient descent with momentum: SGD, and STORM+, which looks back to reduce the variance of gradients."""

from __future__ import annotations

from torch import Tensor

from normopt.constraints import L2
from normopt.directions import Identity
from normopt.ingredient import option
from normopt.momentum import HeavyBall, Recursive
from normopt.rule import Rule
from normopt.stepsize import Storm
from normopt.zoo.base import L2_DECAY, DeclaredOptimizer, FixedStepOptimizer, arg


class SGD(DeclaredOptimizer):
    """Gradient descent with a heavy ball: steepest descent under the Euclidean norm, as long as the dual norm.

    ``g <- g + weight_decay w``, ``b <- momentum b + (1 - dampening) g``, ``w <- w - lr b``. Arguments and defaults are
    those of torch.optim.SGD.
    """

    momentum: float = arg(default=0.0, doc="decay rate of the heavy ball ``b``; 0 keeps no state.")
    dampening: float = arg(default=0.0, doc="how much of each gradient but the first is left out.")
    weight_decay: float = arg(default=0.0, doc=L2_DECAY)
    nesterov: bool = arg(default=False, doc="step along ``g + momentum b``.")

    def rule(self) -> Rule:
        ball = HeavyBall(option("momentum"), option("dampening"), option("nesterov"))
        return Rule(Identity(), ball, constraint=(L2(option("weight_decay")),))


class STORMPlus(FixedStepOptimizer):
    """SGD with recursive momentum, and neither a learning rate nor a momentum to tune (arXiv 2111.01040).

    ``d <- g(w) + (1 - a) (d - g(w'))``, both gradients of one sample, ``w'`` the weights before the last step;
    ``w <- w - eta d``. ``a = (1 + G / a0)^(-2/3)`` with ``G`` the sum of ``|g|^2`` over all tensors and all steps
    before, ``eta = lr (sum of |d|^2 / a / b0)^(-1/3)`` with the next step's ``a``. Without noise this is gradient
    descent. The defaults of ``lr``, ``a0`` and ``b0`` are the paper's.

    ``step`` needs a closure and calls it twice from the second step on, which must see the same sample; see
    :meth:`normopt.SteepestDescent.step`. Memory: two more numbers for each parameter.
    """

    lr: float | Tensor = arg(default=1.0, doc="factor on the rate, for schedules.")
    a0: float = arg(default=1.0, doc="divides the sum of squared gradients.")
    b0: float = arg(default=1.0, doc="divides the sum that the rate is made of.")
    weight_decay: float = arg(default=0.0, doc="L2 regularization, added to both gradients.")

    def rule(self) -> Rule:
        rate = Storm(option("a0"), option("b0"))
        return Rule(Identity(), Recursive(None), rate, (L2(option("weight_decay")),))
