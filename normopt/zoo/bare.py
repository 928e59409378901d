"""The bare norms, with momentum and decoupled weight decay and nothing else."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from normopt.constraints.decay import WeightDecay
from normopt.ingredient import option
from normopt.momentum.averages import EMA
from normopt.norms import Column, Euclidean, Max, Norm, Nuclear, Row, Spectral
from normopt.norms.base import Scale
from normopt.optimizer import SteepestDescent
from normopt.polar import PolarCoefficients
from normopt.roles.options import Geometry
from normopt.zoo.common import Common, Unpack

SIGN: dict[str, Any] = {"norm": Max(), "weight_decay": 0.0}


class NormDescent(SteepestDescent):
    """``m <- momentum m + (1 - momentum) g``; ``w <- (1 - lr weight_decay) w - lr dualize(m)``.

    Given a whole model, all matrices move by the norm, vectors and scalars by signs and without decay.

    Args:
        params: parameters, param groups or a model.
        lr: learning rate: the norm of an update.
        norm: whose duality map.
        momentum: weight of the past.
        weight_decay: decoupled weight decay.
        common: ``geometry``, ``overrides``, ``step_size`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    _abstract: ClassVar[bool] = True
    geometry: ClassVar[Geometry] = {"vector": SIGN, "scalar": SIGN, "*": {}}

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor,
        norm: Norm,
        momentum: float,
        weight_decay: float,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params,
            lr,
            norm,
            EMA(option("momentum")),
            constraint=WeightDecay(option("weight_decay")),
            options={"momentum": momentum, "weight_decay": weight_decay},
            **common,
        )


class NormalizedSGD(NormDescent):
    """Gradient descent with steps of one length: the Euclidean norm, ``w <- w - lr m / ||m||`` for each tensor.

    See :class:`~normopt.zoo.bare.NormDescent` for the rest (Hazan et al., arXiv 1507.02030).

    Args:
        params: parameters, param groups or a model.
        lr: learning rate: the norm of an update.
        momentum: weight of the past.
        weight_decay: decoupled weight decay.
        scale: ``"unit"``; with ``"rms"``, updates have a root mean square of ``lr``. See :class:`~normopt.norms.Norm`.
        common: ``geometry``, ``overrides``, ``step_size`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        scale: Scale = "unit",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, lr, Euclidean(scale), momentum, weight_decay, **common)


class SpectralDescent(NormDescent):
    """Steps along the polar factor: the spectral norm (Carlson et al. 2015; Bernstein & Newhouse, arXiv 2409.20325).

    See :class:`~normopt.zoo.bare.NormDescent` for the rest. :class:`Muon` differs in Nesterov momentum, a cheaper polar
    factor, and AdamW beside it.

    Args:
        params: matrices, param groups or a model.
        lr: learning rate: the norm of an update.
        momentum: weight of the past.
        weight_decay: decoupled weight decay.
        scale: see :class:`~normopt.norms.Norm`.
        orthogonalize: the method of :func:`normopt.polar.polar`.
        orthogonalize_dtype: the dtype of its iteration.
        common: ``geometry``, ``overrides``, ``step_size`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        scale: Scale = "rms",
        orthogonalize: str | PolarCoefficients = "auto",
        orthogonalize_dtype: torch.dtype | str | None = None,
        **common: Unpack[Common],
    ) -> None:
        norm = Spectral(scale, orthogonalize, None, orthogonalize_dtype)
        super().__init__(params, lr, norm, momentum, weight_decay, **common)


class ColumnDescent(NormDescent):
    """Every column, one input, moves equally far: the largest column's norm.

    See :class:`~normopt.zoo.bare.NormDescent` for the rest.

    Args:
        params: matrices, param groups or a model.
        lr: learning rate: the norm of an update.
        momentum: weight of the past.
        weight_decay: decoupled weight decay.
        scale: see :class:`~normopt.norms.Norm`.
        common: ``geometry``, ``overrides``, ``step_size`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        scale: Scale = "rms",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, lr, Column(scale), momentum, weight_decay, **common)


class RowDescent(NormDescent):
    """Every row, one output, moves equally far: the largest row's norm.

    See :class:`~normopt.zoo.bare.NormDescent` for the rest.

    Args:
        params: matrices, param groups or a model.
        lr: learning rate: the norm of an update.
        momentum: weight of the past.
        weight_decay: decoupled weight decay.
        scale: see :class:`~normopt.norms.Norm`.
        common: ``geometry``, ``overrides``, ``step_size`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        scale: Scale = "rms",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, lr, Row(scale), momentum, weight_decay, **common)


class NuclearDescent(NormDescent):
    """Steps of rank one, along the leading singular pair: the nuclear norm.

    See :class:`~normopt.zoo.bare.NormDescent` for the rest.

    Args:
        params: matrices, param groups or a model.
        lr: learning rate: the norm of an update.
        momentum: weight of the past.
        weight_decay: decoupled weight decay.
        scale: see :class:`~normopt.norms.Norm`.
        common: ``geometry``, ``overrides``, ``step_size`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        scale: Scale = "rms",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, lr, Nuclear(scale), momentum, weight_decay, **common)
