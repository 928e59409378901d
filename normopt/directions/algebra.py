"""Directions made of directions: in a chain, clipped, decayed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from normopt.ingredient.registry import get, read
from normopt.ingredient.stage import Context, Direction, Stage, coarsest, substate
from normopt.ingredient.traits import like, trait
from normopt.ingredient.validate import check_positive, check_range
from normopt.norms.base import Norm
from normopt.norms.entrywise import Euclidean
from normopt.numerics.lengths import normalize


@dataclass(frozen=True)
class Identity(Direction):
    """The gradient itself: the Euclidean norm's duality map at its dual norm's length, ``||g|| g / ||g||`` (SGD)."""

    sees_weights = False
    reduces = "entry"
    sets_length = False

    @property
    def cell(self) -> tuple[str, str]:
        """The Euclidean norm's cell."""
        return Euclidean().cell

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        return x


@dataclass(frozen=True)
class Clipped(Direction):
    """Clipping to a norm's ball: ``norm.project(x, radius)``, the nearest point of the ball.

    ``Clipped(Euclidean())`` clips updates to a root mean square of 1, as Adafactor does.

    Args:
        norm: the norm, or its name.
        radius: the radius of the ball, positive.
    """

    sees_weights = False
    reduces = like("norm")
    needs_matrix = like("norm")
    degree = None
    sets_length = False
    norm: Norm
    radius: float = 1.0

    def __post_init__(self) -> None:
        read(self, "norm", Norm)
        check_positive(self, "radius", self.radius)

    @property
    def decides_on_host(self) -> bool:
        return self.norm.reduces == "matrix"  # such norms project by decompositions, which synchronize

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        return self.norm.project(x, self.radius)


@dataclass(frozen=True)
class Decayed(Direction):
    """``x + weight_decay w``: weight decay as a stage of a ``Chain``; the next stages and the step size see the sum.

    For methods that average the sums (NovoGrad) or measure their length (LAMB).

    Args:
        weight_decay: not negative.
    """

    degree = None
    reduces = "entry"
    sets_length = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_range(self, "weight_decay", self.weight_decay, 0, float("inf"))

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        return x.add(context.w, alpha=self.weight_decay) if self.weight_decay else x


@dataclass(frozen=True)
class Tangent(Direction):
    """The part of ``x`` along the Stiefel manifold at the weights: ``x - w sym(w^T x) / r^2``, a stage of a ``Chain``.

    ``sym(a) = (a + a^T) / 2``, and ``r`` is the root mean square of the singular values of ``w``, all of which are
    ``r`` on the manifold of radius ``r``; wide matrices are transposed, and at ``w = 0`` all of ``x`` is left. It is
    the gradient on the manifold to which :class:`~normopt.Stiefel` takes the weights (arXiv 2601.21487). Of a square
    matrix of odd size one singular value of the result is 0 but for rounding.
    """

    sets_length = False
    needs_matrix = True

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        wide = x.shape[-2] < x.shape[-1]
        x, w = (x.mT, context.w.mT) if wide else (x, context.w)
        products = normalize(w, (-2, -1)).mT @ x
        inside = x - normalize(w, (-2, -1)) @ (products + products.mT) * (w.shape[-1] / 2)
        return inside.mT if wide else inside


@dataclass(frozen=True, init=False, repr=False)
class Chain(Direction):
    """Stages applied one after the other: ``Chain(Row(), Spectral())`` normalizes rows, then takes the polar factor.

    The first stage's input is what momentum returned, and its second moments are taken of the gradient. For each later
    stage, both are the result of the previous stage. A :class:`~normopt.momentum.Momentum` is a stage too:
    ``Chain(Euclidean(), EMA(0.9))`` averages unit gradients.

    Args:
        names_or_stages: norms, directions and momenta, or their names.

    Raises:
        ValueError: no stage, a stage other than the first with ``looks_first``, or a momentum with ``looks_back``.
    """

    sees_weights = False
    stages: tuple[Stage, ...]

    def __init__(self, *names_or_stages: str | Stage) -> None:
        if not names_or_stages or not all(isinstance(stage, (str, Stage)) for stage in names_or_stages):
            raise ValueError(f"Chain: needs one or more norms, directions or momenta, got {names_or_stages!r}")
        stages = tuple(get(Stage, stage) for stage in names_or_stages)
        for late in (stage for stage in stages[1:] if stage.looks_first):
            raise ValueError(f"Chain: {late} must come first, because it has to see the first gradient before it moves")
        for back in (stage for stage in stages if stage.looks_back):
            raise ValueError(f"Chain: {back} compares gradients at two points; only a rule's momentum can")
        object.__setattr__(self, "stages", stages)

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.stages))})"

    def __str__(self) -> str:
        return f"Chain({', '.join(map(str, self.stages))})"

    def resolve(self, options: Mapping[str, Any]) -> Chain:
        return Chain(*(stage.resolve(options) for stage in self.stages))

    def fitted(self, shape: tuple[int, ...]) -> Chain:
        return Chain(*(stage.fitted(shape) for stage in self.stages))

    @trait
    def reduces(self) -> str:
        """The coarsest level of the stages, see :func:`coarsest`."""
        return coarsest(stage.reduces for stage in self.stages)

    @trait
    def needs_matrix(self) -> bool:
        """Whether any stage works on matrices."""
        return any(stage.needs_matrix for stage in self.stages)

    @property
    def takes_vectors(self) -> bool:
        """Whether all stages take vectors."""
        return all(stage.takes_vectors for stage in self.stages)

    @property
    def cell(self) -> tuple[str, str]:
        """The cell of the first direction that has a length of its own, or else of the first."""
        found = [stage for stage in self.stages if isinstance(stage, Direction)]
        own = [stage for stage in found if stage.sets_length] or found
        return own[0].cell if own else super().cell

    @trait
    def degree(self) -> int | None:
        """The product of the stages' degrees."""
        degrees = [stage.degree for stage in self.stages]
        return None if None in degrees else min(degree for degree in degrees if degree is not None)

    @trait
    def looks_first(self) -> bool:
        """Whether the first stage initializes its state from the first gradient."""
        return self.stages[0].looks_first

    @property
    def averages(self) -> frozenset[str]:
        return frozenset(f"{i}.{name}" for i, stage in enumerate(self.stages) for name in stage.averages)

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        return {f"{i}.{k}": v for i, stage in enumerate(self.stages) for k, v in stage.init_state(x).items()}

    def look(self, g: Tensor, state: dict[str, Tensor]) -> None:
        self.stages[0].look(g, substate(state, "0."))

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        for i, stage in enumerate(self.stages):
            x = stage(x, substate(state, f"{i}."), context)
            context = context.seeing(x)
        return x

    def apply(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        for i, stage in enumerate(self.stages):
            x = stage.apply(x, substate(state, f"{i}."), context)
            context = context.seeing(x)
        return x

    def rms(self, shape: tuple[int, ...]) -> float:
        """The root mean square of the last direction that sets the length."""
        return self._last()[0].rms(shape)

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The steepness of the last direction that sets the length."""
        last, prefix = self._last()
        return last.steepness(g, substate(state, prefix))

    def _last(self) -> tuple[Direction, str]:
        """The last direction that sets the length, and the prefix of its state; ``Identity()`` if there is none."""
        for i, stage in reversed([*enumerate(self.stages)]):
            if isinstance(stage, Direction) and stage.sets_length:
                return stage, f"{i}."
        return Identity(), "-"
