"""Directions that see the inputs of linear layers: Newton-Muon, and KFAC's factor of the inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from normopt.directions.algebra import Identity
from normopt.directions.turns import due, in_turn
from normopt.ingredient.registry import read
from normopt.ingredient.stage import Context, Direction, substate
from normopt.ingredient.traits import like
from normopt.ingredient.validate import check_count, check_positive, check_range
from normopt.numerics.eigen import matrix_power
from normopt.numerics.lengths import euclidean, normalize


@dataclass(frozen=True)
class InputWhitened(Direction):
    """A direction of gradients whitened by a layer's inputs: ``direction(x (C + damping c I)^exponent)``.

    ``C``, of shape ``(in, in)``, is an average of ``X^T X / N`` over steps, where the ``N`` rows of ``X`` are the
    inputs of a linear layer, and ``c`` its mean eigenvalue. :class:`~normopt.InputStatistics` keeps it. Below ``P(x)``
    is what the direction sees; its second moments are those of ``P(g)``.

    ``InputWhitened(Smoothed(Max()))`` is Adam after KFAC's factor of the inputs, with a root, for the output layer
    (KellerJordan/modded-nanogpt, pull request 341); ``InputWhitened(Spectral("max1"), -1.0, 0.2, keep_length=False,
    frequency=64, staggered=False)`` is Newton-Muon (arXiv 2604.01472). Both take the momentum of ``P(g)``; here it is
    ``P`` of the momentum, the same as long as ``C`` is. ``Chain(InputWhitened(), EMA(0.95), Spectral())`` without
    another momentum has their order.

    Args:
        direction: the direction, or its name.
        exponent: negative.
        damping: of the mean eigenvalue, positive.
        keep_length: give ``P(x)`` the Frobenius norm of ``x``.
        frequency: number of steps between eigendecompositions, which cost about ``10 in^3`` FLOPs.
        staggered: give each matrix a step of its own for its eigendecomposition, spread over the ``frequency`` steps.

    Memory: ``in^2`` numbers for each matrix, twice with a ``frequency`` above 1.

    Raises:
        ValueError: a number out of range, or a direction that has to see the first gradient before it moves; and in
            ``step``, before anything has changed, a parameter without statistics.
    """

    sees_weights = False
    needs_matrix = True
    reads_inputs = True
    decides_on_host = True
    cell = like("direction")
    degree = like("direction")
    sets_length = like("direction")
    direction: Direction = Identity()
    exponent: float = -0.5
    damping: float = 0.1
    keep_length: bool = True
    frequency: int = 1
    staggered: bool = True

    def __post_init__(self) -> None:
        read(self, "direction", Direction)
        check_range(self, "exponent", self.exponent, -100, 0)
        check_positive(self, "damping", self.damping)
        check_count(self, "frequency", self.frequency)
        if self.direction.looks_first:
            raise ValueError(f"InputWhitened: {self.direction} has to see the first gradient before it moves")

    @property
    def averages(self) -> frozenset[str]:
        return frozenset(f"direction.{name}" for name in self.direction.averages)

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        square = x.new_zeros(*x.shape[:-2], x.shape[-1], x.shape[-1])
        kept = {"root": torch.zeros_like(square)} if self.frequency > 1 else {}
        return {"inputs": square, **kept, **{f"direction.{n}": y for n, y in self.direction.init_state(x).items()}}

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        if self.frequency > 1:
            in_turn(self._due(x, state["root"], context), self._renew, state["root"], state["inputs"])
        root = self._root(state)
        there = dataclasses.replace(context, g=self._whitened(context.g, root))
        return self.direction(self._whitened(x, root), substate(state, "direction."), there)

    def apply(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        root = self._root(state)
        there = dataclasses.replace(context, g=self._whitened(context.g, root))
        return self.direction.apply(self._whitened(x, root), substate(state, "direction."), there)

    def _due(self, x: Tensor, root: Tensor, context: Context) -> Tensor:
        mask = due(context, x.shape, self.frequency, self.staggered)
        if context.step == 2:  # the first may have been one without statistics, that makes room for a checkpoint
            mask |= (root == 0).all(dim=-1).all(dim=-1).to(mask.device)
        return torch.ones_like(mask) if context.step == 1 else mask

    def _renew(self, root: Tensor, inputs: Tensor) -> None:
        root.copy_(self._power(inputs))

    def _root(self, state: Mapping[str, Tensor]) -> Tensor:
        return state["root"] if self.frequency > 1 else self._power(state["inputs"])

    def _power(self, inputs: Tensor) -> Tensor:
        """``(C + damping c I)^exponent``."""
        mean = inputs.diagonal(dim1=-2, dim2=-1).mean(dim=-1, keepdim=True)
        return matrix_power(inputs, self.exponent, self.damping * mean)

    def _whitened(self, x: Tensor, root: Tensor) -> Tensor:
        """``P(x)``."""
        if not self.keep_length:
            return x @ root
        return normalize(normalize(x, (-2, -1)) @ root, (-2, -1)) * euclidean(x, (-2, -1), keepdim=True)

    def rms(self, shape: tuple[int, ...]) -> float:
        """The direction's root mean square."""
        return self.direction.rms(shape)

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The direction's, of the whitened gradient."""
        return self.direction.steepness(self._whitened(g, self._root(state)), substate(state, "direction."))
