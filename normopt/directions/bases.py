"""In which coordinates? Orthonormal bases of rows and columns, learnt from the gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from normopt.ingredient.base import Ingredient
from normopt.ingredient.stage import Context
from normopt.ingredient.validate import check_count, check_range
from normopt.numerics.eigen import average_, eigh, gram_matrix, power_iteration_, reorder_


class Basis(Ingredient):
    """Orthonormal coordinates ``x -> L^T x R`` for :class:`~normopt.directions.Rotated`."""

    #: Whether the first gradient only prepares the basis and moves nothing.
    looks_first: ClassVar[bool] = False

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        """The state before the first gradient, for a batch ``x`` of shape ``(..., out, in)``."""
        raise NotImplementedError

    def look(self, g: Tensor, state: dict[str, Tensor]) -> None:
        """Prepare the basis from the first gradient; only called if ``looks_first``."""

    def rotate(self, x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """``L^T x R``, a new tensor or ``x`` itself."""
        raise NotImplementedError

    def unrotate(self, x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """``L x R^T``."""
        raise NotImplementedError

    def learn(self, g: Tensor, state: dict[str, Tensor], context: Context, memory: Sequence[Tensor]) -> None:
        """Change the basis after a step, for the next one; ``memory`` are tensors in its coordinates, shape
        ``(..., out or 1, in or 1)``, to be reordered in place where the new basis has another order.
        """


@dataclass(frozen=True)
class Eigenbasis(Basis):
    """The eigenvectors of averages of ``g g^T`` and ``g^T g``, followed by one step of power iteration at a time.

    The first gradient only builds the bases, from its own eigendecompositions. Then, after each step, ``S <- beta S +
    (1 - beta) g g^T``; every ``frequency`` steps the basis is sorted by its Rayleigh quotients, the largest first, and
    replaced by the orthonormal factor ``Q`` of ``S Q`` (SOAP, arXiv 2409.11321). Statistics and bases are kept in
    float32 or better; gradients whose squares overflow are not learnt from.

    Args:
        beta: weight of the past in the averages, in [0, 1).
        frequency: steps from one change of basis to the next.
        max_dim: longer sides are not rotated.
        vectors: rotate vectors too, matrices with a single row or column among them.
    """

    looks_first = True
    decides_on_host = True
    beta: float = 0.95
    frequency: int = 10
    max_dim: int = 10000
    vectors: bool = False

    def __post_init__(self) -> None:
        check_range(self, "beta", self.beta, 0, 1)
        check_count(self, "frequency", self.frequency)
        check_count(self, "max_dim", self.max_dim)

    def _sides(self, x: Tensor) -> list[str]:
        m, n = x.shape[-2:]
        if min(m, n) == 1 and not self.vectors:
            return []
        return [side for side, size in (("left", m), ("right", n)) if 1 < size <= self.max_dim]

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for side in self._sides(x):
            gram = gram_matrix(x, side)
            state |= {f"{side}_gram": torch.zeros_like(gram), f"{side}_basis": torch.zeros_like(gram)}
        return state

    def look(self, g: Tensor, state: dict[str, Tensor]) -> None:
        for side in self._sides(g):
            gram = average_(state[f"{side}_gram"], gram_matrix(g, side), self.beta)
            state[f"{side}_basis"].copy_(eigh(gram)[1].flip(-1))

    def rotate(self, x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        left, right = state.get("left_basis"), state.get("right_basis")
        x = x if left is None else left.mT @ x
        return x if right is None else x @ right

    def unrotate(self, x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        left, right = state.get("left_basis"), state.get("right_basis")
        x = x if left is None else left @ x
        return x if right is None else x @ right.mT

    def learn(self, g: Tensor, state: dict[str, Tensor], context: Context, memory: Sequence[Tensor]) -> None:
        for side in self._sides(g):
            gram = average_(state[f"{side}_gram"], gram_matrix(g, side), self.beta)
            if context.step % self.frequency == 0:
                order = power_iteration_(state[f"{side}_basis"], gram)
                for tensor in memory:
                    reorder_(tensor, order, side)
