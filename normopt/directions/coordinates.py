"""Directions in other coordinates: rotated into a basis, cut into blocks, or part by part."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from normopt.directions.algebra import Chain
from normopt.directions.bases import Basis
from normopt.directions.pairs import Pair
from normopt.directions.smoothed import Smoothed
from normopt.ingredient.registry import read
from normopt.ingredient.stage import ROTATED, Context, Direction, Stage, substate
from normopt.ingredient.traits import like
from normopt.ingredient.validate import check_count
from normopt.ingredient.view import View
from normopt.numerics.blocks import Parts, cut_blocks, join_blocks, of_equal_length
from normopt.numerics.lengths import axes, euclidean


class _Wrapper(Direction):
    """A direction applied to matrices that have been rotated or cut; its traits are those of the direction inside."""

    needs_matrix = True
    takes_vectors = like("direction")
    cell = like("direction")
    degree = like("direction")
    looks_first = like("direction")
    sets_length = like("direction")
    direction: Direction

    def rms(self, shape: tuple[int, ...]) -> float:
        """The root mean square of the direction inside."""
        return self.direction.rms(shape)


@dataclass(frozen=True)
class Rotated(_Wrapper):
    """A direction in rotated coordinates: ``L direction(L^T x R) R^T`` with orthonormal ``L`` and ``R`` of the basis.

    ``Rotated(Smoothed(Max()), Eigenbasis())`` is SOAP: Adam in the eigenbasis of Shampoo's statistics. The basis is
    learnt from the gradients. When it changes, the direction's memory is not rotated, as in SOAP: only its rows and
    columns are put in the order of the new basis.

    Args:
        direction: the direction, or its name.
        basis: the basis, or its name.

    Raises:
        ValueError: the direction is the same in every basis, or has a memory with signs (an average of gradients),
            which would have to be rotated when the basis changes.
    """

    sees_weights = False
    looks_first = like("basis")
    direction: Direction
    basis: Basis

    def __post_init__(self) -> None:
        read(self, "direction", Direction)
        read(self, "basis", Basis)
        if self.direction.rotation_invariant:
            raise ValueError(f"Rotated: {self.direction} is the same in every basis; leave the rotation out")
        if self.direction.looks_first or _remembers_directions(self.direction):
            raise ValueError(f"Rotated: {self.direction} has a memory of directions, which would have to turn")

    @property
    def cell(self) -> tuple[str, str]:
        """The direction's row of the periodic table, in the column of rotated second moments."""
        return self.direction.cell[0], ROTATED

    @property
    def averages(self) -> frozenset[str]:
        return frozenset(f"rotated.{name}" for name in self.direction.averages)

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        inner = {f"rotated.{name}": tensor for name, tensor in self.direction.init_state(x).items()}
        return inner | self.basis.init_state(x)

    def look(self, g: Tensor, state: dict[str, Tensor]) -> None:
        self.basis.look(g, state)

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        basis, inner = self.basis, substate(state, "rotated.")
        there = context.through(lambda t: basis.rotate(t, state))
        d = basis.unrotate(self.direction(self._seen(x, state), inner, there), state)
        basis.learn(
            basis.source(x, context.g), state, context, [t for name, t in state.items() if name.startswith("rotated.")]
        )
        return d

    def apply(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        basis = self.basis
        there = context.through(lambda t: basis.rotate(t, state))
        return basis.unrotate(self.direction.apply(self._seen(x, state), substate(state, "rotated."), there), state)

    def _seen(self, x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """``L^T x R`` without rounding errors, which divided by a second moment near 0 could have any size."""
        turned = self.basis.rotate(x, state)
        if turned is x:
            return x
        noise = euclidean(x, axes(x), keepdim=True) * (4 * torch.finfo(x.dtype).eps)
        return torch.where(turned.abs() > noise, turned, 0.0)

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The direction's steepness in the rotated coordinates."""
        return self.direction.steepness(self.basis.rotate(g, state), substate(state, "rotated."))


def _remembers_directions(stage: Stage) -> bool:
    """Whether a stage's memory has signs: averages of gradients rotate with the basis, averages of squares do not."""
    if isinstance(stage, Chain):
        return any(map(_remembers_directions, stage.stages))
    if isinstance(stage, Pair):
        return any(map(_remembers_directions, stage.both().values()))
    return not isinstance(stage, Direction) or (isinstance(stage, Smoothed) and stage.centered is True)


@dataclass(frozen=True)
class Blocked(_Wrapper):
    """A direction applied to each block of a large matrix: sides longer than ``size`` are cut into equal parts.

    Bounds the cost of directions that keep or decompose square matrices (Shampoo's block size). A matrix whose sides
    cannot be cut into equal parts is padded with zeros.

    Args:
        direction: the direction, or its name.
        size: the longest side of a block.
    """

    sees_weights = False
    averages = like("direction")
    direction: Direction
    size: int = 1024

    def __post_init__(self) -> None:
        read(self, "direction", Direction)
        check_count(self, "size", self.size)

    def cut(self, x: Tensor) -> Tensor:
        """``x`` of shape ``(..., out, in)`` as blocks ``(..., blocks, out / rows, in / columns)``."""
        return cut_blocks(x, *self._parts(x.shape))

    def join(self, blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of ``cut``; ``shape`` ends in ``(out, in)``."""
        return join_blocks(blocks, shape, *self._parts(shape))

    def _parts(self, shape: tuple[int, ...]) -> tuple[Parts, Parts]:
        return of_equal_length(shape[-2], self.size), of_equal_length(shape[-1], self.size)

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        return self.direction.init_state(self.cut(x))

    def look(self, g: Tensor, state: dict[str, Tensor]) -> None:
        self.direction.look(self.cut(g), state)

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        return self.join(self.direction(self.cut(x), state, context.through(self.cut)), x.shape)

    def apply(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        return self.join(self.direction.apply(self.cut(x), state, context.through(self.cut)), x.shape)

    def rms(self, shape: tuple[int, ...]) -> float:
        """The direction's root mean square for a block."""
        m, n = shape[-2:] if len(shape) > 1 else (1, *shape)
        rows, columns = self._parts((m, n))
        return self.direction.rms((rows.length, columns.length))

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The sum of the direction's steepness over all blocks."""
        return self.direction.steepness(self.cut(g), state).sum(dim=-1)


@dataclass(frozen=True)
class InParts(_Wrapper):
    """A direction for each part of a matrix by itself, where a view cuts it into parts of unequal height.

    Query, key and value of grouped-query attention in one parameter move as three parameters would, as far as their
    direction goes. A rule makes it of its norm and its view. Dual norm and steepness: the sums over the parts. A matrix
    of another height, such as a vector seen as one row, has one part.

    Args:
        direction: the direction of each part.
        view: says the heights of the parts.
    """

    sees_weights = False
    _abstract = True
    direction: Direction
    view: View

    @property
    def averages(self) -> frozenset[str]:
        return frozenset(f"{i}.{name}" for i in range(len(self.view.heights)) for name in self.direction.averages)

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        parts = enumerate(self.view.cut(x))
        return {f"{i}.{name}": y for i, part in parts for name, y in self.direction.init_state(part).items()}

    def look(self, g: Tensor, state: dict[str, Tensor]) -> None:
        for i, part in enumerate(self.view.cut(g)):
            self.direction.look(part, substate(state, f"{i}."))

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        return self._joined(self.direction, x, state, context)

    def apply(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        return self._joined(self.direction.apply, x, state, context)

    def _joined(self, find: Callable[..., Tensor], x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        def found(i: int, part: Tensor) -> Tensor:
            return find(part, substate(state, f"{i}."), context.through(lambda t: self.view.cut(t)[i]))

        return torch.cat([found(i, part) for i, part in enumerate(self.view.cut(x))], dim=-2)

    def rms(self, shape: tuple[int, ...]) -> float:
        """The root of the mean square over all parts."""
        heights = self.view.heights if shape[-2] == sum(self.view.heights) else shape[-2:-1]
        squares = sum(self.direction.rms((*shape[:-2], m, shape[-1])) ** 2 * m for m in heights)
        return math.sqrt(squares / max(1, shape[-2]))

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The sum of the direction's steepness over all parts."""
        found = [self.direction.steepness(x, substate(state, f"{i}.")) for i, x in enumerate(self.view.cut(g))]
        return torch.stack(found).sum(dim=0)
