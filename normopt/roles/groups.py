"""Param groups of a whole model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from normopt.constraints.base import Constraint
from normopt.constraints.decay import L2, WeightDecay
from normopt.ingredient.registry import nearest
from normopt.ingredient.view import is_small
from normopt.roles.geometries import GEOMETRIES, adam_options
from normopt.roles.infer import infer_roles
from normopt.roles.modules import Role
from normopt.roles.options import ROLES, Geometry, entry, merged
from normopt.stepsize.base import StepSize
from normopt.stepsize.fixed import Constant
from normopt.stepsize.free import LearningRateFree


def param_groups(
    model: nn.Module, geometry: str | Geometry = "muon", overrides: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """One torch param group for each role of ``model`` (and each view and override), ready for ``SteepestDescent``.

    Args:
        model: any module; parameters that are frozen now belong to the groups too, and move once they get gradients.
        geometry: a name of ``GEOMETRIES``, or a table from roles to norms, names of norms or dicts of param-group
            options; ``"*"`` is the entry for all roles that are not named.
        overrides: see :func:`infer_roles`.

    Returns:
        Dicts with ``params`` (name, parameter), ``role``, ``view``, ``reasons`` and the role's options in the geometry.

    Raises:
        ValueError: an unknown geometry; a parameter whose role has no entry; an entry for a role, other than those of
            ``ROLES``, that no parameter has; or a pattern that matches no parameter.
    """
    if isinstance(geometry, str) and geometry not in GEOMETRIES:
        raise ValueError(f"unknown geometry {geometry!r}; {nearest(geometry, GEOMETRIES)}")
    table = GEOMETRIES[geometry] if isinstance(geometry, str) else geometry
    parameters = dict(model.named_parameters())
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    members: dict[tuple[Any, ...], list[tuple[str, Role]]] = defaultdict(list)
    found = infer_roles(model, overrides)
    known = {*ROLES, "*", *(role.name for role in found.values())}
    for unknown in table.keys() - known:
        hint = nearest(unknown, known)
        raise ValueError(f"the geometry has an entry for role {unknown!r}, but no parameter has that role; {hint}")
    for name, role in found.items():
        if role.name not in table and "*" not in table:
            raise ValueError(f"the geometry has no entry for role {role.name!r} (parameter {name!r}); add it or '*'")
        options = merged(entry(table, role.name), role.options)
        key = (role.name, role.view, repr(sorted(options.items(), key=lambda item: item[0])))
        groups.setdefault(key, options)
        members[key].append((name, role))
    return [
        {
            "params": [(name, parameters[name]) for name, _ in members[key]],
            "role": key[0],
            "view": key[1],
            "reasons": [role.reason for _, role in members[key]],
            **options,
        }
        for key, options in groups.items()
    ]


def vectors_by_adam(
    groups: Iterable[dict[str, Any]], step_size: StepSize, constraint: tuple[Constraint, ...]
) -> Iterator[dict[str, Any]]:
    """A model's param groups, for an optimizer whose direction takes matrices only.

    Vectors and scalars whose group names no norm move by Adam, ``lr`` far or, where the optimizer finds the learning
    rate, as far as it says. Of the optimizer's constraints they keep weight decay.
    """
    decay = tuple(each for each in constraint if isinstance(each, (WeightDecay, L2)))
    adam = {
        **adam_options(),
        "step_size": step_size if isinstance(step_size, LearningRateFree) else Constant(),
        "constraint": decay,
    }
    for group in groups:
        sizes = [is_small(p.shape, group.get("role", "")) for _, p in group["params"]]
        for small in [None] if "norm" in group else sorted(set(sizes)):
            kept = [i for i, each in enumerate(sizes) if small is None or each == small]
            part = {**group, **{name: [group[name][i] for i in kept] for name in ("params", "reasons")}}
            yield merged(adam, part) if small else part
