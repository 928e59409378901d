"""Optimizers of weights that keep their norm: AdamH and MuonH, and NaP on top of any other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from normopt.constraints.bounds import FrobeniusSphere
from normopt.directions.smoothed import Smoothed
from normopt.ingredient import nearest, option, parse
from normopt.momentum.averages import EMA
from normopt.norms import Max, Spectral
from normopt.optimizer import SteepestDescent
from normopt.polar import PolarCoefficients
from normopt.rule import Rule
from normopt.stepsize.fixed import Constant
from normopt.stepsize.trust import TrustRatio
from normopt.zoo.common import Fixed, Unpack

#: Adam's momentum and direction, with its numbers in the param group.
ADAM: Mapping[str, Any] = {
    "norm": Smoothed(Max(), option("betas", 1), option("eps")),
    "momentum": EMA(option("betas", 0), bias_correction=True),
}
FREE: Mapping[str, Any] = {**ADAM, "step_size": Constant(), "constraint": None}


class AdamH(SteepestDescent):
    """Adam on spheres: every matrix keeps the Frobenius norm ``R`` that it starts with (Hyperball, Wen et al. 2025).

    ``w <- R n(w - lr R n(u))``, ``n(x) = x / ||x||_F``, ``u`` Adam's update: ``lr`` is the distance moved relative to
    the weights. No weight decay. With a model this holds for hidden matrices and for the head; embeddings, vectors and
    scalars move by Adam. Gains must be there to scale what the matrices no longer can, as those of RMSNorm do. A matrix
    that starts at 0 has no sphere: its step is ``lr u`` until it has moved, then ``lr`` times its norm.

    Args:
        params: matrices, param groups or a model.
        lr: learning rate, relative to the weights: 2.5e-3 to 1e-2 in the source.
        betas: weights of the past in the averages of the gradient and of its square.
        eps: added to the root of the second moment.
        aux_lr: learning rate of Adam for everything else; ``None``: ``lr``.
        common: ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 5e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        aux_lr: float | None = None,
        **common: Unpack[Fixed],
    ) -> None:
        free = {**FREE, **({} if aux_lr is None else {"lr": aux_lr})}
        self.geometry = {"linear": {}, "conv": {}, "unembedding": {}, "*": free}  # type: ignore[misc]
        super().__init__(
            params,
            lr,
            ADAM["norm"],
            ADAM["momentum"],
            TrustRatio(),
            FrobeniusSphere(),
            options={"betas": betas, "eps": eps},
            **common,
        )


class MuonH(SteepestDescent):
    """Muon on spheres: :class:`AdamH` with Muon's update for hidden matrices (Hyperball, Wen et al. 2025).

    ``w <- R n(w - lr R n(polar(m)))``, with Muon's Nesterov average ``m``. With a model, hidden matrices move by this
    rule, the head by :class:`AdamH` at the same rate, everything else by Adam.

    Args:
        params: matrices, param groups or a model.
        lr: learning rate, relative to the weights.
        momentum: weight of the past.
        nesterov: average once more with the gradient.
        orthogonalize: the method of :func:`normopt.polar.polar`.
        orthogonalize_dtype: the dtype of its iteration.
        aux_lr: learning rate of Adam for embeddings, vectors and scalars; ``None``: ``lr``.
        aux_betas: Adam's betas, those of the head too.
        aux_eps: Adam's eps.
        common: ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 5e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        orthogonalize: str | PolarCoefficients = "newton-schulz",
        orthogonalize_dtype: torch.dtype | str | None = torch.bfloat16,
        aux_lr: float | None = None,
        aux_betas: tuple[float, float] = (0.9, 0.95),
        aux_eps: float = 1e-8,
        **common: Unpack[Fixed],
    ) -> None:
        head = {**ADAM, "betas": aux_betas, "eps": aux_eps}
        free = {**FREE, **head, **({} if aux_lr is None else {"lr": aux_lr})}
        self.geometry = {"linear": {}, "conv": {}, "unembedding": head, "*": free}  # type: ignore[misc]
        super().__init__(
            params,
            lr,
            Spectral("unit", orthogonalize, None, orthogonalize_dtype),
            EMA(option("momentum"), option("nesterov")),
            TrustRatio(),
            FrobeniusSphere(),
            options={"momentum": momentum, "nesterov": nesterov},
            **common,
        )


class NaP(SteepestDescent):
    """Normalize-and-Project on top of any optimizer (Lyle et al., arXiv 2407.01800).

    After every step of ``base`` each hidden matrix gets the Frobenius norm back that it started with,
    ``w <- R w / ||w||_F``; the learning rate then alone says how fast directions turn, and needs a schedule.
    Embeddings, the output layer, vectors and scalars are left to ``base``. The network should normalize before its
    nonlinearities, so that the norms of hidden matrices do not matter. Given parameters in place of a model, all
    matrices are projected.

    Args:
        params: parameters, param groups or a model.
        lr: learning rate of ``base``.
        base: the name of an optimizer.
        options: its other arguments.

    Raises:
        ValueError: no optimizer has that name.
    """

    #: Roles that keep their norm; ``None`` is that of parameters without a model.
    projected: ClassVar[tuple[str | None, ...]] = (None, "linear", "conv")

    def __init__(
        self, params: ParamsT | nn.Module, lr: float | Tensor = 1e-3, base: str = "adam", **options: Any
    ) -> None:
        if base not in SteepestDescent.registry:
            raise ValueError(f"NaP: unknown base {base!r}; {nearest(base, SteepestDescent.registry)}")
        of_base = SteepestDescent.registry[base](params, lr, **options)
        rule, numbers = parse(of_base.defaults["rule"]), dict(of_base.defaults)
        assert isinstance(rule, Rule)
        self.geometry = of_base.geometry  # type: ignore[misc]
        super().__init__(
            [_fresh(group) for group in of_base.param_groups],
            *(numbers.pop("lr"), rule.norm, rule.momentum, rule.step_size, rule.constraint),
            view=rule.view,
            maximize=numbers.pop("maximize"),
            nonfinite=numbers.pop("nonfinite"),
            state_dtype=numbers.pop("state_dtype"),
            capturable=numbers.pop("capturable"),
            compile=of_base.compiles,
            options={name: numbers[name] for name in rule.options() & numbers.keys()},
        )

    def _rule_of(self, group: dict[str, Any]) -> Rule:
        rule = super()._rule_of(group)
        is_new = group.get("role") in self.projected and FrobeniusSphere() not in rule.constraint
        return rule.bounded(FrobeniusSphere()) if is_new else rule


def _fresh(group: Mapping[str, Any]) -> dict[str, Any]:
    """A param group of one optimizer as it can be given to another."""
    rule = parse(group["rule"])
    assert isinstance(rule, Rule)
    kept = {name: value for name, value in group.items() if name not in rule.step_size.init_shared()}
    names = kept.pop("param_names", None)
    return kept if names is None else {**kept, "params": list(zip(names, kept["params"], strict=True))}
