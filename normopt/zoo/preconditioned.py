"""Optimizers that remember second moments as matrices: Shampoo and its relatives."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from normopt.constraints.decay import WeightDecay
from normopt.directions.algebra import Chain, Grafted, Identity
from normopt.directions.bases import Eigenbasis
from normopt.directions.coordinates import Blocked, Rotated
from normopt.directions.smoothed import Smoothed
from normopt.directions.whitening import KLWhitened
from normopt.ingredient import check_range, nearest, option
from normopt.momentum.averages import EMA
from normopt.norms import Column, Direction, Euclidean, Max, Spectral
from normopt.optimizer import SteepestDescent
from normopt.roles.options import Geometry
from normopt.stepsize.fixed import Constant
from normopt.zoo.common import NO_DECAY, Common, Unpack, second
from normopt.zoo.hidden import FixedWithAux, Hidden, WithAux

#: Whose length an update of Shampoo can have.
GRAFTS: dict[str, Direction] = {
    "adam": Smoothed(Max(), option("graft_beta2"), option("graft_eps")),
    "rmsprop": Smoothed(Max(), option("graft_beta2"), option("graft_eps"), bias_correction=False),
    "sgd": Identity(),
}


class Shampoo(SteepestDescent):
    """The spectral norm with memory: ``L^(-1/4) m R^(-1/4)``, where ``L`` and ``R`` sum up ``g g^T`` and ``g^T g``.

    ``m`` is the bias-corrected average of gradients; ``w <- (1 - lr weight_decay) w - lr L^(-1/4) m R^(-1/4)``. Vectors
    are multiplied by ``R^(-1/2)``, the full-matrix Adagrad. ``betas=(0, 1)`` without grafting is arXiv 1802.09568.
    Defaults are those of facebookresearch/optimizers' Distributed Shampoo (arXiv 2309.06497), which differs in this: it
    starts to precondition at step ``preconditioning_frequency``, and moves by the graft or the momentum before, where
    here roots are computed at the first step already; it cuts blocks of ``block_size`` and a rest, where here all
    blocks of a side are equally long; and it damps directions that no root has seen by ``eps`` alone, where here they
    wait for the next root if ``eps`` is below rounding errors.

    Args:
        params: parameters, param groups or a model.
        lr: learning rate.
        betas: weights of the past in the averages of the gradient and of its second moments; 1 for the latter: their
            sum. Whether sum or average is the same for all param groups.
        eps: added to the diagonals of the second moments.
        weight_decay: decoupled weight decay.
        graft: take each block's length from another update: ``"adam"``, ``"rmsprop"`` (without bias correction), both
            of the averaged gradient, ``"sgd"``, the averaged gradient itself, or ``None`` (arXiv 2002.11803).
        preconditioning_frequency: compute roots at the first step and at every multiple of this.
        block_size: longer sides are cut into blocks, each with roots of its own.
        exponent: the power of each inverse root; ``None``: 1/4 for matrices, 1/2 for vectors.
        graft_beta2: weight of the past in the second moment of ``"adam"`` and ``"rmsprop"``.
        graft_eps: added to its root.
        common: ``geometry``, ``overrides``, ``step_size`` and ``maximize`` of :class:`~normopt.SteepestDescent`.

    Raises:
        ValueError: an unknown ``graft``, or a number out of range.
    """

    geometry: ClassVar[Geometry] = NO_DECAY

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 1.0),
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        graft: str | None = None,
        preconditioning_frequency: int = 1,
        block_size: int = 1024,
        exponent: float | None = None,
        *,
        graft_beta2: float = 0.999,
        graft_eps: float = 1e-10,
        **common: Unpack[Common],
    ) -> None:
        if graft is not None and graft not in GRAFTS:
            raise ValueError(f"Shampoo: unknown graft {graft!r}; {nearest(str(graft), GRAFTS)}")
        shampoo: Direction = Smoothed(
            Spectral("unit", exponent=exponent),
            option("betas", 1),
            option("eps"),
            accumulate="sum" if second(betas) == 1 else "ema",
            frequency=preconditioning_frequency,
        )
        check_range(self, "graft_beta2", graft_beta2, 0, 1)
        check_range(self, "graft_eps", graft_eps, 0, float("inf"))
        numbers = {"graft_beta2": graft_beta2, "graft_eps": graft_eps} if graft in ("adam", "rmsprop") else {}
        super().__init__(
            params,
            lr,
            Blocked(Grafted(shampoo, GRAFTS[graft]) if graft else shampoo, block_size),
            EMA(option("betas", 0), bias_correction=True),
            constraint=WeightDecay(option("weight_decay")),
            options={"betas": betas, "eps": eps, "weight_decay": weight_decay, **numbers},
            **common,
        )


class SOAP(SteepestDescent):
    """Adam in the eigenbasis of Shampoo's second moments (arXiv 2409.11321).

    The first call builds the bases and moves nothing. Then, with ``Q_L``, ``Q_R`` the bases, ``m`` Adam's average of
    gradients and ``v`` that of the squares of ``Q_L^T g Q_R``: ``d = Q_L (Q_L^T m Q_R / (sqrt(v) + eps)) Q_R^T``,
    ``w <- (1 - lr weight_decay) (w - lr d)``; then the second moments see ``g``, and the bases follow. Arguments and
    defaults are those of nikhilvyas/SOAP without ``merge_dims`` and ``data_format``: convolutions are seen as matrices.

    Args:
        params: parameters, param groups or a model.
        lr: learning rate.
        betas: weights of the past in Adam's averages.
        shampoo_beta: that in the averages of ``g g^T`` and ``g^T g``; negative: ``betas[1]``.
        eps: added to the root of ``v`` before the bias correction.
        weight_decay: decoupled weight decay, of the weights after the update.
        precondition_frequency: steps from one change of basis to the next.
        max_precond_dim: longer sides are not rotated.
        precondition_1d: rotate vectors too, matrices with a single row or column among them.
        normalize_grads: give every update a root mean square of 1. (The authors' code then multiplies by Adam's bias
            correction; here it is a part of what is normalized.)
        correct_bias: Adam's bias correction.
        common: ``geometry``, ``overrides``, ``step_size`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    geometry: ClassVar[Geometry] = NO_DECAY

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float = -1,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        precondition_1d: bool = False,
        normalize_grads: bool = False,
        correct_bias: bool = True,
        **common: Unpack[Common],
    ) -> None:
        numbers: dict[str, Any] = {
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "precondition_frequency": precondition_frequency,
            "correct_bias": correct_bias,
        }
        beta = option("betas", 1)
        check_range(self, "shampoo_beta", shampoo_beta, -float("inf"), 1)
        if shampoo_beta >= 0:
            beta, numbers["shampoo_beta"] = option("shampoo_beta"), shampoo_beta
        adam = Smoothed(Max(), option("betas", 1), option("eps"), option("correct_bias"), eps_at="raw")
        basis = Eigenbasis(beta, option("precondition_frequency"), max_precond_dim, precondition_1d)
        soap = Rotated(adam, basis)
        super().__init__(
            params,
            lr,
            Chain(soap, Euclidean()) if normalize_grads else soap,
            EMA(option("betas", 0), bias_correction=option("correct_bias")),
            constraint=WeightDecay(option("weight_decay"), after=True),
            options=numbers,
            **common,
        )


class KLShampoo(Hidden):
    """Shampoo with factors that are learnt from gradients whitened by each other, and exponents 1/2 (arXiv 2509.03378).

    The first call builds the bases and moves nothing. Then ``m <- beta1 m + (1 - beta1) g`` and ``w <- (1 - lr
    weight_decay) (w - lr L^(-1/2) m R^(-1/2))``, see :class:`~normopt.KLWhitened`; there is no bias correction.
    Arguments and defaults are those of yorkerlin/KL-Methods, which computes in bfloat16; this is float32.

    Given a whole model, hidden matrices (linear layers and convolutions) move by this rule, everything else by AdamW.

    Args:
        params: matrices, param groups or a model.
        lr: learning rate.
        betas: weights of the past in the averages of the gradient and of the factors.
        eps: added to the roots of the products of the factors' eigenvalues.
        weight_decay: decoupled weight decay of the matrices, after the update.
        precondition_frequency: steps from one change of basis to the next.
        init_factor: what all eigenvalues start from.
        common: ``aux_lr`` (``None``: ``lr``), ``aux_betas``, ``aux_eps`` and ``aux_weight_decay`` of AdamW;
            ``geometry``, ``overrides``, ``step_size`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        init_factor: float = 0.1,
        **common: Unpack[WithAux],
    ) -> None:
        super().__init__(
            params,
            lr,
            KLWhitened(option("betas", 1), option("eps"), option("precondition_frequency"), init_factor),
            EMA(option("betas", 0)),
            decay_after=True,
            options={
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "precondition_frequency": precondition_frequency,
            },
            **common,
        )


class ASGO(Hidden):
    """One-sided Shampoo with a fixed length: ``m`` over the root of averaged ``g g^T`` (arXiv 2503.20762).

    ``m <- momentum m + (1 - momentum) g``; ``V <- beta2 V + (1 - beta2) g g^T`` for wide matrices, ``g^T g`` for tall
    and square ones; ``u = V^(-1/2) m`` or ``m V^(-1/2)``; ``w <- (1 - lr weight_decay) w - lr 0.2 u / rms(u)``.
    Arguments and defaults are those of infinity-stars/ASGO; roots are exact, by eigendecomposition.

    Given a whole model, hidden matrices (linear layers and convolutions) and the head move by this rule, embeddings and
    vectors by AdamW with the same learning rate.

    Args:
        params: matrices, param groups or a model.
        lr: learning rate.
        momentum: weight of the past.
        beta2: weight of the past in ``V``.
        weight_decay: decoupled weight decay of the matrices.
        eps: added to the diagonal of ``V``.
        common: ``cautious`` decay; AdamW's ``aux_lr`` (``None``: ``lr``), ``aux_betas``, ``aux_eps`` and
            ``aux_weight_decay``; ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        beta2: float = 0.8,
        weight_decay: float = 0.1,
        eps: float = 1e-10,
        **common: Unpack[FixedWithAux],
    ) -> None:
        spectral = Spectral("unit", sides="smaller")
        super().__init__(
            params,
            lr,
            Chain(Smoothed(spectral, option("beta2"), option("eps"), bias_correction=False), Euclidean()),
            EMA(option("momentum")),
            Constant(0.2),
            own_length=True,
            head=True,
            options={"momentum": momentum, "beta2": beta2, "eps": eps, "weight_decay": weight_decay},
            **common,
        )


class DASGO(Hidden):
    """:class:`ASGO` with diagonals only: the column norm with memory, with a fixed length (arXiv 2503.20762).

    ``m <- momentum m + (1 - momentum) g``; ``v``, one number for each column, averages the sums of ``g^2``;
    ``u = m / sqrt(v + eps)``; ``w <- (1 - lr weight_decay) w - lr 0.2 u / rms(u)``. Arguments and defaults are those of
    infinity-stars/ASGO. Whole models are treated as by :class:`ASGO`.

    Args:
        params: matrices, param groups or a model.
        lr: learning rate.
        momentum: weight of the past.
        beta2: weight of the past in ``v``.
        weight_decay: decoupled weight decay of the matrices.
        eps: added to ``v``.
        common: ``cautious`` decay; AdamW's ``aux_lr`` (``None``: ``lr``), ``aux_betas``, ``aux_eps`` and
            ``aux_weight_decay``; ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        beta2: float = 0.95,
        weight_decay: float = 0.1,
        eps: float = 1e-8,
        **common: Unpack[FixedWithAux],
    ) -> None:
        columns = Smoothed(Column("unit"), option("beta2"), option("eps"), bias_correction=False, eps_at="moment")
        super().__init__(
            params,
            lr,
            Chain(columns, Euclidean()),
            EMA(option("momentum")),
            Constant(0.2),
            own_length=True,
            head=True,
            options={"momentum": momentum, "beta2": beta2, "eps": eps, "weight_decay": weight_decay},
            **common,
        )
