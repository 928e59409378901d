"""Learning-rate-free optimizers: Adam with the step sizes of Prodigy and D-Adaptation."""

from __future__ import annotations

from torch import Tensor

from normopt.constraints import L2, WeightDecay
from normopt.directions import Smoothed
from normopt.ingredient import option
from normopt.momentum import EMA
from normopt.norms import Max
from normopt.rule import Rule
from normopt.stepsize import DAdaptation, StepSize
from normopt.stepsize import Prodigy as ProdigyStep
from normopt.zoo.base import FixedStepOptimizer, arg, beta2_of, check_beta1

BETAS = (option("betas", 0), option("betas", 1))


class Prodigy(FixedStepOptimizer):
    """Adam that finds its learning rate: ``w <- (1 - lr d weight_decay) w - lr d m / (sqrt(v) + d eps)``.

    ``m`` and ``v`` average ``d g`` and ``(d g)^2``; ``d <- max(d, d_coef sum <g, w_0 - w> / ||s||_1)``, where both the
    sum and ``s`` weight gradients by ``lr d^2`` and decay at the rate ``beta3``, over all tensors: see
    :class:`~normopt.stepsize.Prodigy`. Arguments and defaults are those of the prodigyopt package (arXiv 2306.06101).
    For other norms give any optimizer ``step_size="prodigy"``: ``Muon(model, lr=1.0, step_size="prodigy")``.

    Raises:
        ValueError: a number out of range.
    """

    lr: float | Tensor = arg(default=1.0, doc="factor on the learning rate that is found, for schedules; 1.")
    betas: tuple[float, float] = (0.9, 0.999)
    beta3: float | None = arg(default=None, doc="decay rate of the estimate; ``None``: the root of ``betas[1]``.")
    eps: float = arg(default=1e-8, doc="added to the root of the second moment, in units of the gradient times ``d``.")
    weight_decay: float = arg(default=0.0, doc="decoupled weight decay, or L2 with ``decouple=False``.")
    decouple: bool = True
    use_bias_correction: bool = False
    safeguard_warmup: bool = arg(
        default=False, doc="keep a small learning rate at the start from inflating the estimate."
    )
    d0: float = 1e-6
    d_coef: float = arg(default=1.0, doc="factor on the estimate; the argument to tune, if any.")
    growth_rate: float = float("inf")
    fsdp_in_use: bool = False
    slice_p: int = arg(default=1, doc="estimate from every ``slice_p``-th entry only, to save memory.")

    def rule(self) -> Rule:
        check_beta1(self, self.betas)
        self.beta3 = beta2_of(self.betas) ** 0.5 if self.beta3 is None else self.beta3
        return _adam(self._estimate(), decouple=self.decouple)

    def _estimate(self) -> StepSize:
        return ProdigyStep(
            d0=self.d0,
            growth_rate=option("growth_rate"),
            bias_correction=BETAS if self.use_bias_correction else None,
            beta3=option("beta3"),
            d_coef=option("d_coef"),
            safeguard_warmup=self.safeguard_warmup,
            slice_p=self.slice_p,
        )


class DAdaptAdam(FixedStepOptimizer):
    """Adam that finds its learning rate: ``w <- w - radius m / (sqrt(v) + eps)``, where ``m`` averages ``lr d g``.

    ``v`` averages ``g^2``; at the rate ``sqrt(betas[1])``, ``s`` averages ``lr d g`` and ``r`` averages ``lr d <g, s /
    (sqrt(v) + eps)>``; ``d <- max(d, r / ((1 - sqrt(betas[1])) ||s||_1))`` over all tensors, see
    :class:`~normopt.stepsize.DAdaptation`. Arguments and defaults are those of the dadaptation package without
    ``log_every`` (arXiv 2301.07733); its group option ``layer_scale`` is ``radius`` here.

    Raises:
        ValueError: a number out of range.
    """

    lr: float | Tensor = arg(default=1.0, doc="factor on the learning rate that is found, for schedules; 1.")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = arg(default=0.0, doc="L2 regularization, or decoupled weight decay with ``decouple``.")
    decouple: bool = False
    use_bias_correction: bool = False
    d0: float = 1e-6
    growth_rate: float = float("inf")
    fsdp_in_use: bool = False
    radius: float = arg(default=1.0, doc="how far these tensors go beside those of other param groups.")

    def rule(self) -> Rule:
        check_beta1(self, self.betas)
        bias = BETAS if self.use_bias_correction else None
        estimate = DAdaptation(self.d0, option("growth_rate"), option("radius"), bias, option("betas", 1))
        return _adam(estimate, decouple=self.decouple)


def _adam(step_size: StepSize, *, decouple: bool) -> Rule:
    adam = Smoothed(Max(), option("betas", 1), option("eps"), bias_correction=False)
    decay = (WeightDecay if decouple else L2)(option("weight_decay"))
    return Rule(adam, EMA(option("betas", 0)), step_size, (decay,))
