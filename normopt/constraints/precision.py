"""Weights in half precision: stochastic rounding and Kahan summation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from normopt.constraints.base import Constraint
from normopt.ingredient.stage import Context
from normopt.numerics.rounding import stochastically


@dataclass(frozen=True)
class StochasticRounding(Constraint):
    """Stochastic rounding of bfloat16 weights: up or down with probabilities that make the expected value exact.

    Steps of less than half a unit in the last place then count on average, without any state (Gupta et al., arXiv
    1502.02551). The error grows with the root of the number of steps, where :class:`KahanSum`, for 2 bytes a weight,
    loses almost nothing. The random bits are a hash of the parameter's number, the place in it and the step: the same
    run rounds in the same way, on one machine or on many. It is applied after all other bounds. Weights in other dtypes
    are unchanged.
    """

    reduces = "entry"
    place = 2

    def weight(self, w: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        if context.dtype != torch.bfloat16:
            return w
        where = None if context.places is None else context.places()
        return stochastically(w, context.dtype, context.step, -1, where).to(w.dtype)


@dataclass(frozen=True)
class KahanSum(Constraint):
    """Kahan summation for weights in half precision: the rounding error of one step is added to the next.

    ``w' = w + c``, ``w <- round(w')``, ``c <- w' - w``, with the step included in the first ``w``. Without it, steps of
    less than half a unit in the last place of a bfloat16 weight, 0.2% of it, are lost entirely. ``c`` is kept in
    bfloat16, 2 bytes a weight, and the pair is as good as 16 bits of mantissa: steps of more than 1e-5 of a weight add
    up. It is applied after all other bounds, and all other ingredients see ``w + c``: a bound holds for this sum, and
    for the weights to half precision. Weights in float32 or float64 need no compensation, and are added up as usual.
    """

    reduces = "entry"
    place = 2

    def init_state(self, x: Tensor, weights: Callable[[], Tensor]) -> dict[str, Tensor]:
        return {"compensation": torch.zeros_like(x, dtype=torch.bfloat16)}

    def whole(self, w: Tensor, state: dict[str, Tensor]) -> Tensor:
        return w + state["compensation"]

    def weight(self, w: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        rounded = w if context.dtype is None else w.to(context.dtype).to(w.dtype)
        state["compensation"].copy_(w - rounded)
        return rounded
