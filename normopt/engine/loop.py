"""One step, from gradients to weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from normopt.engine.batch import Batch
from normopt.engine.kernels import Given, Kernel, shrink_
from normopt.engine.totals import Everywhere, Totals
from normopt.ingredient.stage import Context, Rate
from normopt.stepsize.base import Shared


class Pending(NamedTuple):
    """A batch whose direction is known and whose weights have not moved yet."""

    batch: Batch
    context: Context
    state: dict[str, Tensor]
    averaged: Tensor
    direction: Tensor


def take_step(batches: Sequence[Batch], everywhere: Everywhere | None = None) -> dict[str, Shared]:
    """Move the parameters of all batches, and return what step sizes have concluded.

    One batch goes after the other, so that temporary memory stays small, unless a step size must see all of them.
    """
    parts = [part for batch in batches for part in batch.chunks()]
    totals = Totals(everywhere)
    survey(parts, totals)
    pending: Iterable[Pending] = (find_direction(part, totals) for part in parts)
    if any(part.rule.step_size.overrides("measure") for part in parts) or totals.expects("measure"):
        pending = measured([*pending], totals)
    for each in pending:
        update_weights(each)
    return totals.concluded


def find_direction(batch: Batch, totals: Totals) -> Pending:
    """Which gradient do we trust, and which direction is steepest? Nothing but state changes."""
    batch.snapshot()
    rule, state = batch.rule, batch.loaded()
    context = batch.context(totals.of(rule, batch.shared))  # gather
    trusted, memory, scale = rule.step_size.weigh(context.g, context, context.shared)
    if memory is not context.g or isinstance(scale, Tensor) or scale != 1.0:
        context = replace(context, g=memory, scale=scale)
    averaged = rule.momentum(trusted, state, context)  # momentum
    direction = rule.direction(averaged, state, context)  # direction
    return Pending(batch, context, state, averaged, direction)


def update_weights(pending: Pending) -> None:
    """How far do we go, and where may the weights live?"""
    batch, context, state, averaged, d = pending
    rule = batch.rule
    if batch.moves:
        bounds = rule.acting("weight")
        if bounds and any(constraint.compares for constraint in bounds):
            before = batch.weights().clone()
            context = replace(context, weights=lambda: before)
        for constraint in rule.acting("update"):
            d, factor = constraint.update(d, context)  # constraint, of the update
            context = replace(context, shrink=context.shrink * factor)
        length = rule.step_size.length(averaged, d, context, context.shared)  # step size
        apply_update(batch, d, length, context)  # scatter
    batch.save_low_precision(state)
    batch.undo_if_found_inf()


def apply_update(batch: Batch, d: Tensor, length: Rate, context: Context) -> None:
    """``w <- shrink w - length d``, brought to where the weights may live; in place where the dtype allows."""
    params, size, shrink = batch.params, -length, context.shrink
    if batch.working != params[0].dtype or (isinstance(shrink, Tensor) and shrink.ndim):
        write_weights(batch, context, batch.weights() * shrink + d * size)
        return
    shrink_(params, shrink)
    if isinstance(size, Tensor) and not size.ndim:
        torch._foreach_addcmul_(params, batch.scatter(d), [size.to(batch.working)] * len(params))
    elif isinstance(size, Tensor):
        torch._foreach_add_(params, batch.scatter(d * size))
    else:
        torch._foreach_add_(params, batch.scatter(d), alpha=size)
    if batch.rule.acting("weight"):
        write_weights(batch, context, batch.weights())


def write_weights(batch: Batch, context: Context, new: Tensor) -> None:
    """Write new weights to the parameters, brought to where the constraints let them live."""
    bounds = batch.rule.acting("weight")
    bounded = new
    for constraint in bounds:
        bounded = constraint.weight(bounded, batch.state, context)
    if bounds and isinstance(batch.lr, Tensor):  # a rate of 0 that only the device knows moves nothing either
        bounded = torch.where((batch.lr == 0).to(new.device, non_blocking=True), batch.low_precision_weights(), bounded)
    torch._foreach_copy_(batch.params, batch.scatter(bounded))


def run_kernel(batch: Batch, kernel: Kernel) -> None:
    """The whole step in one pass over memory, and what bounds say of the new weights, at which alone they look."""
    entries = {name: batch.entries(name) for name in batch.plan.layouts}
    kernel(Given(batch.params, batch.gradients, entries, batch.number, batch.rate, batch.group["maximize"]))
    if batch.moves and batch.rule.acting("weight"):
        nothing = torch.empty(0)
        context = Context(nothing, nothing, batch.number, batch.rate, None, batch.weights, is_vector=batch.is_vector)
        write_weights(batch, context, batch.weights())


def survey(batches: Sequence[Batch], totals: Totals) -> None:
    """Let step sizes look at all gradients before momentum sees any of them."""
    for batch in batches:
        if batch.rule.step_size.overrides("survey"):
            batch.snapshot()
            context = batch.context(totals.of(batch.rule, batch.shared), again=True)
            summands = batch.rule.step_size.survey(batch.loaded(), context, context.shared)
            if batch.counts:
                totals.add(batch.rule, batch.shared, summands)
    totals.conclude("survey")


def measured(held: Sequence[Pending], totals: Totals) -> Iterator[Pending]:
    """Let step sizes look at all directions before any weight moves; the contexts then know what they conclude."""
    for batch, context, _, averaged, d in held:
        if batch.rule.step_size.overrides("measure"):
            summands = batch.rule.step_size.measure(averaged, d, context)
            if batch.counts:
                totals.add(batch.rule, batch.shared, summands)
    totals.conclude("measure")
    for each in held:
        shared = each.batch.readable(totals.of(each.batch.rule, each.batch.shared))
        yield each._replace(context=replace(each.context, shared=shared))
