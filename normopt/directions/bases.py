"""The coordinates of ``Rotated``: orthonormal bases of rows and columns, learnt from the gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from normopt.directions.turns import due, in_turn
from normopt.ingredient.base import Ingredient
from normopt.ingredient.stage import Context
from normopt.ingredient.validate import check_choice, check_count, check_range
from normopt.norms.spectral import SIDES
from normopt.numerics.eigen import average_, eigh, gram_matrix, power_iteration_, reorder_


class Basis(Ingredient):
    """Orthonormal coordinates ``x -> L^T x R`` for :class:`~normopt.directions.Rotated`."""

    #: Whether the first gradient only initializes the basis, while the weights stay.
    looks_first: ClassVar[bool] = False

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        """The state before the first gradient, for a batch ``x`` of shape ``(..., out, in)``."""
        raise NotImplementedError

    def look(self, g: Tensor, state: dict[str, Tensor]) -> None:
        """Initialize the basis, in place, from the first gradient; only called if ``looks_first``."""

    def rotate(self, x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """``L^T x R``, a new tensor or ``x`` itself."""
        raise NotImplementedError

    def unrotate(self, x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """``L x R^T``."""
        raise NotImplementedError

    def source(self, x: Tensor, g: Tensor) -> Tensor:
        """What the basis is learnt from: the gradient ``g``, or ``x``, the direction's input."""
        return g

    def learn(self, g: Tensor, state: dict[str, Tensor], context: Context, memory: Sequence[Tensor]) -> None:
        """Update the basis after a step, for the next step.

        Args:
            g: what ``source`` returns, shape ``(..., out, in)``.
            state: the basis' tensors, updated in place.
            context: the context of the step.
            memory: tensors in the coordinates of the basis, shape ``(..., out or 1, in or 1)``, whose rows and columns
                are reordered in place when the basis vectors are.
        """


@dataclass(frozen=True)
class Eigenbasis(Basis):
    """SOAP's basis: the eigenvectors of EMAs of ``g g^T`` and ``g^T g``, updated by one step of power iteration.

    The first gradient only initializes the bases, by its own eigendecompositions. Then, after each step, ``S <- beta S
    + (1 - beta) g g^T``; every ``frequency`` steps the basis is sorted by its Rayleigh quotients, the largest first,
    and replaced by the orthonormal factor ``Q`` of ``S Q`` (SOAP, arXiv 2409.11321). Averages and bases are kept in
    float32 or better; gradients whose squares overflow are left out of the averages. With ``exact`` the bases are the
    eigenvectors themselves (SPlus, arXiv 2506.07254).

    Args:
        beta: decay rate of the averages, in [0, 1).
        frequency: number of steps between updates of the bases.
        max_dim: longer sides are not rotated.
        vectors: whether vectors, and matrices with a single row or column, are rotated too.
        exact: decompose the averages in place of one step of power iteration.
        sides: ``"both"``, or only the ``"smaller"`` one, the columns of a square matrix.
        of: whose bases: of the ``"gradient"``, or of the ``"momentum"``, the direction's input. With ``exact`` and
            ``beta=0`` the latter are the singular vectors of the average, as in Conda (arXiv 2509.24218).
        staggered: give each matrix a step of its own for its update, spread over the ``frequency`` steps.
    """

    looks_first = True
    decides_on_host = True
    squares = True
    beta: float = 0.95
    frequency: int = 10
    max_dim: int = 10000
    vectors: bool = False
    exact: bool = False
    sides: str = "both"
    of: str = "gradient"
    staggered: bool = True

    def __post_init__(self) -> None:
        check_choice(self, "sides", self.sides, SIDES)
        check_choice(self, "of", self.of, ("gradient", "momentum"))
        check_range(self, "beta", self.beta, 0, 1)
        check_count(self, "frequency", self.frequency)
        check_count(self, "max_dim", self.max_dim)

    def _sides(self, x: Tensor) -> list[str]:
        m, n = x.shape[-2:]
        if min(m, n) == 1 and not self.vectors:
            return []
        taken = {"left": m <= self.max_dim, "right": n <= self.max_dim}
        if self.sides == "smaller":
            taken["right" if m < n else "left"] = False
        return [side for side, size in (("left", m), ("right", n)) if size > 1 and taken[side]]

    def source(self, x: Tensor, g: Tensor) -> Tensor:
        return x if self.of == "momentum" else g

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
        mask = due(context, g.shape, self.frequency, self.staggered)
        for side in self._sides(g):
            gram = average_(state[f"{side}_gram"], gram_matrix(g, side), self.beta)
            in_turn(mask, partial(self._turn, side), state[f"{side}_basis"], gram, *memory)

    def _turn(self, side: str, basis: Tensor, gram: Tensor, *memory: Tensor) -> None:
        if self.exact:
            basis.copy_(eigh(gram)[1].flip(-1))
            return
        order = power_iteration_(basis, gram)
        for tensor in memory:
            reorder_(tensor, order, side)
