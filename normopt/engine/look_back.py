"""Gradients of this step's sample at the weights before the last step, for momenta that compare the two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from normopt.engine.batch import Batch


def look_back(
    batches: Sequence[Batch],
    groups: Sequence[Mapping[str, Any]],
    closure: Callable[[], Any] | None,
    run: Callable[[Callable[[], Any]], None],
) -> bool:
    """Give those batches whose momentum asks for them the gradients at the weights before the last step.

    Weights and gradients are put back, also when the closure raises. Returns whether there were any.

    Args:
        batches: of the step.
        groups: the optimizer's param groups.
        closure: computes the gradients at the model's weights.
        run: calls it for the weights as they are in the batches, see :meth:`~normopt.engine.wave.Wave.run`.
    """
    asking = [batch for batch in batches if batch.rule.momentum.looks_back and batch.taken() > 0]
    if not asking or closure is None:
        return False
    every = [p for group in groups for p in group["params"]]
    moved = [p for batch in asking for p in batch.params]
    gradients, weights = [p.grad for p in every], [p.detach().clone() for p in moved]
    try:
        for p in every:
            p.grad = None  # so that the closure cannot add to what is kept
        for batch in asking:
            torch._foreach_copy_(batch.params, batch.scatter(batch.state["previous"]))
        with torch.enable_grad():
            run(closure)
        for batch in asking:
            batch.past = [torch.zeros_like(p) if p.grad is None else p.grad for p in batch.params]
    finally:
        torch._foreach_copy_(moved, weights)
        for p, gradient in zip(every, gradients, strict=True):
            p.grad = gradient
    return True
