"""Optimizers that normalize gradients and keep little of them: SCALE, SWAN, SinkGD; their rotation, ARO; and AuON."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from normopt.constraints.decay import WeightDecay
from normopt.directions.algebra import Chain, Grafted, Identity
from normopt.directions.balanced import CoshScaled, Sinkhorn
from normopt.directions.subspace import Aligned
from normopt.ingredient import nearest, option
from normopt.momentum.averages import EMA
from normopt.norms import Direction, Euclidean, Max, Row, Spectral
from normopt.optimizer import SteepestDescent
from normopt.polar import PolarCoefficients
from normopt.stepsize.fixed import Constant
from normopt.zoo.common import Common, Unpack, adamw
from normopt.zoo.hidden import FixedWithAux, Hidden, WithAux

#: What ARO does in rotated rows.
BASES: dict[str, Direction] = {"sinkhorn": Sinkhorn(), "max": Max(), "row": Row("sqrt_in")}


class SCALE(SteepestDescent):
    """Rows of a root mean square of 1, and momentum for the head alone (arXiv 2506.16659).

    ``w <- (1 - lr weight_decay) w - lr g / rms(g)``, where each row of ``g``, one output, has its own rms (a column in
    the paper's layout). Of a whole model, the head's gradient is averaged first; an embedding, seen with one column a
    token, has one rms for each feature over the vocabulary, as in the authors' code; vectors and scalars move by AdamW.
    Given parameters, all are treated as hidden matrices: name the head's in a param group of its own with ``"momentum":
    0.9``. The defaults are those of OptimAI-Lab/Minimalist_LLM_Pretraining, ``lr`` that of its scripts for up to 350M
    parameters; rows whose rms is below 1e-8 are shortened there, and not here.

    Args:
        params: matrices, param groups or a model.
        lr: learning rate.
        weight_decay: decoupled weight decay, of matrices.
        momentum: weight of the past in the average of the head's gradient.
        aux_lr: learning rate of AdamW for vectors and scalars; ``None``: ``lr``.
        aux_betas: AdamW's betas.
        aux_eps: AdamW's eps.
        aux_weight_decay: AdamW's weight decay.
        common: ``geometry``, ``overrides``, ``step_size`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        *,
        aux_lr: float | None = None,
        aux_betas: tuple[float, float] = (0.9, 0.999),
        aux_eps: float = 1e-8,
        aux_weight_decay: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        aux = adamw(aux_betas, aux_eps, aux_weight_decay, {} if aux_lr is None else {"lr": aux_lr})
        self.geometry = {"unembedding": {"momentum": momentum}, "vector": aux, "scalar": aux, "*": {}}  # type: ignore[misc]
        decay = WeightDecay(option("weight_decay"))
        options = {"weight_decay": weight_decay}
        super().__init__(params, lr, Row("sqrt_in"), constraint=decay, options=options, **common)


class SWAN(Hidden):
    """Rows of one size, then the polar factor, without any state: the row norm and the spectral norm in a chain.

    ``h``: ``g`` with rows of a root mean square of 1; ``w <- (1 - lr weight_decay) w - lr lr_ratio polar(h)``, rescaled
    to the Frobenius norm of ``h``, by sqrt(max(m, n)) at full rank (arXiv 2412.13148). The paper whitens by a
    Newton-Schulz iteration of its own, which ends at the same polar factor, and its second version subtracts each row's
    mean first, which is not done here. Given a whole model, linear layers and convolutions move by this rule,
    everything else by AdamW.

    Args:
        params: matrices, param groups or a model.
        lr: learning rate, of AdamW too.
        weight_decay: decoupled weight decay of the matrices; the paper has none.
        lr_ratio: length of this rule's steps over ``lr``.
        orthogonalize: the method of :func:`normopt.polar.polar`.
        orthogonalize_dtype: the dtype of its iteration.
        common: ``aux_lr`` (``None``: ``lr``), ``aux_betas``, ``aux_eps`` and ``aux_weight_decay`` of AdamW;
            ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 0.02,
        weight_decay: float = 0.0,
        lr_ratio: float = 0.05,
        *,
        orthogonalize: str | PolarCoefficients = "auto",
        orthogonalize_dtype: torch.dtype | str | None = None,
        **common: Unpack[FixedWithAux],
    ) -> None:
        polar = Spectral("unit", orthogonalize, None, orthogonalize_dtype)
        super().__init__(
            params,
            lr,
            Chain(Row("sqrt_in"), Grafted(polar, Identity())),
            step_size=Constant(lr_ratio),
            own_length=True,
            options={"weight_decay": weight_decay},
            **common,
        )


class SinkGD(Hidden):
    """Rows and columns of a root mean square of 1 at once, without any state (arXiv 2502.06742).

    ``w <- (1 - lr weight_decay) w - lr lr_ratio sinkhorn(g)``, see :class:`~normopt.Sinkhorn`. Given a whole model,
    linear layers and convolutions move by this rule, everything else by AdamW.

    Args:
        params: matrices, param groups or a model.
        lr: learning rate, of AdamW too.
        weight_decay: decoupled weight decay of the matrices; the paper has none.
        iterations: of rows and columns.
        lr_ratio: length of this rule's steps over ``lr``.
        common: ``aux_lr`` (``None``: ``lr``), ``aux_betas``, ``aux_eps`` and ``aux_weight_decay`` of AdamW;
            ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 0.02,
        weight_decay: float = 0.0,
        iterations: int = 5,
        lr_ratio: float = 0.05,
        **common: Unpack[FixedWithAux],
    ) -> None:
        super().__init__(
            params,
            lr,
            Sinkhorn(iterations),
            step_size=Constant(lr_ratio),
            own_length=True,
            options={"weight_decay": weight_decay},
            **common,
        )


class ARO(Hidden):
    """Adaptively rotated: a stateless rule in rows that are turned to suit it (arXiv 2602.09006).

    ``m <- momentum m + (1 - momentum) g``; ``d = R f(R^T m)``, see :class:`~normopt.Aligned`;
    ``w <- (1 - lr weight_decay) w - lr scale d / rms(d)``. It is the shorter side that is rotated, where the authors'
    code rotates rows: of a tall matrix, with directions that the gradient has not got. ``lr`` and ``weight_decay`` are
    to be AdamW's. Given a whole model, linear layers and convolutions move by this rule, everything else by AdamW.

    Args:
        params: matrices, param groups or a model.
        lr: learning rate.
        weight_decay: decoupled weight decay of the matrices.
        momentum: weight of the past in the average of gradients.
        base: ``f``: ``"sinkhorn"``, ``"max"`` (the sign) or ``"row"``.
        scale: root mean square of an update.
        common: ``aux_lr`` (``None``: ``lr``), ``aux_betas``, ``aux_eps`` and ``aux_weight_decay`` of AdamW;
            ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.

    Raises:
        ValueError: an unknown ``base``.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        base: str = "sinkhorn",
        scale: float = 0.2,
        **common: Unpack[FixedWithAux],
    ) -> None:
        if base not in BASES:
            raise ValueError(f"ARO: unknown base {base!r}; {nearest(str(base), BASES)}")
        super().__init__(
            params,
            lr,
            Chain(Aligned(BASES[base]), Euclidean()),
            EMA(option("momentum")),
            Constant(scale),
            own_length=True,
            options={"momentum": momentum, "weight_decay": weight_decay},
            **common,
        )


class AuON(Hidden):
    """Averaged gradients over a brake that hardly brakes: :class:`~normopt.CoshScaled` (arXiv 2509.24320).

    ``u`` is Muon's average with Nesterov; ``w <- (1 - lr weight_decay) w - lr u / rms(cosh(gamma u / ||u||))``: up to a
    factor 1 + O(1/size), SGD with momentum. Arguments and defaults are those of ryyzn9/AuON at its head, whose updates
    are not normalized; in the paper's first version they are. Given a whole model, linear layers and convolutions move
    by this rule, everything else by AdamW, as in the authors' training script.

    Args:
        params: parameters, param groups or a model.
        lr: learning rate.
        momentum: weight of the past.
        weight_decay: decoupled weight decay.
        gamma: length of the argument of cosh.
        common: ``aux_lr`` (``None``: ``lr / 10``), ``aux_betas`` (by default 0.8 and 0.95), ``aux_eps`` and
            ``aux_weight_decay`` of AdamW; ``geometry``, ``overrides``, ``step_size`` and ``maximize`` of
            :class:`~normopt.SteepestDescent`.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 0.24,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        gamma: float = 1.5,
        **common: Unpack[WithAux],
    ) -> None:
        common.setdefault("aux_betas", (0.8, 0.95))
        super().__init__(
            params,
            lr,
            CoshScaled(option("gamma")),
            EMA(option("momentum"), nesterov=True),
            options={"momentum": momentum, "gamma": gamma, "weight_decay": weight_decay},
            aux_ratio=0.1,
            **common,
        )


class HybridAuON(Hidden):
    """:class:`AuON` after a polar factor: :class:`Muon` without a scale (arXiv 2509.24320).

    ``w <- (1 - lr weight_decay) w - lr o / rms(cosh(gamma o / ||o||))`` with ``o = polar(u)``. Arguments and defaults
    are those of ryyzn9/AuON at its head, in float32 as there. Whole models are treated as by :class:`AuON`.

    Args:
        params: matrices, param groups or a model.
        lr: learning rate.
        momentum: weight of the past.
        weight_decay: decoupled weight decay of the matrices.
        gamma: length of the argument of cosh.
        ns_steps: steps of the iteration; ``None`` is the method's own (5 for ``"newton-schulz"``).
        orthogonalize: the method of :func:`normopt.polar.polar`.
        orthogonalize_dtype: the dtype of its iteration.
        common: as for :class:`AuON`.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 0.24,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        gamma: float = 1.5,
        ns_steps: int | None = None,
        *,
        orthogonalize: str | PolarCoefficients = "newton-schulz",
        orthogonalize_dtype: torch.dtype | str | None = None,
        **common: Unpack[WithAux],
    ) -> None:
        common.setdefault("aux_betas", (0.8, 0.95))
        super().__init__(
            params,
            lr,
            Chain(Spectral("unit", orthogonalize, ns_steps, orthogonalize_dtype), CoshScaled(option("gamma"))),
            EMA(option("momentum"), nesterov=True),
            options={"momentum": momentum, "gamma": gamma, "weight_decay": weight_decay},
            aux_ratio=0.1,
            **common,
        )
