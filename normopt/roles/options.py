"""Param-group options by role, and how several tables of them are merged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from normopt.momentum.base import Momentum

#: The roles that are inferred. Users may name their own, in overrides as ``{"role": "expert"}``.
ROLES = ("embedding", "linear", "unembedding", "conv", "vector", "scalar", "other")

#: A geometry is a table role -> norm, or role -> dict of param-group options ("norm", "momentum", "constraint",
#: numbers, and "lr_ratio", which multiplies the role's own learning rate if it has one, else the optimizer's).
#: ``"*"`` stands for all roles that are not named, and ``{}`` for the optimizer's own ingredients.
Geometry = Mapping[str, Any]


def check_table(table: Any) -> None:
    """Raise a ``TypeError`` unless ``table`` is a dict with something for each role that it names."""
    if not isinstance(table, Mapping):
        raise TypeError(f"geometry must be the name of one or a dict of roles, {{'linear': ...}}, got {table!r}")
    for role, spec in table.items():
        if spec is None:
            raise TypeError(f"geometry[{role!r}]: expected a norm or a dict, got None; {{}} stands for the own rule")


def entry(table: Geometry, role: str) -> dict[str, Any]:
    """The param-group options of a role in a geometry; without an entry, those of ``"*"``."""
    return _options(table.get(role, table.get("*", {})))


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Several layers of param-group options as one; later layers win.

    Three options are special. ``lr`` replaces an earlier ``lr_ratio``, which would be relative to another rate;
    ``lr_ratio`` is relative to an earlier ``lr``, and replaces an earlier ``lr_ratio``. A number for ``momentum``
    becomes the ``beta`` of the momentum in an earlier layer. Bounds are added to those of earlier layers, but ``()`` or
    ``None`` removes them.
    """
    options: dict[str, Any] = {}
    for layer in layers:
        below = options.get("momentum")
        rates = {"lr", "lr_ratio"} if "lr" in layer else {"lr_ratio"}
        rates = rates if {"lr", "lr_ratio"} & layer.keys() else set()
        before, options = options, {name: value for name, value in options.items() if name not in rates} | dict(layer)
        if options.get("bounds"):
            options["bounds"] = _several(before.get("bounds")) + _several(layer.get("bounds"))
        if isinstance(below, Momentum) and isinstance(options["momentum"], (int, float)):
            options["momentum"] = with_beta(below, options["momentum"])
    return options


def relative(options: Mapping[str, Any], role: Mapping[str, Any]) -> dict[str, Any]:
    """What an override says, laid over what the parameter's role has: a ``lr_ratio`` multiplies the role's own.

    So that layer-wise decay scales what every role has. An ``lr`` in the override stands for itself.
    """
    found, ratios = merged(role, options), [each.get("lr_ratio") for each in (role, options)]
    if "lr" not in options and all(isinstance(ratio, (int, float)) for ratio in ratios):
        found["lr_ratio"] = math.prod(ratios)
    return found


def _several(bounds: Any) -> tuple[Any, ...]:
    return () if bounds is None else tuple(bounds) if isinstance(bounds, (tuple, list)) else (bounds,)


def with_beta(momentum: Momentum, beta: float) -> Momentum:
    """The momentum with another ``beta``; a ``ValueError`` if it has no field ``beta``."""
    if not hasattr(momentum, "beta"):
        raise ValueError(f"momentum={beta!r} has no meaning for {momentum}; give a momentum such as EMA({beta!r})")
    with_field: Any = momentum  # the base class has no fields
    return replace(with_field, beta=beta)


def _options(spec: Any) -> dict[str, Any]:
    return dict(spec) if isinstance(spec, Mapping) else {"norm": spec}
