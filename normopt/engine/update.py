"""What a batch does in one step: from the gradient to the direction, and from the direction to the weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from normopt.constraints.base import Constraint
from normopt.engine.batch import Batch, Piece, readable, unpacked
from normopt.ingredient.stage import Context
from normopt.rule import rule_of
from normopt.stepsize.base import Shared, StepSize

#: Factors nearer to 1 are not multiplied by: 1 - 1e-8 is 1 in float32, but w - 1e-8 w need not be w.
NEAR_ONE = 1e-5

#: What step sizes have concluded from all gradients or directions, by their name.
Concluded = dict[str, Shared]

#: A step size, the numbers of the whole optimizer, and its summands from one batch.
Seen = tuple[StepSize, Shared, dict[str, Tensor]]


@dataclass
class Move:
    """What one batch is about to do, known step by step: the averaged gradient and the direction come last."""

    batch: Batch | Piece
    context: Context
    state: dict[str, Tensor]
    shared: Shared
    before: list[Tensor] = field(default_factory=list)
    averaged: Tensor = field(default_factory=lambda: torch.empty(0))
    direction: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def step_size(self) -> StepSize:
        """That of the batch's rule."""
        return self.batch.rule.step_size


def begin(
    batch: Batch | Piece, past: list[Tensor] | None, before: list[Tensor], concluded: Concluded | None = None
) -> Move:
    """From the gradient, and that of the past for momenta that look back, to what the step size sees.

    Nothing has changed yet. ``before`` is what there was, if the step may have to be undone.
    """

    def seen(raw: Tensor, weights: Callable[[], Tensor]) -> Context:
        context = Context(
            raw,
            raw,
            batch.number,
            batch.rate,
            batch.rule.norm,
            weights,
            1.0,
            numbers,
            batch.shrink,
            batch.is_vector,
            None,
            batch.params[0].dtype,
            batch.first,
        )
        for constraint in batch.rule.acting("gradient"):
            context = replace(context, g=constraint.gradient(context.g, context))
        return context

    shared = _shared(batch, concluded or {})
    numbers = readable(batch, shared)
    context = seen(batch.gradient(), batch.weights)
    if past is not None:
        context = replace(context, past=lambda: seen(batch.gradient(past), lambda: batch.state["previous"]).g)
    return Move(batch, context, unpacked(batch), shared, before)


def direct(move: Move) -> Move:
    """From the gradient to the direction."""
    rule, state, context = move.batch.rule, move.state, move.context
    weighed = rule.step_size.weigh(context.g, context, context.shared)
    move.context = context = replace(context, g=weighed.memory, scale=weighed.scale)
    move.averaged = rule.momentum(weighed.momentum, state, context)
    move.direction = rule.norm(move.averaged, state, context)
    return move


def asks(batch: Batch | Piece, method: str) -> bool:
    """Whether the step size of a batch does anything in ``survey`` or ``measure``."""
    return batch.rule.step_size.overrides(method)


def survey(move: Move) -> Seen:
    """What the step size sees of a gradient; it updates its own state."""
    return move.step_size, move.shared, move.step_size.survey(move.state, move.context, move.context.shared)


def measure(move: Move) -> Seen:
    """What the step size sees of a direction."""
    return move.step_size, move.shared, move.step_size.measure(move.averaged, move.direction, move.context)


def conclude(seen: Iterable[Seen]) -> Concluded:
    """What step sizes conclude from all summands.

    Those of one kind share sums and state, in all groups; the first group's numbers count.
    """
    kinds: dict[str, list[Seen]] = defaultdict(list)
    for each in seen:
        kinds[type(each[0]).__name__].append(each)
    return {name: _concluded(kind) for name, kind in kinds.items()}


def _concluded(kind: list[Seen]) -> Shared:
    step_size, before, first = kind[0]
    sums = {
        name: torch.stack([summands[name].to(summand.device) for _, _, summands in kind]).sum()
        for name, summand in first.items()
    }
    return step_size.conclude(sums, before)


def told(move: Move, concluded: Concluded) -> Move:
    """The same move, whose step size knows what has been concluded from the directions."""
    move.shared = _shared(move.batch, concluded)
    move.context = replace(move.context, shared=readable(move.batch, move.shared))
    return move


def apply(move: Move) -> None:
    """From the direction to the new weights."""
    batch, context, d = move.batch, move.context, move.direction
    rule, params = batch.rule, batch.params
    if not isinstance(batch.lr, Tensor) and batch.lr == 0:
        return  # such a step moves nothing, not even to where the weights may live
    for constraint in rule.acting("update"):
        d, factor = constraint.update(d, context)
        context = replace(context, shrink=context.shrink * factor)
    size, shrink = -rule.step_size.length(move.averaged, d, context, context.shared), context.shrink
    bounds = rule.acting("weight")
    if batch.dtype != params[0].dtype or (isinstance(shrink, Tensor) and shrink.ndim):
        _keep(batch, bounds, context, batch.weights() * shrink + d * size)
        return
    if isinstance(shrink, Tensor):
        torch._foreach_add_(params, torch._foreach_mul(params, shrink - 1))
    elif shrink != 1.0 and abs(shrink - 1) < NEAR_ONE:
        torch._foreach_add_(params, params, alpha=shrink - 1)
    elif shrink != 1.0:
        torch._foreach_mul_(params, shrink)
    if isinstance(size, Tensor) and not size.ndim:
        torch._foreach_addcmul_(params, batch.scatter(d), [size.to(batch.dtype)] * len(params))
    elif isinstance(size, Tensor):
        torch._foreach_add_(params, batch.scatter(d * size))
    else:
        torch._foreach_add_(params, batch.scatter(d), alpha=size)
    if bounds:
        _keep(batch, bounds, context, batch.weights())


def settle(batch: Batch) -> None:
    """Bring weights that a kernel has moved to where they may live; its bounds look at nothing but weights."""
    bounds = batch.rule.acting("weight")
    if bounds and (isinstance(batch.lr, Tensor) or batch.lr != 0):
        nothing = torch.empty(0)
        context = Context(nothing, nothing, batch.number, batch.rate, batch.rule.norm, batch.weights)
        context = replace(context, is_vector=batch.is_vector)
        _keep(batch, bounds, context, batch.weights())


def _keep(batch: Batch | Piece, bounds: tuple[Constraint, ...], context: Context, new: Tensor) -> None:
    """Write the new weights to the parameters, brought to where they may live."""
    bounded = new
    for constraint in bounds:
        bounded = constraint.weight(bounded, batch.state, context)
    if bounds and isinstance(batch.lr, Tensor):
        bounded = torch.where((batch.lr == 0).to(new.device, non_blocking=True), batch.rounded_weights(), bounded)
    torch._foreach_copy_(batch.params, batch.scatter(bounded))


def _shared(batch: Batch | Piece, concluded: Concluded) -> Shared:
    """The numbers of the whole optimizer, as far as they are known."""
    return concluded.get(type(batch.rule.step_size).__name__) or shared_by(batch.group)


def shared_by(group: Mapping[str, Any]) -> Shared:
    """The numbers of the whole optimizer that a param group holds."""
    return {name: group[name] for name in rule_of(group).step_size.init_shared()}
