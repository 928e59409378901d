"""Optimizers that measure each layer by one size: of its weights, of its gradient, or of its rows and columns."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from normopt.constraints.decay import L2, WeightDecay
from normopt.directions.algebra import Chain, Clipped, Decayed, Identity
from normopt.directions.factored import Factored
from normopt.directions.smoothed import Smoothed
from normopt.ingredient import option
from normopt.momentum.averages import EMA, HeavyBall
from normopt.norms import Euclidean, Max
from normopt.optimizer import SteepestDescent
from normopt.roles.options import Geometry
from normopt.stepsize.fixed import Constant
from normopt.stepsize.trust import GradientTrust, Relative, TrustRatio
from normopt.zoo.common import NO_DECAY, Common, Fixed, Unpack


class Adafactor(SteepestDescent):
    """:class:`Adam` with a row and a column in place of the second moment, and a step relative to the weights' size.

    ``u = g / sqrt(v)`` with the factored ``v`` of :class:`~normopt.directions.Factored`, shortened to a root mean
    square of ``d``; ``w <- (1 - lr weight_decay) w - max(eps[1], rms(w)) min(lr, 1 / sqrt(step)) u``. Arguments and
    defaults are those of torch.optim.Adafactor (arXiv 1804.04235). This is no duality map of a norm: without memory
    every entry is divided by the sizes of its row and of its column at once. Tensors with more than two dimensions are
    seen as one matrix by their view, where torch factors the last two dimensions.

    Args:
        params: parameters, param groups or a model.
        lr: largest relative step size.
        beta2_decay: exponent of the step number in the weight of the newest gradient.
        eps: the least that a gradient is divided by (``None``: the ``eps`` of the working dtype), and the least size of
            weights.
        d: largest root mean square of ``u``.
        weight_decay: decoupled weight decay.
        common: ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    geometry: ClassVar[Geometry] = NO_DECAY

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        **common: Unpack[Fixed],
    ) -> None:
        super().__init__(
            params,
            lr,
            Chain(Factored(option("beta2_decay"), option("eps", 0)), Clipped(Euclidean(), option("d"))),
            step_size=Relative(option("eps", 1)),
            constraint=WeightDecay(option("weight_decay")),
            options={"beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay},
            **common,
        )


class LARS(SteepestDescent):
    """:class:`SGD` whose gradients are made as long as ``trust_coefficient ||w||`` first (arXiv 1708.03888).

    ``g <- (g + weight_decay w) trust_coefficient ||w|| / (||g|| + weight_decay ||w||)``, ``b <- momentum b +
    (1 - dampening) g``, ``w <- w - lr b``. Arguments and defaults are those of pytorch_optimizer's LARS. With a whole
    model, vectors and scalars move by plain SGD without decay; given parameters, all are treated alike.

    Args:
        params: parameters, param groups or a model.
        lr: learning rate.
        weight_decay: L2 regularization, added to the gradient.
        momentum: weight of the past; 0 keeps no state.
        dampening: how much of each gradient is left out.
        trust_coefficient: length of a gradient, in units of the weights.
        nesterov: step along ``g + momentum b``.
        common: ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    geometry: ClassVar[Geometry] = {
        "vector": {"step_size": Constant(), "weight_decay": 0.0},
        "scalar": {"step_size": Constant(), "weight_decay": 0.0},
        "*": {},
    }

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        dampening: float = 0.0,
        trust_coefficient: float = 1e-3,
        nesterov: bool = False,
        **common: Unpack[Fixed],
    ) -> None:
        numbers = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(
            params,
            lr,
            Identity(),
            HeavyBall(option("momentum"), option("dampening"), option("nesterov"), damp_first=True),
            GradientTrust(option("trust_coefficient"), option("weight_decay")),
            L2(option("weight_decay")),
            options={**numbers, "trust_coefficient": trust_coefficient},
            **common,
        )


class LAMB(SteepestDescent):
    """:class:`AdamW` whose updates are made as long as the weights: ``w <- w - lr u ||w|| / ||u||`` (arXiv 1904.00962).

    ``u = m / (sqrt(v) + eps) + weight_decay w``, with Adam's averages of gradients that have been shortened, all
    together, to ``max_grad_norm``. Arguments and defaults are those of timm's Lamb. With a whole model, vectors and
    scalars are not decayed, and therefore not rescaled unless ``always_adapt``.

    Args:
        params: parameters, param groups or a model.
        lr: learning rate, the step's length in units of the weights.
        bias_correction: correct both averages for the zero that they start from.
        betas: weights of the past in the averages of the gradient and of its square.
        eps: added to the root of the second moment.
        weight_decay: part of the update, and of its length.
        max_grad_norm: largest Euclidean norm of all gradients together; ``None``: any.
        trust_clip: lengthen no update: ``||w|| / ||u||`` is at most 1.
        always_adapt: rescale updates of param groups without weight decay too.
        common: ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    geometry: ClassVar[Geometry] = NO_DECAY

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        max_grad_norm: float | None = 1.0,
        trust_clip: bool = False,
        always_adapt: bool = False,
        **common: Unpack[Fixed],
    ) -> None:
        adam = Smoothed(Max(), option("betas", 1), option("eps"), option("bias_correction"))
        trust = TrustRatio(
            weight_decay=option("weight_decay"),
            always_adapt=option("always_adapt"),
            clip=1.0 if trust_clip else float("inf"),
            max_grad_norm=float("inf") if max_grad_norm is None else option("max_grad_norm"),
        )
        numbers = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": bias_correction}
        numbers |= {"always_adapt": always_adapt} | ({} if max_grad_norm is None else {"max_grad_norm": max_grad_norm})
        super().__init__(
            params,
            lr,
            Chain(adam, Decayed(option("weight_decay"))),
            EMA(option("betas", 0), bias_correction=option("bias_correction")),
            trust,
            options=numbers,
            **common,
        )


class NovoGrad(SteepestDescent):
    """The Euclidean norm with memory, and momentum after it: unit gradients, added up (arXiv 1905.11286).

    ``v <- beta2 v + (1 - beta2) ||g||^2`` for each tensor, from the first gradient's ``||g||^2``; ``b <- beta1 b +
    g / (sqrt(v) + eps) + weight_decay w``, ``w <- w - lr b``. With both betas, eps and weight decay 0 it is normalized
    gradient descent. Arguments and defaults are those of pytorch_optimizer's NovoGrad without ``fixed_decay``.

    Args:
        params: parameters, param groups or a model.
        lr: learning rate.
        betas: weights of the past in the sum and in the second moment.
        weight_decay: added after the normalization.
        grad_averaging: average instead of adding up: all but the first summand are multiplied by ``1 - beta1``.
        eps: added to the root of the second moment.
        weight_decouple: shrink the weights by ``1 - lr weight_decay`` before the update instead.
        common: ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    geometry: ClassVar[Geometry] = NO_DECAY

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.95, 0.98),
        weight_decay: float = 0.0,
        *,
        grad_averaging: bool = False,
        eps: float = 1e-8,
        weight_decouple: bool = False,
        **common: Unpack[Common],
    ) -> None:
        beta = option("betas", 0)
        unit = Smoothed(Euclidean("unit"), option("betas", 1), option("eps"), initial="first")
        inside = () if weight_decouple else (Decayed(option("weight_decay")),)
        super().__init__(
            params,
            lr,
            Chain(unit, *inside, HeavyBall(beta, dampening=beta if grad_averaging else 0.0)),
            constraint=WeightDecay(option("weight_decay")) if weight_decouple else None,
            options={"betas": betas, "eps": eps, "weight_decay": weight_decay},
            **common,
        )
