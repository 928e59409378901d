"""Optimizers of weights that keep their norm or spectrum: AdamH, MuonH, SPEL, and NaP on top of any other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from normopt.constraints import FrobeniusSphere, Stiefel, WeightDecay
from normopt.directions import Chain, Smoothed, Tangent
from normopt.ingredient import nearest, option
from normopt.momentum import EMA
from normopt.norms import Max, Spectral
from normopt.norms.base import Scale
from normopt.optimizer import SteepestDescent
from normopt.polar import PolarCoefficients
from normopt.roles.geometries import adam_options
from normopt.roles.options import ROLES, Geometry, entry, merged
from normopt.rule import Rule
from normopt.stepsize import Constant, TrustRatio
from normopt.zoo.base import Declared, FixedStepOptimizer, arg, is_declared
from normopt.zoo.matrices import HALF_LR, MatrixOptimizer

#: What moves off the spheres.
FREE: Mapping[str, Any] = {"step_size": Constant(), "constraint": None}


class AdamH(FixedStepOptimizer):
    """Adam on spheres: every matrix keeps the Frobenius norm ``R`` that it starts with (Hyperball, Wen et al. 2025).

    ``w <- R n(w - lr R n(u))``, ``n(x) = x / ||x||_F``, ``u`` Adam's update: ``lr`` is the distance moved relative to
    the weights, 2.5e-3 to 1e-2 in the source. No weight decay. Gains must be there to scale what the matrices no longer
    can, as those of RMSNorm do. A matrix that starts at 0 has no sphere: its step is ``lr u`` until it has moved, then
    ``lr`` times its norm.
    """

    lr: float | Tensor = arg(default=5e-3, doc="learning rate, relative to the weights.")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    aux_lr: float | None = arg(default=None, doc="learning rate of Adam for everything else; ``None``: ``lr``.")

    def table(self) -> Geometry:
        """Given a whole model, hidden matrices and the head stay on spheres, everything else moves by Adam."""
        return {"linear": {}, "conv": {}, "unembedding": {}}

    def rest(self) -> dict[str, Any]:
        """Adam."""
        return {**adam_options(self.betas, self.eps), **FREE, **({} if self.aux_lr is None else {"lr": self.aux_lr})}

    def rule(self) -> Rule:
        adam = Smoothed(Max(), option("betas", 1), option("eps"))
        return Rule(adam, EMA(option("betas", 0), bias_correction=True), TrustRatio(), (FrobeniusSphere(),))


class MuonH(FixedStepOptimizer):
    """Muon on spheres: :class:`AdamH` with Muon's update for hidden matrices (Hyperball, Wen et al. 2025).

    ``w <- R n(w - lr R n(polar(m)))``, ``n(x) = x / ||x||_F``, with Muon's Nesterov average ``m`` and ``R`` the
    Frobenius norm that ``w`` starts with.
    """

    lr: float | Tensor = arg(default=5e-3, doc="learning rate, relative to the weights.")
    momentum: float = 0.95
    nesterov: bool = True
    orthogonalize: str | PolarCoefficients = arg(default="newton-schulz", kw_only=True)
    orthogonalize_dtype: torch.dtype | str | None = arg(default="auto", kw_only=True)
    aux_lr: float | None = arg(
        default=None, doc="learning rate of Adam for embeddings, vectors and scalars; ``None``: ``lr``.", kw_only=True
    )
    aux_betas: tuple[float, float] = arg(default=(0.9, 0.95), doc="Adam's betas, for the head too.", kw_only=True)
    aux_eps: float = arg(default=1e-8, doc="Adam's eps, for the head too.", kw_only=True)

    def table(self) -> Geometry:
        """Given a whole model, the head moves by :class:`AdamH` at the same rate, embeddings and vectors by Adam."""
        return {"linear": {}, "conv": {}, "unembedding": adam_options(self.aux_betas, self.aux_eps)}

    def rest(self) -> dict[str, Any]:
        """Adam."""
        rate = {} if self.aux_lr is None else {"lr": self.aux_lr}
        return {**adam_options(self.aux_betas, self.aux_eps), **FREE, **rate}

    def rule(self) -> Rule:
        polar = Spectral("unit", self.orthogonalize, None, self.orthogonalize_dtype)
        return Rule(polar, EMA(option("momentum"), option("nesterov")), TrustRatio(), (FrobeniusSphere(),))


class SPEL(MatrixOptimizer):
    """Muon on the Stiefel manifold: matrices whose singular values are all 1 (arXiv 2601.21487).

    ``m <- momentum m + (1 - momentum) g``; ``w <- s polar((1 - lr weight_decay) w - lr s polar(t))``, where ``t`` is
    the part of ``m`` along the manifold, see :class:`~normopt.Tangent`, and ``s`` the scale. Arguments and defaults but
    ``lr``, which is Keller Jordan's for Muon, are those of Emerging-Optimizers. Matrices should start on the
    manifold (``torch.nn.init.orthogonal_``); others are brought there by their first step. Gains must scale what the
    matrices no longer can.
    """

    aux_ratio = 0.5
    lr: float | Tensor = 0.02
    weight_decay: float = arg(default=0.1, doc="how much shorter the weights are before the outer polar factor.")
    momentum: float = 0.95
    nesterov: bool = False
    scale: Scale = arg(
        default="unit", doc='``"unit"``: singular values of 1; ``"max1"``: of sqrt(max(1, out/in)).', kw_only=True
    )
    orthogonalize: str | PolarCoefficients = arg(default="newton-schulz", kw_only=True)
    orthogonalize_dtype: torch.dtype | str | None = arg(default="auto", kw_only=True)
    aux_lr: float | None = arg(default=None, doc=HALF_LR, kw_only=True)

    def rule(self) -> Rule:
        polar = Spectral(self.scale, self.orthogonalize, None, self.orthogonalize_dtype)
        outer = "exact" if self.orthogonalize == "exact" else "polar-express"
        bounds = (WeightDecay(option("weight_decay")), Stiefel(1.0, self.scale, outer))
        return Rule(Chain(Tangent(), polar), EMA(option("momentum"), option("nesterov")), constraint=bounds)


class NaP(Declared):
    """Normalize-and-Project on top of any optimizer of this package (Lyle et al., arXiv 2407.01800).

    After every step of ``base`` each hidden matrix gets the Frobenius norm back that it started with,
    ``w <- R w / ||w||_F``; the learning rate then alone says how fast directions turn, and needs a schedule. The
    network should normalize before its nonlinearities, so that the norms of hidden matrices do not matter. Given
    parameters in place of a model, all matrices are projected; of a model, embeddings, the output layer, vectors and
    scalars are left to ``base``.

    Args:
        params: parameters, param groups or a whole model.
        lr: learning rate of ``base``.
        base: the name of an optimizer.
        options: its other arguments, such as ``weight_decay``, ``geometry``, ``overrides`` or ``maximize``.

    Raises:
        ValueError: no optimizer has that name, or it has a constructor that was written by hand.
    """

    #: Roles that keep their norm.
    projected: ClassVar[tuple[str, ...]] = ("linear", "conv")
    _base: Declared
    _own: Rule

    def __init__(
        self, params: ParamsT | nn.Module, lr: float | Tensor = 1e-3, base: str = "adam", **options: Any
    ) -> None:
        vars(self).update(vars(self.declared(params, lr, base, **options)))
        defaults = {name: a.default for name, a in self._base._arguments.items()}
        self._construct(set(), {**defaults, "lr": lr, "base": base, **options})

    @classmethod
    def declared(
        cls, params: ParamsT | nn.Module, lr: float | Tensor = 1e-3, base: str = "adam", **options: Any
    ) -> NaP:
        """The optimizer with the arguments of ``base``, but without param groups."""
        made = SteepestDescent.registry.get(base)
        if made is None:
            raise ValueError(f"NaP: unknown base {base!r}; {nearest(base, SteepestDescent.registry)}")
        if not issubclass(made, Declared) or not (is_declared(made) or issubclass(made, NaP)):
            raise ValueError(
                f"NaP: {base!r} has a constructor that was written by hand; declare its arguments as fields"
            )
        found, of_base = cls.__new__(cls), made.declared(params, lr, **options)
        own = of_base.completed_rule()
        vars(found).update({**vars(of_base), "_base": of_base, "_own": own})
        return found

    def table(self) -> Geometry:
        """What the table of ``base`` says, and only what is projected keeps its norm."""
        own: Geometry = {"*": self._base.rest(), **self._base.table()}
        return {role: self._bounded(role, entry(own, role)) for role in dict.fromkeys(("*", *ROLES, *own))}

    def _bounded(self, role: str, said: dict[str, Any]) -> dict[str, Any]:
        if role not in self.projected:
            return {"constraint": self._own.constraint, **said}
        return merged(said, {"bounds": FrobeniusSphere()}) if "constraint" in said else said

    def rule(self) -> Rule:
        return self._own if FrobeniusSphere() in self._own.constraint else self._own.bounded(FrobeniusSphere())
