"""Optimizers that keep scale-invariant weights from growing: AdamP and SGDP."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from normopt.constraints.tangent import TangentProjection
from normopt.directions.algebra import Identity
from normopt.directions.smoothed import Smoothed
from normopt.ingredient import option
from normopt.ingredient.view import View
from normopt.momentum.averages import EMA, HeavyBall
from normopt.norms import Max
from normopt.optimizer import SteepestDescent
from normopt.roles.options import Geometry
from normopt.zoo.common import NO_DECAY, Common, Unpack

#: Embeddings are seen as they are stored, so that a token is a row.
ROWS: Geometry = {**NO_DECAY, "embedding": {"view": View()}}


class AdamP(SteepestDescent):
    """:class:`AdamW` whose updates of scale-invariant weights lose their part along the weights (arXiv 2006.08217).

    See :class:`~normopt.constraints.TangentProjection`. Arguments and defaults are those of the adamp package. Tensors
    are projected as the matrices that their view shows: a fused QKV of a model as three. With a whole model, vectors
    and scalars are not decayed.

    Args:
        params: parameters, param groups or a model.
        lr: learning rate.
        betas: weights of the past in the averages of the gradient and of its square.
        eps: added to the root of the second moment; the least length of weights too.
        weight_decay: decoupled weight decay.
        delta: where ``|cos|`` of weights and gradient is below this, in units of that of random vectors, the update is
            projected.
        wd_ratio: factor of the decay of projected matrices.
        nesterov: average once more with the gradient.
        common: ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    geometry: ClassVar[Geometry] = ROWS

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        **common: Unpack[Common],
    ) -> None:
        numbers = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "delta": delta, "wd_ratio": wd_ratio}
        super().__init__(
            params,
            lr,
            Smoothed(Max(), option("betas", 1), option("eps")),
            EMA(option("betas", 0), option("nesterov"), bias_correction=True),
            constraint=TangentProjection(option("delta"), option("eps"), option("wd_ratio"), option("weight_decay")),
            options={**numbers, "nesterov": nesterov},
            **common,
        )


class SGDP(SteepestDescent):
    """:class:`SGD` whose updates of scale-invariant weights lose their part along the weights (arXiv 2006.08217).

    See :class:`AdamP`. The weight decay is decoupled and follows the length of the momentum's sum,
    ``w <- (1 - lr weight_decay / (1 - momentum)) w``. Arguments and defaults are those of the adamp package, which has
    none for ``lr``, takes ``nesterov`` with ``dampening`` or without momentum, and dampens where there is no momentum;
    here these are as in torch.optim.SGD. Without ``nesterov`` it projects the momentum itself, which then forgets what
    was along the weights; here the momentum remains the sum of gradients.

    Args:
        params: parameters, param groups or a model.
        lr: learning rate.
        momentum: weight of the past; 0 keeps no state.
        dampening: how much of each gradient is left out, the first included.
        weight_decay: decoupled weight decay.
        nesterov: step along ``g + momentum b``.
        eps: the least length of weights.
        delta: where ``|cos|`` of weights and gradient is below this, in units of that of random vectors, the update is
            projected.
        wd_ratio: factor of the decay of projected matrices.
        common: ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    geometry: ClassVar[Geometry] = ROWS

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        **common: Unpack[Common],
    ) -> None:
        numbers = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, "weight_decay": weight_decay}
        beta, decay = option("momentum"), option("weight_decay")
        super().__init__(
            params,
            lr,
            Identity(),
            HeavyBall(beta, option("dampening"), option("nesterov"), damp_first=True),
            constraint=TangentProjection(option("delta"), option("eps"), option("wd_ratio"), decay, beta),
            options={**numbers, "eps": eps, "delta": delta, "wd_ratio": wd_ratio},
            **common,
        )
