"""What stands before a step: batches from plans that still hold, or from new ones. Nothing changes until ``adopt``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from normopt.engine.batch import Batch
from normopt.engine.checks import check_keeping, check_lr, check_parameters
from normopt.engine.plan import Plan, State, partition, separate
from normopt.engine.schedulers import forward
from normopt.engine.totals import shared_by
from normopt.rule import Rule, rule_of


def prepared(
    groups: Iterable[dict[str, Any]],
    plans: dict[int, list[Plan]],
    state: State,
    defaults: Mapping[str, Any],
    in_tensors: bool,
) -> list[list[Batch]]:
    """The batches of each param group for one step.

    Args:
        groups: the optimizer's param groups.
        plans: the plans of the last step, by the group's place.
        state: what ``optimizer.state`` is.
        defaults: the optimizer's defaults, which say what schedulers cycle.
        in_tensors: for a compiler, see :class:`~normopt.engine.batch.Batch`.

    Raises:
        ValueError: a parameter that its rule is not for, a number out of range, state of another shape.
    """
    found = []
    for place, group in enumerate(groups):
        rule = rule_of(group)
        if not isinstance(group["lr"], Tensor):  # a tensor's value may be on a device
            check_lr(group["lr"])
        forward(group, rule, defaults)
        resolved, shared = rule.at(group), shared_by(group, rule)
        present = [i for i, p in enumerate(group["params"]) if p.grad is not None]
        batches = _from(plans.get(place, []), present, group, resolved, state, shared, in_tensors, place)
        if batches is None:
            check_keeping(group, resolved)
            check_parameters(group, rule)
            fresh = [*partition(group, present, resolved, state)]
            batches = _from(fresh, present, group, resolved, state, shared, in_tensors, place, are_new=True)
            assert batches is not None
        found.append(batches)
    return found


def _from(
    plans: list[Plan],
    present: list[int],
    group: Mapping[str, Any],
    rule: Rule,
    state: State,
    shared: dict[str, Tensor],
    in_tensors: bool,
    place: int,
    *,
    are_new: bool = False,
) -> list[Batch] | None:
    """Batches by these plans; ``None`` if parameters, gradients, rule or state are no longer what they were.

    New plans may lay out state anew.
    """
    if sorted([i for plan in plans for i in plan.members]) != present:
        return None
    batches = []
    for plan in plans:
        params = plan.params(group)
        holds = are_new or plan.holds(params, group, rule)
        joined = plan.joined([state.get(p, {}) for p in params]) if holds else None
        if joined is None and not are_new:
            return None
        batches.append(Batch(plan, group, params, rule, state, shared, in_tensors, joined, place))
    return batches


def adopt(found: list[list[Batch]], plans: dict[int, list[Plan]], state: State) -> None:
    """Let the step that is about to be taken have its state: from now on ``state`` holds views of new layouts."""
    names = {name for each in plans.values() for plan in each for name in plan.layouts}
    plans.clear()
    plans.update({place: [batch.plan for batch in batches] for place, batches in enumerate(found)})
    every = [batch for batches in found for batch in batches]
    fresh = [batch for batch in every if batch.is_new]
    for batch in fresh:
        batch.adopt(state)
    if fresh:
        joined = {id(p): batch.plan.layouts.keys() for batch in every for p in batch.params}
        separate(state, joined, names.union(*joined.values()))
