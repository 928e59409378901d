"""Muon's relatives: the polar factor rescaled afterwards, signs before it, the dual norm's length, a low rank."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from normopt.directions.algebra import Chain, Grafted, Identity
from normopt.directions.smoothed import Smoothed
from normopt.directions.subspace import LowRank
from normopt.ingredient import nearest, option
from normopt.momentum.averages import EMA
from normopt.norms import Column, Euclidean, Max, Norm, Row, Spectral
from normopt.polar import PolarCoefficients
from normopt.stepsize.fixed import Constant, Sharp
from normopt.zoo.common import Unpack
from normopt.zoo.hidden import FixedWithAux, Hidden, WithAux

#: What MuonPlus normalizes after the polar factor, in order.
NORMALIZATIONS: dict[str, tuple[type[Norm], ...]] = {
    "none": (),
    "row": (Row,),
    "col": (Column,),
    "row_col": (Row, Column),
    "col_row": (Column, Row),
}


class NorMuon(Hidden):
    """:class:`Muon` whose rows are brought to one size over time: the polar factor, then the row norm with memory.

    ``u`` is Muon's average, ``o = polar(u)``; ``v``, one number for each row, averages the squares of ``o``'s rows;
    ``w <- (1 - lr weight_decay) w - lr sqrt(max(1, m/n)) o / (sqrt(v) + eps)``, rescaled to the Frobenius norm of ``o``
    (arXiv 2510.05491). Arguments and defaults are those of zichongli5/NorMuon; ``eps`` is added to the root of a sum of
    squares here, of a mean there. Given a whole model, linear layers and convolutions move by this rule, everything
    else by AdamW.

    Args:
        params: matrices, param groups or a model.
        lr: learning rate.
        weight_decay: decoupled weight decay of the matrices.
        momentum: weight of the past in the average of gradients.
        beta2: that in ``v``.
        nesterov: average once more with the gradient.
        ns_steps: steps of the iteration; ``None`` is the method's own (5 for ``"newton-schulz"``).
        eps: added to the roots of ``v``.
        orthogonalize: the method of :func:`normopt.polar.polar`.
        orthogonalize_dtype: the dtype of its iteration.
        common: ``aux_lr`` (``None``: ``lr / 2``, as for Muon), ``aux_betas``, ``aux_eps`` and ``aux_weight_decay`` of
            AdamW; ``geometry``, ``overrides``, ``step_size`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        beta2: float = 0.95,
        nesterov: bool = True,
        ns_steps: int | None = None,
        eps: float = 1e-10,
        *,
        orthogonalize: str | PolarCoefficients = "newton-schulz",
        orthogonalize_dtype: torch.dtype | str | None = torch.bfloat16,
        **common: Unpack[WithAux],
    ) -> None:
        rows = Smoothed(Row("unit"), option("beta2"), option("eps"), bias_correction=False)
        super().__init__(
            params,
            lr,
            Chain(Spectral("max1", orthogonalize, ns_steps, orthogonalize_dtype), Grafted(rows, Identity())),
            EMA(option("momentum"), option("nesterov")),
            options={
                "momentum": momentum,
                "beta2": beta2,
                "nesterov": nesterov,
                "eps": eps,
                "weight_decay": weight_decay,
            },
            aux_ratio=0.5,
            **common,
        )


class AdaMuon(Hidden):
    """Adam's denominator after the polar factor of a sign: ``polar(sign(u))``, then the max norm with memory.

    ``u`` is Muon's average, ``o = polar(sign(u))``; ``v <- momentum v + (1 - momentum) o^2``;
    ``w <- (1 - lr weight_decay) w - lr 0.2 d / rms(d)`` with ``d = o / (sqrt(v) + eps)`` (arXiv 2507.11005). Arguments
    and defaults are those of Chongjie-Si/AdaMuon. Given a whole model, linear layers and convolutions move by this
    rule, everything else by AdamW.

    Args:
        params: matrices, param groups or a model.
        lr: learning rate.
        weight_decay: decoupled weight decay of the matrices.
        momentum: weight of the past in both averages.
        nesterov: average once more with the gradient.
        ns_steps: steps of the iteration; ``None`` is the method's own (5 for ``"newton-schulz"``).
        eps: added to the root of ``v``.
        orthogonalize: the method of :func:`normopt.polar.polar`.
        orthogonalize_dtype: the dtype of its iteration.
        common: ``aux_lr`` (``None``: ``lr``), ``aux_betas``, ``aux_eps`` and ``aux_weight_decay`` of AdamW;
            ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 0.02,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int | None = None,
        eps: float = 1e-8,
        *,
        orthogonalize: str | PolarCoefficients = "newton-schulz",
        orthogonalize_dtype: torch.dtype | str | None = torch.bfloat16,
        **common: Unpack[FixedWithAux],
    ) -> None:
        polar = Spectral("unit", orthogonalize, ns_steps, orthogonalize_dtype)
        adapted = Smoothed(Max(), option("momentum"), option("eps"), bias_correction=False)
        super().__init__(
            params,
            lr,
            Chain(Max(), polar, adapted, Euclidean()),
            EMA(option("momentum"), option("nesterov")),
            Constant(0.2),
            own_length=True,
            options={"momentum": momentum, "nesterov": nesterov, "eps": eps, "weight_decay": weight_decay},
            **common,
        )


class MuonPlus(Hidden):
    """:class:`Muon` whose rows or columns are normalized after the polar factor (arXiv 2602.21545).

    ``w <- (1 - lr weight_decay) w - lr sqrt(m/n) normalize(polar(u))``, where ``u`` is Muon's average: the authors'
    sum of gradients has the same polar factor. The rows of a wide polar factor and the columns of a tall one have
    length 1 already, so that it is the other side that counts. Arguments and defaults are those of K1seki221/MuonPlus,
    where ``normalize`` is ``norm_mode`` (``"none"`` in the code, ``"row_col"`` in its documentation). Given a whole
    model, linear layers and convolutions move by this rule, everything else by AdamW.

    Args:
        params: matrices, param groups or a model.
        lr: learning rate.
        weight_decay: decoupled weight decay of the matrices.
        momentum: weight of the past.
        nesterov: average once more with the gradient.
        ns_steps: steps of the iteration; ``None`` is the method's own (5 for ``"newton-schulz"``).
        normalize: ``"none"``, ``"row"``, ``"col"``, ``"row_col"`` (rows, then columns) or ``"col_row"``.
        orthogonalize: the method of :func:`normopt.polar.polar`.
        orthogonalize_dtype: the dtype of its iteration.
        common: ``aux_lr`` (``None``: ``lr``), ``aux_betas``, ``aux_eps`` and ``aux_weight_decay`` of AdamW;
            ``geometry``, ``overrides``, ``step_size`` and ``maximize`` of :class:`~normopt.SteepestDescent`.

    Raises:
        ValueError: an unknown ``normalize``.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int | None = None,
        normalize: str = "row_col",
        *,
        orthogonalize: str | PolarCoefficients = "newton-schulz",
        orthogonalize_dtype: torch.dtype | str | None = torch.bfloat16,
        **common: Unpack[WithAux],
    ) -> None:
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"MuonPlus: unknown normalize {normalize!r}; {nearest(str(normalize), NORMALIZATIONS)}")
        norms: list[Norm] = [Spectral("unit", orthogonalize, ns_steps, orthogonalize_dtype)]
        norms += [norm("unit") for norm in NORMALIZATIONS[normalize]]
        norms[-1] = replace(norms[-1], scale="ratio")
        super().__init__(
            params,
            lr,
            Chain(*norms),
            EMA(option("momentum"), option("nesterov")),
            options={"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay},
            **common,
        )


class PolarGrad(Hidden):
    """Steepest descent under the spectral norm, as long as the dual norm: nuclear norm times polar factor.

    ``m <- momentum m + (1 - momentum) g``; ``w <- (1 - lr weight_decay) w - lr ||m||_nuclear polar(m)``, where the
    nuclear norm is taken as ``<m, polar(m)>`` (arXiv 2505.21799). Arguments and defaults are those of
    timlautk/polargrad without ``polar_first``; its polar factor is a converged one, as here. Unlike Muon's, steps
    shrink with the gradient. Given a whole model, linear layers and convolutions move by this rule, everything else by
    AdamW.

    Args:
        params: matrices, param groups or a model.
        lr: learning rate.
        weight_decay: decoupled weight decay of the matrices.
        momentum: weight of the past.
        orthogonalize: the method of :func:`normopt.polar.polar`.
        orthogonalize_dtype: the dtype of its iteration.
        common: ``aux_lr`` (``None``: ``lr / 2``, as for Muon), ``aux_betas``, ``aux_eps`` and ``aux_weight_decay`` of
            AdamW; ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        *,
        orthogonalize: str | PolarCoefficients = "polar-express",
        orthogonalize_dtype: torch.dtype | str | None = None,
        **common: Unpack[FixedWithAux],
    ) -> None:
        super().__init__(
            params,
            lr,
            Spectral("unit", orthogonalize, None, orthogonalize_dtype),
            EMA(option("momentum")),
            Sharp(),
            own_length=True,
            options={"momentum": momentum, "weight_decay": weight_decay},
            aux_ratio=0.5,
            **common,
        )


class Dion(Hidden):
    """A low-rank :class:`Muon`, with a power iteration in place of the polar factor and error feedback.

    :class:`~normopt.LowRank` without another momentum: ``w <- (1 - lr weight_decay) w - lr sqrt(m/n) P Q^T`` (arXiv
    2504.05295). Arguments and defaults are those of microsoft/dion on one device. Given a whole model, linear layers
    and convolutions move by this rule, everything else by AdamW.

    Args:
        params: matrices, param groups or a model.
        lr: learning rate.
        mu: weight of the past in what the low-rank part leaves of the momentum.
        weight_decay: decoupled weight decay of the matrices.
        rank_fraction: rank of an update over the shorter side, in (0, 1].
        common: ``aux_lr`` (``None``: ``lr``), ``aux_betas``, ``aux_eps`` and ``aux_weight_decay`` of AdamW;
            ``geometry``, ``overrides``, ``step_size`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 0.01,
        mu: float = 0.95,
        weight_decay: float = 0.01,
        rank_fraction: float = 1.0,
        **common: Unpack[WithAux],
    ) -> None:
        super().__init__(
            params,
            lr,
            LowRank(rank_fraction, option("mu")),
            options={"mu": mu, "weight_decay": weight_decay},
            **common,
        )
