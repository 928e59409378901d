"""More of the weights than their dtype has room for."""

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
    """Weights in bfloat16 are rounded up or down with probabilities that make the expected value the exact one.

    Steps of less than half a unit in the last place then count on average, without any state; what is lost to noise
    grows with the root of the number of steps, where :class:`KahanSum` loses next to nothing for 2 bytes a weight
    (Gupta et al., arXiv 1502.02551). The random bits are a hash of place and step: the same run rounds alike. Comes
    after all other bounds. Weights in other dtypes stay as they are.
    """

    reduces = "entry"
    place = 2

    def weight(self, w: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        if context.dtype != torch.bfloat16:
            return w
        return stochastically(w, context.dtype, context.step, -1, context.first).to(w.dtype)


@dataclass(frozen=True)
class KahanSum(Constraint):
    """Kahan summation for weights in half precision: what rounding takes from one step is added to the next.

    ``w' = w + c``, ``w <- round(w')``, ``c <- w' - w``, with the step in ``w``. Without it, steps of less than half a
    unit in the last place of a bfloat16 weight, 0.2% of it, are lost entirely. ``c`` is kept in bfloat16, 2 bytes for
    each weight, and the two together are as good as 16 bits of mantissa: steps of more than 1e-5 of a weight add up. It
    comes after all other bounds, and all other ingredients see ``w + c``: a bound holds for that, and for the weights
    to half precision. Weights in float32 and more are added up as they are.
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
