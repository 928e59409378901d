"""Scion: averaged gradients under a norm for each role, inside a ball or not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from normopt.constraints import FrankWolfe
from normopt.ingredient import nearest, option
from normopt.ingredient.view import is_small
from normopt.momentum import EMA
from normopt.norms import Norm, Spectral
from normopt.polar import PolarCoefficients
from normopt.roles.geometries import GEOMETRIES
from normopt.roles.options import ROLES, Geometry
from normopt.rule import Rule, rule_of
from normopt.stepsize import Constant, StepSize
from normopt.zoo.base import DeclaredOptimizer, arg, with_radius

#: Radii for GPTs, unconstrained and constrained.
SCION_RADII: dict[bool, Mapping[str, float]] = {
    False: {"unembedding": 60.0, "*": 1.0},
    True: {"unembedding": 3000.0, "*": 50.0},
}


class Scion(DeclaredOptimizer):
    """Averaged gradients under a norm for each role, inside a ball or not (arXiv 2502.07529).

    ``m <- momentum m + (1 - momentum) g``; ``w <- w - lr radius dualize(m)``; ``constrained``: ``(1 - lr) w`` in its
    place, a Frank-Wolfe step that never leaves the ball of ``radius``. Defaults are those of LIONS-EPFL/scion, whose
    ``momentum`` is 1 minus this one. Given parameters, ``norm`` holds for all, or each param group names its own
    ``norm`` and ``radius``.
    """

    lr: float | Tensor = arg(default=1e-3, doc="learning rate; when constrained, at most 1.")
    momentum: float = 0.9
    radius: float | Mapping[str, float] | None = arg(
        default=None,
        doc="radius of the ball, or the factor of lr when there is none: a number, or with a model a table "
        'role -> radius, ``"*"`` for the rest. By default the authors\' for GPTs: 3000 for the head and 50 elsewhere '
        "when constrained; 60 and 1, the same ratio, otherwise.",
    )
    constrained: bool = arg(default=False, doc="keep weights in the ball.")
    norm: str | Norm | None = arg(
        default=None, doc="the norm of parameters whose group names none; with a model, use ``geometry``."
    )
    orthogonalize: str | PolarCoefficients = arg(default="auto", kw_only=True)
    orthogonalize_dtype: torch.dtype | str | None = arg(default=None, kw_only=True)

    def table(self) -> Geometry:
        """Given a whole model, embeddings are measured by columns, hidden matrices by the RMS -> RMS spectral norm.

        The head is measured by its largest entry times its inputs, vectors by their root mean square.
        """
        norms = {**GEOMETRIES["scion"], "linear": self._spectral(), "conv": self._spectral()}
        table = {role: {"norm": norms.get(role, norms["*"])} for role in {**norms, **self._radii}}
        return {role: {**said, **_named("radius", self._radii, role)} for role, said in table.items()}

    def rule(self) -> Rule:
        if self.norm is not None and isinstance(self.params, nn.Module):
            raise ValueError("Scion: norm is for parameters; with a model, give geometry={role: norm}")
        self._radii = self._read_radii()
        self.radius = self._radii.get("*", 1.0)
        self.step_size = self._step_size()
        own = Rule(self._spectral(), EMA(option("momentum")), constraint=(FrankWolfe(),) if self.constrained else ())
        return own if self.norm is None else own.updated({"norm": self.norm})

    def _spectral(self) -> Spectral:
        return Spectral("rms", self.orthogonalize, None, self.orthogonalize_dtype)

    def _step_size(self) -> StepSize:
        found = with_radius(Constant(option("radius")) if self.step_size is None else self.step_size)
        if "radius" not in found.options():
            raise TypeError(f"Scion: {found} has no radius; leave step_size out, or give one that finds the rate")
        return found

    def _read_radii(self) -> Mapping[str, float]:
        radii = SCION_RADII[self.constrained] if self.radius is None else self.radius
        radii = radii if isinstance(radii, Mapping) else {"*": radii}
        for role in radii.keys() - {"*", *ROLES, *(self.geometry or ())}:
            raise ValueError(f"Scion: radius names the unknown role {role!r}; {nearest(role, ROLES)}")
        return radii

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Put all weights on the spheres of their norms, ``norm(w) == radius``, before the first step.

        Matrices are drawn anew by :meth:`normopt.norms.Norm.initialize_`, each as the optimizer sees it:
        semi-orthogonal under the spectral norm. Vectors and scalars are only made as long as their radius, so that
        gains keep their signs; those that are 0 stay 0. Frozen parameters stay as they are.

        Args:
            generator: where random numbers come from, on the device of the parameters.

        Raises:
            RuntimeError: the optimizer has taken steps.
            ValueError: the direction of a parameter is no norm, or its step size has no radius.
        """
        if self.state:
            raise RuntimeError("Scion.initialize: weights are drawn before the first step")
        rules = [rule_of(group).resolve(group) for group in self.param_groups]
        for rule in rules:
            if not isinstance(rule.norm, Norm) or not hasattr(rule.step_size, "radius"):
                raise ValueError(f"Scion.initialize: {rule} has no ball to put weights on")
        for group, rule in zip(self.param_groups, rules, strict=True):
            for p in group["params"]:
                if p.requires_grad:
                    _initialize(p, rule, generator, is_small(p.shape, group.get("role", "")))


def _named(name: str, table: Mapping[str, float], role: str) -> dict[str, float]:
    return {name: table[role]} if role in table else {}


def _initialize(p: Tensor, rule: Rule, generator: torch.Generator | None, is_vector: bool) -> None:
    norm, radius = rule.norm, getattr(rule.step_size, "radius", 1.0)
    assert isinstance(norm, Norm)
    dtype = torch.promote_types(p.dtype, torch.float32)
    if not is_vector:
        x = torch.empty(rule.view.shape(p.shape), dtype=dtype, device=p.device)
        for part in rule.view.cut(x):
            norm.initialize_(part, generator)
    else:
        x = rule.view.apply(p).to(dtype)
        size = norm.norm(x)[..., None, None]
        x = x / torch.where(size > 0, size, 1.0)
    p.copy_(rule.view.invert(x * radius, p.shape))
