"""What optimizers of hidden matrices share: AdamW for all the rest of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from normopt.constraints.decay import WeightDecay
from normopt.ingredient import option
from normopt.momentum.base import Momentum
from normopt.norms import Direction
from normopt.optimizer import SteepestDescent
from normopt.stepsize.base import StepSize
from normopt.stepsize.fixed import Constant
from normopt.stepsize.free import LearningRateFree
from normopt.zoo.common import Common, Fixed, Unpack, adamw, with_radius


class FixedWithAux(Fixed, total=False):
    """:class:`~normopt.zoo.common.Fixed`, cautious decay, and the arguments of AdamW for what is no hidden matrix."""

    cautious: bool
    aux_lr: float | None
    aux_betas: tuple[float, float]
    aux_eps: float
    aux_weight_decay: float


class WithAux(FixedWithAux, Common, total=False):
    """The same for optimizers without a step size of their own."""


class Hidden(SteepestDescent):
    """Of a whole model, linear layers and convolutions move by the optimizer's own rule, everything else by AdamW.

    Args:
        params: matrices, param groups or a model.
        lr: learning rate.
        norm: the own rule's direction.
        momentum: its momentum.
        step_size: its step size; AdamW has it too unless ``own_length``.
        own_length: the step size belongs to the own rule alone.
        options: numbers that the own rule reads; ``weight_decay`` is decoupled.
        decay_after: decay what the own rule has moved, the update included; AdamW decays before. Not with ``cautious``.
        head: the output layer moves by the own rule too.
        cautious: decay only entries that the update does not move away from 0 (arXiv 2510.12402), AdamW's too.
        aux_ratio: AdamW's learning rate over ``lr`` when ``aux_lr`` is ``None``.
        aux_lr: learning rate of AdamW.
        aux_betas: its betas.
        aux_eps: its eps.
        aux_weight_decay: its decoupled weight decay.
        common: ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    _abstract: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor,
        norm: Direction,
        momentum: Momentum | None = None,
        step_size: str | StepSize = "constant",
        *,
        own_length: bool = False,
        options: Mapping[str, Any],
        decay_after: bool = False,
        head: bool = False,
        cautious: bool = False,
        aux_ratio: float = 1.0,
        aux_lr: float | None = None,
        aux_betas: tuple[float, float] = (0.9, 0.95),
        aux_eps: float = 1e-8,
        aux_weight_decay: float = 0.0,
        **common: Unpack[Fixed],
    ) -> None:
        ratio = {} if aux_ratio == 1 else {"lr_ratio": aux_ratio}
        rates: dict[str, Any] = ratio if aux_lr is None else {"lr": aux_lr}
        step_size = step_size if own_length else with_radius(step_size)
        if isinstance(step_size, LearningRateFree):
            if aux_lr is not None and not float(lr) > 0:
                raise ValueError(f"aux_lr counts beside lr under {step_size}, so that lr must be positive, got {lr!r}")
            rates = {"radius": aux_ratio if aux_lr is None else aux_lr / float(lr)}
            options = {**options, "radius": 1.0}
        aux = adamw(aux_betas, aux_eps, aux_weight_decay, rates)
        if own_length:
            aux["step_size"] = Constant()
        if decay_after:
            aux["constraint"] = WeightDecay(option("weight_decay"))
        own: dict[str, Any] = {"linear": {}, "conv": {}, **({"unembedding": {}} if head else {})}
        self.geometry = {**own, "*": aux}  # type: ignore[misc]
        decay = WeightDecay(option("weight_decay"), decay_after, cautious)
        super().__init__(params, lr, norm, momentum, step_size, decay, options=options, **common)
