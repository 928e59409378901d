"""Param groups of a whole model."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from itertools import count
from typing import Any

from torch import Tensor, nn

from normopt.constraints.base import Constraint
from normopt.constraints.decay import L2, WeightDecay
from normopt.ingredient.registry import nearest
from normopt.ingredient.view import View, is_small
from normopt.roles.geometries import GEOMETRIES, adam_options
from normopt.roles.infer import infer_roles
from normopt.roles.modules import Role, kind_of
from normopt.roles.options import ROLES, Geometry, check_table, entry, merged, relative
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
    check_table(table)
    found = infer_roles(model, overrides)
    for name in {role.name for role in found.values()} - {*ROLES, *table}:
        if near := get_close_matches(name, ROLES, n=1, cutoff=0.75):
            warnings.warn(
                f"overrides: the role {name!r} is none that the geometry names, and gets what it has for '*'; "
                f"did you mean {near[0]!r}?",
                stacklevel=2,
            )
    known = {*ROLES, "*", *(role.name for role in found.values())}
    for unknown in table.keys() - known:
        hint = nearest(unknown, known)
        raise ValueError(f"the geometry has an entry for role {unknown!r}, but no parameter has that role; {hint}")
    return _grouped(dict(model.named_parameters()), found, table)


def groups_of_module(module: nn.Module, table: Geometry) -> list[dict[str, Any]]:
    """The param groups of a part of a model, whose last linear layer is no output layer unless the module says so.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    found = infer_roles(module)
    if not found:
        raise ValueError(f"param group: no parameter of the module {kind_of(module)} requires a gradient")
    for name, role in found.items():
        if role.name == "unembedding" and not role.reason.startswith("declared"):
            reason = "a hidden layer: the module was added, and is not taken to hold the output layer"
            found[name] = replace(role, name="linear", reason=reason)
    return _grouped(dict(module.named_parameters()), found, table)


def all_tensors(params: Any) -> bool:
    """Whether ``params`` is a tensor or a list of tensors, named or not, with one at least."""
    given = [params] if isinstance(params, Tensor) else params
    is_list = isinstance(given, list) and bool(given)
    return is_list and all(isinstance(each[1] if isinstance(each, tuple) else each, Tensor) for each in given)


def groups_by_shape(params: Any, table: Geometry) -> list[dict[str, Any]]:
    """The param groups of parameters whose modules are not known, vectors first, with a warning that names the roles.

    Matrices count as linear layers, and what has more dimensions as convolutions.

    Args:
        params: a parameter, or several, or (name, parameter) pairs.
        table: what the roles get.
    """
    given = [params] if isinstance(params, Tensor) else list(params)
    named: dict[str, Tensor] = dict(
        each if isinstance(each, tuple) else (f"added.{i}", each) for i, each in enumerate(given)
    )
    found = {}
    for name, p in sorted(named.items(), key=lambda item: item[1].ndim):
        role = ("scalar", "vector", "linear", "conv")[min(p.ndim, 3)]
        found[name] = Role(role, View(flatten=True) if p.ndim > 2 else View(), "its shape; it was added by itself")
    counts = Counter(role.name for role in found.values())
    warnings.warn(
        f"add_param_group: {len(found)} parameters came without their module and got roles by their shapes: "
        f"{', '.join(f'{count} {role}' for role, count in counts.items())}. An embedding or an output layer looks "
        "like any other matrix: pass the module, {'params': module}, or name a norm, to say what they are.",
        stacklevel=4,  # where add_param_group is called
    )
    return _grouped(named, found, table)


def to_distinct_names(params: list[tuple[str, Tensor]], known: Collection[str]) -> list[tuple[str, Tensor]]:
    """Named parameters under names that no other parameter has: ``weight``, or ``added.2.weight``."""
    if not {name for name, _ in params} & {*known}:
        return params
    prefix = next(f"added.{i}." for i in count(1) if not any(name.startswith(f"added.{i}.") for name in known))
    return [(prefix + name.removeprefix("added."), p) for name, p in params]


def _grouped(parameters: Mapping[str, Tensor], found: Mapping[str, Role], table: Geometry) -> list[dict[str, Any]]:
    """One group for each role, view and set of options."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    members: dict[tuple[Any, ...], list[tuple[str, Role]]] = defaultdict(list)
    for name, role in found.items():
        if role.name not in table and "*" not in table:
            raise ValueError(f"the geometry has no entry for role {role.name!r} (parameter {name!r}); add it or '*'")
        options = relative(role.options, entry(table, role.name))
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
