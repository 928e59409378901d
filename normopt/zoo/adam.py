"""Adam and its relatives: the largest-entry norm with a memory of the second moment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from normopt.constraints import L2, WeightDecay
from normopt.directions import Chain, Clipped, Factored, Smoothed
from normopt.ingredient import check_range, option
from normopt.momentum import EMA, HeavyBall, TwoSpeed, WarmNesterov
from normopt.norms import Euclidean, Max
from normopt.rule import Rule
from normopt.stepsize import InverseTime, Relative
from normopt.zoo.base import L2_DECAY, DeclaredOptimizer, FixedStepOptimizer, arg


class Adam(DeclaredOptimizer):
    """The largest-entry norm with memory: ``w <- w - lr m / (sqrt(v) + eps)`` (arXiv 1412.6980).

    ``m <- beta1 m + (1 - beta1) g``, ``v <- beta2 v + (1 - beta2) g^2``, both corrected for bias. With both betas and
    eps 0 it is sign descent. Arguments and defaults are those of torch.optim.Adam.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = arg(default=0.0, doc=f"{L2_DECAY[:-1]}; decoupled with ``decoupled_weight_decay``.")
    amsgrad: bool = arg(default=False, doc="divide by the largest second moment so far.")
    decoupled_weight_decay: bool = arg(default=False, doc="shrink the weights instead (:class:`AdamW`).", kw_only=True)
    cautious: bool = arg(default=False, kw_only=True)

    def rule(self) -> Rule:
        if self.cautious and not self.decoupled_weight_decay:
            raise ValueError("Adam: cautious weight decay is decoupled; set decoupled_weight_decay, or use AdamW")
        adam = Smoothed(Max(), option("betas", 1), option("eps"), maximum=option("amsgrad"))
        decoupled = WeightDecay(option("weight_decay"), cautious=self.cautious)
        decay = decoupled if self.decoupled_weight_decay else L2(option("weight_decay"))
        return Rule(adam, EMA(option("betas", 0), bias_correction=True), constraint=(decay,))


class AdamW(DeclaredOptimizer):
    """:class:`Adam` with decoupled weight decay (arXiv 1711.05101).

    ``w <- (1 - lr weight_decay) w - lr m / (sqrt(v) + eps)``, with Adam's ``m`` and ``v``. Arguments and defaults are
    those of torch.optim.AdamW.
    """

    fixed: ClassVar[Mapping[str, Any]] = {**DeclaredOptimizer.fixed, "decoupled_weight_decay": True}
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    amsgrad: bool = arg(default=False, doc="divide by the largest second moment so far.")
    cautious: bool = arg(default=False, kw_only=True)

    def rule(self) -> Rule:
        adam = Smoothed(Max(), option("betas", 1), option("eps"), maximum=option("amsgrad"))
        decay = WeightDecay(option("weight_decay"), cautious=self.cautious)
        return Rule(adam, EMA(option("betas", 0), bias_correction=True), constraint=(decay,))


class NAdam(DeclaredOptimizer):
    """:class:`Adam` with Nesterov momentum that grows over the steps (Dozat 2016).

    ``w <- w - lr u / (sqrt(v) + eps)``; ``mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2)``, ``u = mu_(t+1) m /
    (1 - mu_1 ... mu_(t+1)) + (1 - mu_t) g / (1 - mu_1 ... mu_t)``, ``m`` and ``v`` Adam's. Arguments and defaults are
    those of torch.optim.NAdam.
    """

    lr: float | Tensor = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = arg(default=0.0, doc=f"{L2_DECAY[:-1]}; decoupled with ``decoupled_weight_decay``.")
    momentum_decay: float = arg(default=4e-3, doc="how fast the momentum grows from ``betas[0] / 2`` to ``betas[0]``.")
    decoupled_weight_decay: bool = False

    def rule(self) -> Rule:
        adam = Smoothed(Max(), option("betas", 1), option("eps"))
        decay = (WeightDecay if self.decoupled_weight_decay else L2)(option("weight_decay"))
        return Rule(adam, WarmNesterov(option("betas", 0), option("momentum_decay")), constraint=(decay,))


class Adamax(DeclaredOptimizer):
    """:class:`Adam` whose second moment is a fading maximum: ``w <- w - lr m / u`` (arXiv 1412.6980, section 7.1).

    ``m <- beta1 m + (1 - beta1) g``, corrected for bias, ``u <- max(beta2 u, |g| + eps)``. Arguments and defaults are
    those of torch.optim.Adamax.
    """

    lr: float | Tensor = 2e-3
    betas: tuple[float, float] = arg(default=(0.9, 0.999), doc="decay rates of the average and of the maximum.")
    eps: float = arg(default=1e-8, doc="added to the gradient's size.")
    weight_decay: float = arg(default=0.0, doc=L2_DECAY)

    def rule(self) -> Rule:
        adamax = Smoothed(Max(), option("betas", 1), option("eps"), accumulate="max")
        return Rule(adamax, EMA(option("betas", 0), bias_correction=True), constraint=(L2(option("weight_decay")),))


class AdEMAMix(DeclaredOptimizer):
    """:class:`AdamW` with a second, slow average of gradients: ``w <- w - lr (m1 + alpha m2) / (sqrt(v) + eps)``.

    ``m1``, corrected for bias, and ``m2``, not corrected, decay at the rates ``betas[0]`` and ``betas[2]``; before the
    step, ``w <- (1 - lr weight_decay) w``. Arguments and defaults are those of the authors' code, apple/ml-ademamix
    (arXiv 2409.03137).
    """

    betas: tuple[float, float, float] = arg(
        default=(0.9, 0.999, 0.9999), doc="decay rates of the fast average, the second moment and the slow average."
    )
    alpha: float = arg(default=2.0, doc="factor of the slow average.")
    beta3_warmup: int | None = arg(
        default=None, doc="steps in which the slow average's half-life grows to that of ``betas[2]``, or ``None``."
    )
    alpha_warmup: int | None = arg(default=None, doc="steps in which ``alpha`` grows from 0, or ``None``.")
    eps: float = 1e-8
    weight_decay: float = 0.0

    def rule(self) -> Rule:
        beta, slow, warmups = option("betas", 0), option("betas", 2), (option("beta3_warmup"), option("alpha_warmup"))
        averages = TwoSpeed(beta, slow, option("alpha"), *warmups)
        adam = Smoothed(Max(), option("betas", 1), option("eps"))
        return Rule(adam, averages, constraint=(WeightDecay(option("weight_decay")),))


class RMSprop(DeclaredOptimizer):
    """The largest-entry norm with memory, and no momentum before it: ``g / (sqrt(v) + eps)`` (Tieleman & Hinton 2012).

    ``v <- alpha v + (1 - alpha) g^2``; ``b <- momentum b + g / (sqrt(v) + eps)``, ``w <- w - lr b``. Arguments and
    defaults are those of torch.optim.RMSprop.
    """

    lr: float | Tensor = 1e-2
    alpha: float = arg(default=0.99, doc="decay rate of the second moment.")
    eps: float = 1e-8
    weight_decay: float = arg(default=0.0, doc=L2_DECAY)
    momentum: float = arg(default=0.0, doc="decay rate of ``b``; 0 keeps no state.")
    centered: bool = arg(
        default=False,
        doc="divide by the standard deviation of the gradients: ``v`` less the square of their average.",
    )

    def rule(self) -> Rule:
        moment = {"bias_correction": False, "centered": option("centered")}
        adapted = Smoothed(Max(), option("alpha"), option("eps"), **moment)
        return Rule(Chain(adapted, HeavyBall(option("momentum"))), constraint=(L2(option("weight_decay")),))


class Adagrad(DeclaredOptimizer):
    """The largest-entry norm with the memory of everything (Duchi et al. 2011).

    ``s <- s + g^2``, ``w <- w - lr / (1 + (step - 1) lr_decay) g / (sqrt(s) + eps)``. Arguments and defaults are those
    of torch.optim.Adagrad.

    Raises:
        ValueError: ``lr_decay`` with another ``step_size``.
    """

    lr: float | Tensor = 1e-2
    lr_decay: float = arg(default=0.0, doc="not for use with another ``step_size``.")
    weight_decay: float = arg(default=0.0, doc=L2_DECAY)
    initial_accumulator_value: float = arg(default=0.0, doc="what ``s`` starts from.")
    eps: float = arg(default=1e-10, doc="added to the root of ``s``.")

    def rule(self) -> Rule:
        if self.step_size is not None and self.lr_decay:
            raise ValueError("Adagrad: lr_decay is a step size of its own; leave it 0 beside another step_size")
        start = option("initial_accumulator_value")
        adagrad = Smoothed(Max(), eps=option("eps"), accumulate="sum", initial=start)
        decay = L2(option("weight_decay"))
        return Rule(adagrad, step_size=InverseTime(option("lr_decay")), constraint=(decay,))


class Adafactor(FixedStepOptimizer):
    """:class:`Adam` with a row and a column in place of the second moment, and a step relative to the weights' size.

    ``u = g / sqrt(v)`` with the factored ``v`` of :class:`~normopt.directions.Factored`, shortened to a root mean
    square of ``d``; ``w <- (1 - lr weight_decay) w - max(eps[1], rms(w)) min(lr, 1 / sqrt(step)) u``. Arguments and
    defaults are those of torch.optim.Adafactor (arXiv 1804.04235). This is no duality map of a norm: without memory
    every entry is divided by the sizes of its row and of its column at once. Tensors with more than two dimensions are
    seen as one matrix by their view, where torch factors the last two dimensions.
    """

    lr: float | Tensor = arg(default=1e-2, doc="largest relative step size.")
    beta2_decay: float = arg(default=-0.8, doc="exponent of the step number in the weight of the newest gradient.")
    eps: tuple[float | None, float] = arg(
        default=(None, 1e-3),
        doc="the least that a gradient is divided by (``None``: the ``eps`` of the working dtype), and the least size "
        "of weights.",
    )
    d: float = arg(default=1.0, doc="largest root mean square of ``u``, 1 or more, as in torch.")
    weight_decay: float = 0.0

    def rule(self) -> Rule:
        check_range(self, "d", self.d, 1, float("inf"))
        factored = Factored(option("beta2_decay"), option("eps", 0))
        direction = Chain(factored, Clipped(Euclidean(), option("d")))
        decay = WeightDecay(option("weight_decay"))
        return Rule(direction, step_size=Relative(option("eps", 1)), constraint=(decay,))
