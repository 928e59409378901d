"""Directions made of two stages that see the same input: one with the length of the other, sums, preconditioning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from normopt.directions.algebra import Identity
from normopt.directions.smoothed import Smoothed
from normopt.ingredient.registry import read
from normopt.ingredient.stage import Context, Direction, Stage, coarsest, substate
from normopt.ingredient.traits import like, trait
from normopt.ingredient.validate import check_range
from normopt.norms.base import Norm
from normopt.norms.entrywise import Euclidean
from normopt.norms.spectral import Spectral
from normopt.numerics.lengths import axes, euclidean, normalize


class Pair(Direction):
    """The base of two stages that see one input; their states stand side by side, under the names of ``both``."""

    def both(self) -> dict[str, Stage]:
        """The two, each by the prefix of its state."""
        raise NotImplementedError

    @trait
    def reduces(self) -> str:
        """The coarsest level of both."""
        return coarsest(part.reduces for part in self.both().values())

    @trait
    def needs_matrix(self) -> bool:
        """Whether either works on matrices."""
        return any(part.needs_matrix for part in self.both().values())

    @property
    def takes_vectors(self) -> bool:
        """Whether both take vectors."""
        return all(part.takes_vectors for part in self.both().values())

    @property
    def cell(self) -> tuple[str, str]:
        """The cell of the first."""
        first = next(iter(self.both().values()))
        return first.cell if isinstance(first, Direction) else super().cell

    @trait
    def looks_first(self) -> bool:
        """Whether either initializes its state from the first gradient."""
        return any(part.looks_first for part in self.both().values())

    @property
    def averages(self) -> frozenset[str]:
        return frozenset(prefix + name for prefix, part in self.both().items() for name in part.averages)

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        return {name + k: v for name, part in self.both().items() for k, v in part.init_state(x).items()}

    def look(self, g: Tensor, state: dict[str, Tensor]) -> None:
        for name, part in self.both().items():
            if part.looks_first:
                part.look(g, substate(state, name))

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        return self._joined(*(part(x, substate(state, name), context) for name, part in self.both().items()))

    def apply(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        return self._joined(*(part.apply(x, substate(state, name), context) for name, part in self.both().items()))

    def _joined(self, first: Tensor, second: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Grafted(Pair):
    """Grafting: one stage's direction, another's length: ``direction(x) ||magnitude(x)|| / ||direction(x)||``.

    Norms are Frobenius norms of each matrix. Source: Agarwal et al., "Disentangling adaptive gradient methods", arXiv
    2002.11803. With ``relative``, the direction keeps its own length, which is multiplied by the magnitude's:
    ``Grafted(Spectral(), Smoothed(Euclidean("unit")), relative=True)`` is NAMO's adaptive scale (arXiv 2602.17080).

    Args:
        direction: the stage whose result is rescaled, or its name.
        magnitude: the stage whose result has the length, or its name.
        relative: multiply by the length of ``magnitude(x)`` without dividing by that of ``direction(x)``.
    """

    sees_weights = False
    direction: Stage
    magnitude: Stage
    relative: bool = False

    def __post_init__(self) -> None:
        read(self, "direction", Stage)
        read(self, "magnitude", Stage)

    @trait
    def degree(self) -> int | None:
        """The magnitude's; with ``relative`` the sum of both."""
        first, second = self.direction.degree, self.magnitude.degree
        if not self.relative:
            return second
        return None if first is None or second is None or first + second > 1 else first + second

    @trait
    def reduces(self) -> str:
        """The coarsest level of both and of the Frobenius norm, ``"all"``."""
        return coarsest(("all", self.direction.reduces, self.magnitude.reduces))

    @trait
    def sets_length(self) -> bool:
        """False where the magnitude is the input itself."""
        return self.magnitude != Identity()

    def both(self) -> dict[str, Stage]:
        return {"direction.": self.direction, "magnitude.": self.magnitude}

    def _joined(self, first: Tensor, second: Tensor) -> Tensor:
        return first * euclidean(second, axes(second), keepdim=True) if self.relative else _as_long(first, second)

    def rms(self, shape: tuple[int, ...]) -> float:
        """The magnitude's root mean square; with ``relative`` the direction's, times the magnitude's usual length."""
        size = self.magnitude.rms(shape) if isinstance(self.magnitude, Direction) else math.nan
        if not self.relative:
            return size
        return (
            size
            * math.sqrt(math.prod(shape))
            * (self.direction.rms(shape) if isinstance(self.direction, Direction) else math.nan)
        )

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The Euclidean norm of ``g`` times the usual length of the magnitude, where that is known."""
        size = self.rms(tuple(g.shape[-2:]))
        if math.isnan(size):
            return super().steepness(g, state)
        return Euclidean().dual_norm(g) * size


@dataclass(frozen=True)
class Sum(Pair):
    """The sum of two directions of one input, ``first(x) + factor second(x)``.

    ``Sum(Spectral("unit"), Normalized(Spectral("unit")), -0.2)`` is Contra-Muon, which takes a part of the gradient out
    of its polar factor: singular values ``1 - 0.2 s / s_1`` (KellerJordan/modded-nanogpt).

    Args:
        first: a direction, or its name.
        second: a direction, or its name.
        factor: of ``second``; finite, of any sign.
    """

    sees_weights = False
    first: Direction
    second: Direction
    factor: float = 1.0

    def __post_init__(self) -> None:
        read(self, "first", Direction)
        read(self, "second", Direction)
        check_range(self, "factor", self.factor, -1e30, 1e30)

    @trait
    def degree(self) -> int | None:
        """The common degree of both; ``None`` if they differ."""
        return self.first.degree if self.first.degree == self.second.degree else None

    @trait
    def rotation_invariant(self) -> bool:
        """Whether both are."""
        return self.first.rotation_invariant and self.second.rotation_invariant

    def both(self) -> dict[str, Stage]:
        return {"first.": self.first, "second.": self.second}

    def _joined(self, first: Tensor, second: Tensor) -> Tensor:
        return first + self.factor * second

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The first direction's."""
        return self.first.steepness(g, substate(state, "first."))


@dataclass(frozen=True)
class Conjugated(Pair):
    """Precondition, take a direction, precondition back: ``P(direction(P(x)))``, where ``P`` divides by ``memory``.

    The result has the Frobenius length of ``direction(P(x))``, so that it does not grow where gradients shrink. It is
    the direction of steepest descent under the direction's norm in preconditioned coordinates, ``norm(P^-1(t))``.
    ``Conjugated(Spectral("unit"), Smoothed(Spectral("unit", exponent=0.5)))`` is ``L^-1/2 polar(L^-1/2 x R^-1/2)
    R^-1/2``, the step of FISMO (arXiv 2601.21750), with Shampoo's statistics in place of its own.

    Args:
        direction: the direction in preconditioned coordinates, or its name.
        memory: what divides before and after; its ``norm`` says by which roots.
    """

    sees_weights = False
    degree = like("direction")
    sets_length = like("direction")
    direction: Direction = Spectral()
    memory: Smoothed = Smoothed(Spectral("unit"))

    def __post_init__(self) -> None:
        read(self, "direction", Direction)
        read(self, "memory", Smoothed)
        if self.direction.looks_first:
            raise ValueError(f"Conjugated: {self.direction} has to see the first gradient before it moves")

    @trait
    def reduces(self) -> str:
        """The coarsest level of both and of the Frobenius norm, ``"all"``."""
        return coarsest(("all", self.direction.reduces, self.memory.reduces))

    def both(self) -> dict[str, Stage]:
        return {"memory.": self.memory, "direction.": self.direction}

    def rms(self, shape: tuple[int, ...]) -> float:
        """The direction's root mean square."""
        return self.direction.rms(shape)

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The direction's, in coordinates without preconditioning."""
        return self.direction.steepness(g, substate(state, "direction."))

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        memory = substate(state, "memory.")
        there = self.memory(x, memory, context)
        d = self.direction(there, substate(state, "direction."), context.seeing(there))
        return _as_long(self.memory.apply(d, memory, context), d)

    def apply(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        memory = substate(state, "memory.")
        there = self.memory.apply(x, memory, context)
        d = self.direction.apply(there, substate(state, "direction."), context.seeing(there))
        return _as_long(self.memory.apply(d, memory, context), d)


@dataclass(frozen=True)
class Normalized(Direction):
    """The input itself, brought to length 1 in a norm: ``x / norm(x)``, 0 where ``x`` is 0.

    No duality map but the Euclidean norm's: every singular value, row and entry keeps its part of the input.

    Args:
        norm: the norm, or its name; its scale multiplies the result.
    """

    sees_weights = False
    degree = 0
    needs_matrix = like("norm")
    rotation_invariant = like("norm")
    norm: Norm = Spectral()

    def __post_init__(self) -> None:
        read(self, "norm", Norm)

    @trait
    def reduces(self) -> str:
        """The coarsest level of the norm and of sums, ``"all"``."""
        return coarsest(("all", self.norm.reduces))

    @property
    def decides_on_host(self) -> bool:
        return self.norm.reduces == "matrix"  # such norms decompose, which synchronizes

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        # Divided by the Frobenius norm first, so that no size of the input is lost in squares.
        unit = normalize(x, axes(x))
        size = self.norm.norm(unit)[..., None, None].to(unit.dtype)
        return unit / torch.where(size == 0, 1.0, size)

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The norm's."""
        return self.norm.steepness(g, state)


def _as_long(x: Tensor, other: Tensor) -> Tensor:
    """``x`` with the Frobenius length of ``other``; a new tensor."""
    return normalize(x, axes(x)).mul_(euclidean(other, axes(other), keepdim=True))
