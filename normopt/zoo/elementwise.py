"""Optimizers of the largest-entry norm: sign descent, and its relatives with memory, Adam and its variants."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from normopt.constraints.decay import L2, WeightDecay
from normopt.directions.algebra import Chain
from normopt.directions.smoothed import Smoothed
from normopt.ingredient import option
from normopt.momentum.averages import EMA, HeavyBall, LionMomentum, TwoSpeed, WarmNesterov
from normopt.norms import Max
from normopt.optimizer import SteepestDescent
from normopt.roles.options import Geometry
from normopt.stepsize.fixed import InverseTime
from normopt.zoo.common import NO_DECAY, Common, Unpack


class SignSGD(SteepestDescent):
    """Sign descent: ``w <- (1 - lr weight_decay) w - lr sign(g)`` (arXiv 1802.04434).

    Args:
        params: parameters, param groups or a model.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        common: ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    geometry: ClassVar[Geometry] = NO_DECAY

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        decay = WeightDecay(option("weight_decay"))
        super().__init__(params, lr, Max(), constraint=decay, options={"weight_decay": weight_decay}, **common)


class Signum(SteepestDescent):
    """Sign descent with momentum: ``m <- momentum m + (1 - momentum) g``, ``w <- w - lr sign(m)`` (arXiv 1802.04434).

    Args:
        params: parameters, param groups or a model.
        lr: learning rate.
        momentum: weight of the past.
        weight_decay: decoupled weight decay.
        common: ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    geometry: ClassVar[Geometry] = NO_DECAY

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params,
            lr,
            Max(),
            EMA(option("momentum")),
            constraint=WeightDecay(option("weight_decay")),
            options={"momentum": momentum, "weight_decay": weight_decay},
            **common,
        )


class Lion(SteepestDescent):
    """Sign descent that looks ahead: ``w <- w - lr sign(beta1 m + (1 - beta1) g)``, ``m <- beta2 m + (1 - beta2) g``.

    Arguments and defaults are those of the lion-pytorch package (arXiv 2302.06675) without ``use_triton``.

    Args:
        params: parameters, param groups or a model.
        lr: learning rate, some 3 to 10 times below Adam's.
        betas: weights of the past in the step and in the memory.
        weight_decay: decoupled weight decay.
        decoupled_weight_decay: divide it by the first learning rate, so that weights shrink by ``1 - weight_decay`` at
            that rate; a param group's own ``weight_decay`` is taken as it is.
        cautious: decay only entries that the update does not move away from 0 (arXiv 2510.12402).
        common: ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    geometry: ClassVar[Geometry] = NO_DECAY

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = False,
        cautious: bool = False,
        **common: Unpack[Common],
    ) -> None:
        if decoupled_weight_decay:
            if not float(lr) > 0:
                raise ValueError(f"Lion: decoupled_weight_decay divides by lr, which must be positive, got {lr!r}")
            weight_decay = weight_decay / float(lr)
        super().__init__(
            params,
            lr,
            Max(),
            LionMomentum(option("betas", 0), option("betas", 1)),
            constraint=WeightDecay(option("weight_decay"), cautious=cautious),
            options={"betas": betas, "weight_decay": weight_decay},
            **common,
        )


class RMSprop(SteepestDescent):
    """The largest-entry norm with memory, and no momentum before it: ``g / (sqrt(v) + eps)`` (Tieleman & Hinton 2012).

    ``v <- alpha v + (1 - alpha) g^2``; with ``momentum`` the normalized gradients are added up,
    ``b <- momentum b + g / (sqrt(v) + eps)``. Arguments and defaults are those of torch.optim.RMSprop.

    Args:
        params: parameters, param groups or a model.
        lr: learning rate.
        alpha: weight of the past in the second moment.
        eps: added to its root.
        weight_decay: L2 regularization, added to the gradient.
        momentum: weight of the past in the heavy ball after the normalization; 0 keeps no state.
        centered: divide by the standard deviation of the gradients: ``v`` less the square of their average.
        common: ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    geometry: ClassVar[Geometry] = NO_DECAY

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        **common: Unpack[Common],
    ) -> None:
        numbers = {"alpha": alpha, "eps": eps, "momentum": momentum, "centered": centered, "weight_decay": weight_decay}
        centered = option("centered")
        adapted = Smoothed(Max(), option("alpha"), option("eps"), bias_correction=False, centered=centered)
        super().__init__(
            params,
            lr,
            Chain(adapted, HeavyBall(option("momentum"))),
            constraint=L2(option("weight_decay")),
            options=numbers,
            **common,
        )


class Adagrad(SteepestDescent):
    """The largest-entry norm with the memory of everything: ``g / (sqrt(sum of g^2) + eps)`` (Duchi et al. 2011).

    Arguments and defaults are those of torch.optim.Adagrad.

    Args:
        params: parameters, param groups or a model.
        lr: learning rate, divided by ``1 + (step - 1) lr_decay``.
        lr_decay: not for use with another ``step_size``.
        weight_decay: L2 regularization, added to the gradient.
        initial_accumulator_value: what the sum starts from.
        eps: added to its root.
        common: ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.

    Raises:
        ValueError: ``lr_decay`` with another ``step_size``.
    """

    geometry: ClassVar[Geometry] = NO_DECAY

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        **common: Unpack[Common],
    ) -> None:
        options = {"initial_accumulator_value": initial_accumulator_value, "eps": eps, "weight_decay": weight_decay}
        if "step_size" not in common:
            common["step_size"], options["lr_decay"] = InverseTime(option("lr_decay")), lr_decay
        elif lr_decay:
            raise ValueError("Adagrad: lr_decay is a step size of its own; leave it 0 beside another step_size")
        start = option("initial_accumulator_value")
        super().__init__(
            params,
            lr,
            Smoothed(Max(), eps=option("eps"), accumulate="sum", initial=start),
            constraint=L2(option("weight_decay")),
            options=options,
            **common,
        )


class Adam(SteepestDescent):
    """The largest-entry norm with memory: ``m / (sqrt(v) + eps)``, both averages bias-corrected (arXiv 1412.6980).

    ``m <- beta1 m + (1 - beta1) g``, ``v <- beta2 v + (1 - beta2) g^2``. With both betas and eps 0 it is sign descent.
    Arguments and defaults are those of torch.optim.Adam.

    Args:
        params: parameters, param groups or a model.
        lr: learning rate.
        betas: weights of the past in the averages of the gradient and of its square.
        eps: added to the root of the second moment.
        weight_decay: L2 regularization, added to the gradient; decoupled with ``decoupled_weight_decay``.
        amsgrad: divide by the largest second moment so far.
        decoupled_weight_decay: shrink the weights instead (:class:`AdamW`).
        cautious: then decay only entries that the update does not move away from 0 (arXiv 2510.12402).
        common: ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    geometry: ClassVar[Geometry] = NO_DECAY

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        cautious: bool = False,
        **common: Unpack[Common],
    ) -> None:
        if cautious and not decoupled_weight_decay:
            raise ValueError("Adam: cautious weight decay is decoupled; set decoupled_weight_decay, or use AdamW")
        decay = option("weight_decay")
        super().__init__(
            params,
            lr,
            Smoothed(Max(), option("betas", 1), option("eps"), maximum=option("amsgrad")),
            EMA(option("betas", 0), bias_correction=True),
            constraint=WeightDecay(decay, cautious=cautious) if decoupled_weight_decay else L2(decay),
            options={"betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad},
            **common,
        )


class AdamW(Adam):
    """:class:`Adam` with decoupled weight decay, ``w <- (1 - lr weight_decay) w - lr m / (sqrt(v) + eps)``.

    Arguments and defaults are those of torch.optim.AdamW (arXiv 1711.05101), ``cautious`` is that of :class:`Adam`.
    With a whole model, vectors and scalars are not decayed.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        cautious: bool = False,
        **common: Unpack[Common],
    ) -> None:
        how = {"decoupled_weight_decay": True, "cautious": cautious}
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **how, **common)


class NAdam(SteepestDescent):
    """:class:`Adam` that looks ahead, by a momentum that grows over the steps (Dozat 2016).

    ``u / (sqrt(v) + eps)``, where ``u`` is that of :class:`~normopt.momentum.WarmNesterov` and ``v`` is Adam's.
    Arguments and defaults are those of torch.optim.NAdam.

    Args:
        params: parameters, param groups or a model.
        lr: learning rate.
        betas: weights of the past in the averages of the gradient and of its square.
        eps: added to the root of the second moment.
        weight_decay: L2 regularization, added to the gradient; decoupled with ``decoupled_weight_decay``.
        momentum_decay: how fast the momentum grows from half of ``betas[0]`` to ``betas[0]``.
        decoupled_weight_decay: shrink the weights instead.
        common: ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    geometry: ClassVar[Geometry] = NO_DECAY

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params,
            lr,
            Smoothed(Max(), option("betas", 1), option("eps")),
            WarmNesterov(option("betas", 0), option("momentum_decay")),
            constraint=(WeightDecay if decoupled_weight_decay else L2)(option("weight_decay")),
            options={"betas": betas, "eps": eps, "weight_decay": weight_decay, "momentum_decay": momentum_decay},
            **common,
        )


class Adamax(SteepestDescent):
    """:class:`Adam` whose second moment is a fading maximum: ``m / u`` (arXiv 1412.6980, section 7.1).

    ``m <- beta1 m + (1 - beta1) g``, bias-corrected, ``u <- max(beta2 u, |g| + eps)``. Arguments and defaults are those
    of torch.optim.Adamax.

    Args:
        params: parameters, param groups or a model.
        lr: learning rate.
        betas: weights of the past in the average of the gradient and in the maximum.
        eps: added to the gradient's size.
        weight_decay: L2 regularization, added to the gradient.
        common: ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    geometry: ClassVar[Geometry] = NO_DECAY

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params,
            lr,
            Smoothed(Max(), option("betas", 1), option("eps"), accumulate="max"),
            EMA(option("betas", 0), bias_correction=True),
            constraint=L2(option("weight_decay")),
            options={"betas": betas, "eps": eps, "weight_decay": weight_decay},
            **common,
        )


class AdEMAMix(SteepestDescent):
    """:class:`AdamW` with a second, slow average of gradients: ``(m1 + alpha m2) / (sqrt(v) + eps)``.

    ``m1``, bias-corrected, and ``m2``, not corrected, forget at the rates ``betas[0]`` and ``betas[2]``
    (:class:`~normopt.momentum.TwoSpeed`). Arguments and defaults are those of the authors' code, apple/ml-ademamix
    (arXiv 2409.03137).

    Args:
        params: parameters, param groups or a model.
        lr: learning rate.
        betas: weights of the past in the fast average, the second moment and the slow average.
        alpha: factor of the slow average.
        beta3_warmup: steps in which the slow average's half-life grows to that of ``betas[2]``, or ``None``.
        alpha_warmup: steps in which ``alpha`` grows from 0, or ``None``.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        common: ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    geometry: ClassVar[Geometry] = NO_DECAY

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        beta3_warmup: int | None = None,
        alpha_warmup: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        averages = TwoSpeed(
            beta=option("betas", 0),
            slow=option("betas", 2),
            alpha=option("alpha"),
            slow_warmup=option("beta3_warmup"),
            alpha_warmup=option("alpha_warmup"),
        )
        warmups = {"beta3_warmup": beta3_warmup, "alpha_warmup": alpha_warmup}
        super().__init__(
            params,
            lr,
            Smoothed(Max(), option("betas", 1), option("eps")),
            averages,
            constraint=WeightDecay(option("weight_decay")),
            options={"betas": betas, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, **warmups},
            **common,
        )
