"""Optimizers of the spectral norm: Muon, and Scion with its norm for each role."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from normopt.constraints.decay import FrankWolfe
from normopt.directions.complement import Complement
from normopt.ingredient import check_range, nearest, option, parse
from normopt.momentum.averages import EMA
from normopt.norms import Norm, Spectral
from normopt.optimizer import SteepestDescent
from normopt.polar import PolarCoefficients
from normopt.roles.geometries import GEOMETRIES
from normopt.roles.options import ROLES
from normopt.rule import Rule
from normopt.stepsize.fixed import Constant
from normopt.zoo.common import Common, Unpack, with_radius
from normopt.zoo.hidden import Hidden, WithAux

#: torch.optim.Muon's names for the scale of an update, and ours.
ADJUST_LR = {None: "max1", "original": "max1", "match_rms_adamw": "adamw", "spectral_unclamped": "rms"}


class Muon(Hidden):
    """Momentum, then the polar factor: steepest descent under the spectral norm (Jordan et al. 2024).

    ``m <- momentum m + (1 - momentum) g``; ``u = momentum m + (1 - momentum) g`` with Nesterov, else ``m``;
    ``w <- (1 - lr weight_decay) w - lr scale polar(u)``. Arguments and defaults are those of torch.optim.Muon.

    Given a whole model, hidden matrices (linear layers and convolutions) move by this rule, everything else by AdamW,
    in one optimizer with one learning-rate schedule and one checkpoint.

    Args:
        params: matrices, param groups or a model.
        lr: learning rate.
        weight_decay: decoupled weight decay of the matrices.
        momentum: weight of the past.
        nesterov: average once more with the gradient.
        ns_coefficients: ``(a, b, c)`` of the Newton-Schulz iteration; needs ``orthogonalize="newton-schulz"``.
        eps: taken for torch's sake and not used: gradients of any length are normalized, in float32.
        ns_steps: its number of steps; ``None`` is the method's own (5 for ``"newton-schulz"``).
        adjust_lr_fn: scale of an (m x n) update. ``None`` or ``"original"``: sqrt(max(1, m/n)). ``"match_rms_adamw"``:
            0.2 sqrt(max(m, n)). ``"spectral_unclamped"``: sqrt(m/n), the RMS -> RMS norm.
        orthogonalize: the method of :func:`normopt.polar.polar`.
        orthogonalize_dtype: the dtype of its iteration.
        cautious: decay only entries that the update does not move away from 0 (arXiv 2510.12402), AdamW's too.
        aux_lr: learning rate of AdamW for everything that is no hidden matrix; by default ``lr`` under
            ``"match_rms_adamw"`` and ``lr / 2`` otherwise (tuned for a GPT of width 96; much wider models want less).
            Under ``step_size="prodigy"`` or ``"dadaptation"``, its ratio to ``lr`` is the ``radius`` of these tensors.
        aux_betas: AdamW's betas.
        aux_eps: AdamW's eps.
        aux_weight_decay: AdamW's weight decay.
        common: ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] | None = None,
        eps: float = 1e-7,
        ns_steps: int | None = None,
        adjust_lr_fn: str | None = None,
        *,
        orthogonalize: str | PolarCoefficients = "newton-schulz",
        orthogonalize_dtype: torch.dtype | str | None = torch.bfloat16,
        cautious: bool = False,
        aux_lr: float | None = None,
        aux_betas: tuple[float, float] = (0.9, 0.95),
        aux_eps: float = 1e-8,
        aux_weight_decay: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        if adjust_lr_fn not in ADJUST_LR:
            hint = nearest(str(adjust_lr_fn), map(str, ADJUST_LR))
            raise ValueError(f"Muon: unknown adjust_lr_fn {adjust_lr_fn!r}; {hint}")
        if ns_coefficients is not None and orthogonalize != "newton-schulz":
            raise ValueError("Muon: ns_coefficients need orthogonalize='newton-schulz'")
        check_range(self, "eps", eps, 0, float("inf"))
        for coefficient in ns_coefficients or ():
            check_range(self, "ns_coefficients", coefficient, -1e30, 1e30)
        method = PolarCoefficients((ns_coefficients,)) if ns_coefficients else orthogonalize
        super().__init__(
            params,
            lr,
            Spectral(ADJUST_LR[adjust_lr_fn], method, ns_steps, orthogonalize_dtype),
            EMA(option("momentum"), option("nesterov")),
            options={"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay},
            cautious=cautious,
            aux_ratio=1.0 if adjust_lr_fn == "match_rms_adamw" else 0.5,
            aux_lr=aux_lr,
            aux_betas=aux_betas,
            aux_eps=aux_eps,
            aux_weight_decay=aux_weight_decay,
            **common,
        )


class MuonPlusPlus(Hidden):
    """:class:`Muon` that leaves the largest singular value of the weights where it is (arXiv 2601.01306).

    ``m`` as in Muon, ``P = (I - u u^T) m (I - v v^T)`` with ``u``, ``v`` the leading singular vectors of ``w``;
    ``w <- w - lr S polar(P)``, ``S = sqrt(out / in)``. The spectral norm of the weights, which should be ``S`` at the
    start, stays what it is as long as the second singular value is smaller by ``lr S``. When the gap has closed, the
    leading pair changes and the norm grows: a smaller ``lr`` or a larger ``protect`` keeps it open. Of the paper only
    the projection and the scale are here, not how it treats small gaps; its defaults are Muon's.

    Given a whole model, hidden matrices move by this rule, everything else by AdamW, as with Muon.

    Args:
        params: matrices, param groups or a model.
        lr: learning rate.
        momentum: weight of the past.
        nesterov: average once more with the gradient.
        protect: how many leading pairs are left as they are.
        power_iterations: how many find them, from those of the last step; ``None``: a singular value decomposition at
            every step, exact and expensive. See :class:`~normopt.complement.Complement`.
        weight_decay: decoupled weight decay of the matrices, which shrinks the spectral norm too.
        orthogonalize: the method of :func:`normopt.polar.polar`.
        orthogonalize_dtype: the dtype of its iteration.
        common: ``cautious`` and AdamW's ``aux_lr`` (``None``: ``lr / 2``), ``aux_betas``, ``aux_eps`` and
            ``aux_weight_decay`` of :class:`Muon`; ``geometry``, ``overrides``, ``step_size`` and ``maximize`` of
            :class:`~normopt.SteepestDescent`.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        protect: int = 1,
        power_iterations: int | None = 2,
        weight_decay: float = 0.0,
        *,
        orthogonalize: str | PolarCoefficients = "auto",
        orthogonalize_dtype: torch.dtype | str | None = None,
        **common: Unpack[WithAux],
    ) -> None:
        super().__init__(
            params,
            lr,
            Complement(Spectral("rms", orthogonalize, None, orthogonalize_dtype), protect, power_iterations),
            EMA(option("momentum"), option("nesterov")),
            options={"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay},
            aux_ratio=0.5,
            **common,
        )


#: Radii for GPTs, unconstrained and constrained.
SCION_RADII: dict[bool, Mapping[str, float]] = {
    False: {"unembedding": 60.0, "*": 1.0},
    True: {"unembedding": 3000.0, "*": 50.0},
}


class Scion(SteepestDescent):
    """Averaged gradients under a norm for each role, inside a ball or not (arXiv 2502.07529).

    ``m <- momentum m + (1 - momentum) g``; ``w <- w - lr radius dualize(m)``; ``constrained``: ``(1 - lr) w`` in its
    place, a Frank-Wolfe step that never leaves the ball of ``radius``. Given a whole model, embeddings are measured by
    columns, hidden matrices by the RMS -> RMS spectral norm, the head by its largest entry times its inputs, vectors by
    their root mean square; given parameters, ``norm`` holds for all, or each param group names its own.

    Args:
        params: parameters, param groups (``norm`` and ``radius`` per group) or a model.
        lr: learning rate; when constrained, at most 1.
        momentum: weight of the past (1 minus the argument of the authors' code).
        radius: radius of the ball, or the factor of lr when there is none: a number, or with a model a table
            role -> radius, ``"*"`` for the rest. By default the authors' for GPTs: 3000 for the head and 50 elsewhere
            when constrained; 60 and 1, the same ratio, otherwise.
        constrained: keep weights in the ball.
        norm: the norm of parameters whose group names none; with a model, use ``geometry``.
        orthogonalize: the method of :func:`normopt.polar.polar` for the spectral norm.
        orthogonalize_dtype: the dtype of its iteration.
        common: ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        radius: float | Mapping[str, float] | None = None,
        constrained: bool = False,
        norm: str | Norm | None = None,
        *,
        orthogonalize: str | PolarCoefficients = "auto",
        orthogonalize_dtype: torch.dtype | str | None = None,
        **common: Unpack[Common],
    ) -> None:
        spectral = Spectral("rms", orthogonalize, None, orthogonalize_dtype)
        if norm is not None and isinstance(params, nn.Module):
            raise ValueError("Scion: norm is for parameters; with a model, give geometry={role: norm}")
        radii = SCION_RADII[constrained] if radius is None else radius
        radii = radii if isinstance(radii, Mapping) else {"*": radii}
        for role in radii.keys() - {"*", *ROLES, *(common.get("geometry") or ())}:
            raise ValueError(f"Scion: radius names the unknown role {role!r}; {nearest(role, ROLES)}")
        norms = {**GEOMETRIES["scion"], "linear": spectral, "conv": spectral}
        self.geometry = {  # type: ignore[misc]
            role: {"norm": norms.get(role, norms["*"]), **({"radius": radii[role]} if role in radii else {})}
            for role in {*norms, *radii}
        }
        common["step_size"] = with_radius(common.get("step_size", Constant(option("radius"))))
        super().__init__(
            params,
            lr,
            spectral if norm is None else norm,
            EMA(option("momentum")),
            constraint=FrankWolfe() if constrained else None,
            options={"momentum": momentum, "radius": radii.get("*", 1.0)},
            **common,
        )

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Put all weights on the spheres of their norms, ``norm(w) == radius``, before the first step.

        Matrices are drawn anew by :meth:`normopt.norms.Norm.initialize_`, each as the optimizer sees it:
        semi-orthogonal under the spectral norm. Vectors and scalars are only made as long as their radius, so that
        gains keep their signs; those that are 0 stay 0.

        Args:
            generator: where random numbers come from, on the device of the parameters.

        Raises:
            RuntimeError: the optimizer has taken steps.
            ValueError: the direction of a parameter is no norm, or its step size has no radius.
        """
        if self.state:
            raise RuntimeError("Scion.initialize: weights are drawn before the first step")
        rules = [cast(Rule, parse(group["rule"])).resolve(group) for group in self.param_groups]
        for rule in rules:
            if not isinstance(rule.norm, Norm) or not hasattr(rule.step_size, "radius"):
                raise ValueError(f"Scion.initialize: {rule} has no ball to put weights on")
        for group, rule in zip(self.param_groups, rules, strict=True):
            for p in group["params"]:
                _initialize(p, rule, generator)


def _initialize(p: Tensor, rule: Rule, generator: torch.Generator | None) -> None:
    norm, radius = rule.norm, rule.step_size.radius  # type: ignore[attr-defined]
    assert isinstance(norm, Norm)
    dtype = torch.promote_types(p.dtype, torch.float32)
    if p.ndim > 1:
        x = norm.initialize_(torch.empty(rule.view.shape(p.shape), dtype=dtype, device=p.device), generator)
    else:
        x = rule.view.apply(p).to(dtype)
        size = norm.norm(x)[..., None, None]
        x = x / torch.where(size > 0, size, 1.0)
    p.copy_(rule.view.invert(x * radius, p.shape))
