"""What stands before a step: batches from plans that still hold, or from new ones. Nothing changes until ``adopt``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from normopt.engine.batch import Batch
from normopt.engine.checks import check_keeping, check_parameters
from normopt.engine.plan import Plan, State, partition, separate
from normopt.engine.schedulers import forward
from normopt.engine.totals import shared_by
from normopt.rule import Rule, rule_of

#: The plans of each param group, by its place.
Plans = dict[int, list[Plan]]


def prepared(
    groups: Iterable[dict[str, Any]], plans: Plans, state: State, defaults: Mapping[str, Any], in_tensors: bool
) -> list[list[Batch]]:
    """The batches of each param group for one step.

    Args:
        groups: the optimizer's param groups.
        plans: those of the last step.
        state: what ``optimizer.state`` is.
        defaults: the optimizer's, which say what schedulers cycle.
        in_tensors: for a compiler, see :class:`~normopt.engine.batch.Batch`.

    Raises:
        ValueError: a parameter that its rule is not for, a number out of range, state of another shape.
    """
    found = []
    for place, group in enumerate(groups):
        rule = rule_of(group)
        forward(group, rule, defaults)
        resolved, shared = rule.at(group), shared_by(group, rule)
        present = [i for i, p in enumerate(group["params"]) if p.grad is not None]
        batches = _as_planned(plans.get(place, []), present, group, resolved, state, shared, in_tensors)
        if batches is None:
            check_keeping(group, resolved)
            check_parameters(group, rule)
            fresh = [*partition(group, present, resolved, state)]
            batches = [
                Batch(plan, group, resolved, state, shared, in_tensors, _joined(plan, group, state)) for plan in fresh
            ]
        found.append(batches)
    return found


def _as_planned(
    plans: list[Plan],
    present: list[int],
    group: Mapping[str, Any],
    rule: Rule,
    state: State,
    shared: dict[str, Tensor],
    in_tensors: bool,
) -> list[Batch] | None:
    """Batches as in the last step; ``None`` if parameters, gradients, rule or state are no longer what they were."""
    if sorted(i for plan in plans for i in plan.members) != present:
        return None
    if not all(plan.holds(plan.params(group), group, rule) for plan in plans):
        return None
    states = [_joined(plan, group, state) for plan in plans]
    if None in states:
        return None
    return [
        Batch(plan, group, rule, state, shared, in_tensors, joined) for plan, joined in zip(plans, states, strict=True)
    ]


def _joined(plan: Plan, group: Mapping[str, Any], state: State) -> dict[str, list[Tensor]] | None:
    return plan.joined([state.get(p, {}) for p in plan.params(group)])


def adopt(found: list[list[Batch]], plans: Plans, state: State) -> None:
    """Let the step that is about to be taken have its state: from now on ``state`` holds views of new layouts."""
    plans.clear()
    plans.update({place: [batch.plan for batch in batches] for place, batches in enumerate(found)})
    every = [batch for batches in found for batch in batches]
    fresh = [batch for batch in every if batch.is_new]
    for batch in fresh:
        batch.adopt(state)
    if fresh:
        separate(state, (p for batch in every for p in batch.params))
