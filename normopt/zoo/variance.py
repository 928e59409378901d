"""Optimizers that reduce the variance of gradients by looking back: STORM+."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from normopt.constraints.decay import L2
from normopt.directions.algebra import Identity
from normopt.ingredient import option
from normopt.momentum.recursive import Recursive
from normopt.optimizer import SteepestDescent
from normopt.roles.options import Geometry
from normopt.stepsize.fixed import Storm
from normopt.zoo.common import NO_DECAY, Fixed, Unpack


class STORMPlus(SteepestDescent):
    """SGD with recursive momentum, and neither a learning rate nor a momentum to tune (arXiv 2111.01040).

    ``d <- g(w) + (1 - a) (d - g(w'))``, both gradients of one sample, ``w'`` the weights before the last step;
    ``w <- w - eta d``. ``a = (1 + G / a0)^(-2/3)`` with ``G`` the sum of ``|g|^2`` over all tensors and all steps
    before, ``eta = lr (sum of |d|^2 / a / b0)^(-1/3)`` with the next step's ``a``. Without noise this is gradient
    descent.

    ``step`` needs a closure and calls it twice from the second step on, which must see the same sample; see
    :meth:`normopt.SteepestDescent.step`. Memory: two more numbers for each parameter.

    Args:
        params: parameters, param groups or a model.
        lr: factor on the rate, for schedules; the paper's 1.
        a0: divides the sum of squared gradients; the paper's 1.
        b0: divides the sum that the rate is made of; the paper's 1.
        weight_decay: L2 regularization, added to both gradients.
        common: ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    geometry: ClassVar[Geometry] = NO_DECAY

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1.0,
        a0: float = 1.0,
        b0: float = 1.0,
        weight_decay: float = 0.0,
        **common: Unpack[Fixed],
    ) -> None:
        super().__init__(
            params,
            lr,
            Identity(),
            Recursive(None),
            Storm(option("a0"), option("b0")),
            L2(option("weight_decay")),
            options={"a0": a0, "b0": b0, "weight_decay": weight_decay},
            **common,
        )
