"""Momentum that torch's schedulers cycle: OneCycleLR and CyclicLR reach every param group, whatever it reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from normopt.rule import Rule

#: Where a rule reads its decay rate: the first of these that it reads at all.
WEIGHTS = ("momentum", "mu", "betas")


def forward(group: dict[str, Any], rule: Rule, defaults: Mapping[str, Any]) -> None:
    """Hand a cycled momentum on to where the group's rule reads it.

    Such schedulers write ``betas[0]`` of every group if the optimizer's defaults have betas, else ``momentum``, and
    leave ``base_momentum`` in the group. Groups of one optimizer may read different ones, as Muon's and its AdamW's.
    """
    name = _read(rule) if "base_momentum" in group else None
    if name is None:
        return
    value = group["betas"][0] if "betas" in defaults else group["momentum"]
    group[name] = (value, *group["betas"][1:]) if name == "betas" else value


def first_weight(groups: Iterable[tuple[Mapping[str, Any], Rule]]) -> float | None:
    """The decay rate in the first group that has one among its options."""
    for group, rule in groups:
        name = _read(rule)
        if name is not None:
            return group[name][0] if name == "betas" else group[name]
    return None


def _read(rule: Rule) -> str | None:
    return next((name for name in WEIGHTS if name in rule.options()), None)
