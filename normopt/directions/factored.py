"""Adafactor's factored second moment: one number a row and one a column."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normopt.directions.base import UnitRMS
from normopt.ingredient.stage import Context
from normopt.ingredient.validate import check_range


@dataclass(frozen=True)
class Factored(UnitRMS):
    """Adafactor's second moment: averages of row means and column means of ``g^2`` (arXiv 1804.04235).

    ``r <- r + a (row means of g^2 - r)``, ``c <- c + a (column means of g^2 - c)`` with ``a = t^exponent``, ``v = r c /
    mean(r)``, result ``x / max(sqrt(v), eps)``. A vector is one row, for which ``v`` is the whole second moment. This
    is no norm's duality map: without memory (``exponent=0``) it divides each entry by the sizes of its row and of its
    column at once, one step of a Sinkhorn iteration.

    Args:
        exponent: exponent of the step number ``t`` in the weight of the newest gradient, at most 0.
        eps: the smallest divisor; ``None``: the working dtype's epsilon, ``torch.finfo(dtype).eps``.
    """

    sees_weights = False
    reduces = "all"
    needs_matrix = True
    takes_vectors = True
    exponent: float = -0.8
    eps: float | None = None

    def __post_init__(self) -> None:
        check_range(self, "exponent", self.exponent, -1e300, 0, closed=True)
        if self.eps is not None:
            check_range(self, "eps", self.eps, 0, float("inf"))

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        return {"row": torch.zeros_like(x[..., :1]), "column": torch.zeros_like(x[..., :1, :])}

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        square = context.g.square()
        square.clamp_(max=torch.finfo(square.dtype).max / (2 * max(1, *square.shape[-2:])))  # keeps the sums finite
        newest = context.step**self.exponent
        newest = newest.to(square.dtype) if isinstance(newest, Tensor) else newest
        state["row"].lerp_(square.mean(dim=-1, keepdim=True), newest)
        state["column"].lerp_(square.mean(dim=-2, keepdim=True), newest)
        return self.apply(x, state, context)

    def apply(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        eps = torch.finfo(x.dtype).eps if self.eps is None else max(self.eps, torch.finfo(x.dtype).tiny)
        row, size = state["row"], state["column"].sqrt()
        if x.shape[-2] > 1:
            size = size * row.div(row.mean(dim=-2, keepdim=True).clamp_(min=eps)).sqrt_()
        return torch.div(x, size.clamp_(min=eps), out=size)
