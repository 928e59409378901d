"""Sign descent: optimizers of the largest-entry norm that keep no second moment."""

from __future__ import annotations

from torch import Tensor

from normopt.constraints import WeightDecay
from normopt.ingredient import option
from normopt.momentum import EMA, LionMomentum
from normopt.norms import Max
from normopt.rule import Rule
from normopt.zoo.base import DeclaredOptimizer, arg


class SignSGD(DeclaredOptimizer):
    """Sign descent: ``w <- (1 - lr weight_decay) w - lr sign(g)`` (arXiv 1802.04434)."""

    weight_decay: float = 0.0

    def rule(self) -> Rule:
        return Rule(Max(), constraint=(WeightDecay(option("weight_decay")),))


class Signum(DeclaredOptimizer):
    """Sign descent with momentum: ``m <- momentum m + (1 - momentum) g``, ``w <- w - lr sign(m)`` (arXiv 1802.04434).

    Before the step, ``w <- (1 - lr weight_decay) w``.
    """

    momentum: float = 0.9
    weight_decay: float = 0.0

    def rule(self) -> Rule:
        return Rule(Max(), EMA(option("momentum")), constraint=(WeightDecay(option("weight_decay")),))


class Lion(DeclaredOptimizer):
    """Signs of an interpolation: ``w <- w - lr sign(beta1 m + (1 - beta1) g)``, ``m <- beta2 m + (1 - beta2) g``.

    Before the step, ``w <- (1 - lr weight_decay) w``. Arguments and defaults are those of the lion-pytorch package
    (arXiv 2302.06675) without ``use_triton``. Good learning rates are some 3 to 10 times below Adam's.
    """

    lr: float | Tensor = 1e-4
    betas: tuple[float, float] = arg(default=(0.9, 0.99), doc="decay rates of ``m`` in the step and in the memory.")
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = arg(
        default=False,
        doc="divide ``weight_decay`` by the first learning rate, so that weights shrink by ``1 - weight_decay`` at "
        "that rate; a param group's own ``weight_decay`` is taken as it is.",
        kw_only=True,
    )
    cautious: bool = arg(default=False, kw_only=True)

    def rule(self) -> Rule:
        if self.decoupled_weight_decay:
            if not float(self.lr) > 0:
                raise ValueError(f"Lion: decoupled_weight_decay divides by lr, which must be positive, got {self.lr!r}")
            self.weight_decay /= float(self.lr)
        decay = WeightDecay(option("weight_decay"), cautious=self.cautious)
        return Rule(Max(), LionMomentum(option("betas", 0), option("betas", 1)), constraint=(decay,))
