"""Optimizers of the Euclidean norm."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from normopt.constraints.decay import L2
from normopt.directions.algebra import Identity
from normopt.ingredient import option
from normopt.momentum.averages import HeavyBall
from normopt.optimizer import SteepestDescent
from normopt.roles.options import Geometry
from normopt.zoo.common import NO_DECAY, Common, Unpack


class SGD(SteepestDescent):
    """Gradient descent with a heavy ball: steepest descent under the Euclidean norm, as long as the dual norm.

    ``g <- g + weight_decay w``, ``b <- momentum b + (1 - dampening) g``, ``w <- w - lr b``. Arguments and defaults are
    those of torch.optim.SGD.

    Args:
        params: parameters, param groups or a model.
        lr: learning rate.
        momentum: weight of the past; 0 keeps no state.
        dampening: how much of each later gradient is left out.
        weight_decay: L2 regularization, added to the gradient.
        nesterov: step along ``g + momentum b``.
        common: ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    geometry: ClassVar[Geometry] = NO_DECAY

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **common: Unpack[Common],
    ) -> None:
        numbers = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(
            params,
            lr,
            Identity(),
            HeavyBall(option("momentum"), option("dampening"), option("nesterov")),
            constraint=L2(option("weight_decay")),
            options=numbers,
            **common,
        )
