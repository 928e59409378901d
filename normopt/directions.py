"""Which direction is steepest? The algebra over norms: memory, composition and borrowed lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from normopt.bases import Basis
from normopt.ingredient import (
    Context,
    Option,
    Stage,
    check_choice,
    check_count,
    check_range,
    coarsest,
    get,
    read,
    substate,
)
from normopt.norms.base import ROTATED, SECOND_MOMENT, Direction, Norm, axes, euclidean, normalize
from normopt.norms.vector import Euclidean

ACCUMULATE = ("ema", "sum", "max")
EPS_AT = ("corrected", "raw", "moment")


@dataclass(frozen=True)
class Smoothed(Direction):
    """A norm with memory: ``norm.whiten`` with the second moments of all gradients so far instead of this one's.

    ``s <- beta s + (1 - beta) second_moment(g)``, then ``whiten(x, s / (1 - beta^step), eps)``. ``Smoothed(Max())`` is
    Adam's denominator, ``Smoothed(Spectral())`` Shampoo's, ``Smoothed(Euclidean())`` NovoGrad's. With ``beta=0`` and
    ``eps=0`` it is the norm's duality map.

    Args:
        norm: the norm; it needs a second moment.
        beta: weight of the past, in [0, 1); not used by ``accumulate="sum"``.
        eps: added to the root of the second moment; under the spectral norm to the diagonal of the second moment
            itself, as in Shampoo. It follows the scale that a step size gives to gradients (Prodigy).
        bias_correction: divide by ``1 - beta^step``.
        accumulate: ``"ema"``; ``"sum"`` over all steps (Adagrad, the Shampoo of arXiv 1802.09568); or ``"max"``,
            ``sqrt(s) <- max(beta sqrt(s), sqrt(second_moment(g)) + eps)`` (Adamax, arXiv 1412.6980, section 7.1). The
            latter two have no bias to correct.
        initial: what every entry of the second moment starts from; ``"first"``: the first gradient's second moment,
            without bias correction (NovoGrad).
        maximum: divide by the largest second moment so far, before the bias correction (AMSGrad as in torch.optim).
        centered: subtract the second moment of the average gradient (RMSprop's variance).
        eps_at: where ``eps`` is added: to the root, ``"corrected"`` for bias or still ``"raw"`` (SOAP), or to the
            ``"moment"`` under the root (DASGO).
        frequency: compute the roots at the first step and at every step that is a multiple of this, and keep them in
            between, as another state; for the spectral norm, whose roots are expensive. While the gradients of a matrix
            are 0, its root waits, at most to the first multiple.

    Raises:
        ValueError: the norm has no second moment, a number is out of range, or options exclude each other.
    """

    squares: ClassVar[bool] = True  # type: ignore[misc]
    norm: Norm
    beta: float = 0.999
    eps: float = 1e-8
    bias_correction: bool = True
    accumulate: str = "ema"
    initial: float | str = 0.0
    maximum: bool = False
    centered: bool = False
    eps_at: str = "corrected"
    frequency: int = 1

    def __post_init__(self) -> None:
        read(self, "norm", Norm)
        check_range(self, "beta", self.beta, 0, 1, closed=self.accumulate == "sum")
        check_range(self, "eps", self.eps, 0, float("inf"))
        check_count(self, "frequency", self.frequency)
        check_choice(self, "accumulate", self.accumulate, ACCUMULATE)
        check_choice(self, "eps_at", self.eps_at, EPS_AT)
        if self.initial != "first":
            check_range(self, "initial", self.initial, 0, float("inf"))
        if not self.norm.has_memory:
            raise ValueError(f"Smoothed: {self.norm} has no second moment to remember")
        of_matrices = f"Smoothed: the second moments of {self.norm} are matrices"
        if self.norm.matrix_memory and (self.maximum is True or self.accumulate == "max"):
            raise ValueError(f"{of_matrices}, of which none is the largest")
        if self.norm.matrix_memory and self.initial not in (0.0, "first"):
            raise ValueError(f"{of_matrices}; they start from 0 or from the first one")
        if not self.norm.matrix_memory and not isinstance(self.frequency, Option) and self.frequency > 1:
            raise ValueError(f"Smoothed: frequency is for norms whose second moments are matrices, not for {self.norm}")
        if self.accumulate == "max" and (self.maximum is True or self.centered is True or self.initial):
            raise ValueError("Smoothed: accumulate='max' starts from 0 and is neither centered nor a maximum besides")

    @property
    def reduces(self) -> str:  # type: ignore[override]
        """That of the norm."""
        return self.norm.reduces

    @property
    def needs_matrix(self) -> bool:  # type: ignore[override]
        """That of the norm."""
        return self.norm.needs_matrix

    @property
    def takes_vectors(self) -> bool:
        """Whether the norm remembers them."""
        return self.norm.remembers_vectors

    @property
    def rotation_invariant(self) -> bool:
        """That of the norm."""
        return self.norm.rotation_invariant

    @property
    def cell(self) -> tuple[str, str]:
        """The norm's row, with memory."""
        return self.norm.cell[0], SECOND_MOMENT

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        stats = self.norm.second_moment(x)
        start = 0.0 if isinstance(self.initial, str) else self.initial
        state = {f"second_moment{i or ''}": torch.full_like(s, start) for i, s in enumerate(stats)}
        if self.frequency > 1:
            state |= {f"root{i or ''}": torch.zeros_like(s) for i, s in enumerate(stats)}
        if self.maximum:
            state |= {f"max_second_moment{i or ''}": torch.full_like(s, start) for i, s in enumerate(stats)}
        return state | ({"mean": torch.zeros_like(x)} if self.centered else {})

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        self._remember(context.g, state, context)
        if self.frequency > 1:
            self._refresh(state, context)
        return self.apply(x, state, context)

    @property
    def averages(self) -> frozenset[str]:
        plain = self.accumulate == "ema" and not (self.centered or self.maximum or self.norm.matrix_memory)
        return frozenset({"second_moment"} if plain else ())

    @property
    def decides_on_host(self) -> bool:
        return self.frequency > 1 or self.initial == "first" or self.norm.matrix_memory

    def apply(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        kept = _all(state, "root")
        roots = kept or self._roots(state, context)
        d = self.norm.divide(x, roots, out=None if kept else roots[0])
        # (s / c^2)^(-1/2) = c s^(-1/2): of matrices, the bias correction costs nothing.
        correction = 1.0 if self.norm.matrix_memory else self._correction(context.step)
        return d if isinstance(correction, float) and correction == 1.0 else d.mul_(correction)

    def _refresh(self, state: dict[str, Tensor], context: Context) -> None:
        """Compute the roots that are kept: all when they are due, before that those that are still 0."""
        kept = _all(state, "root")
        if context.step % self.frequency == 0:
            for root, new in zip(kept, self._roots(state, context), strict=True):
                root.copy_(new)
        elif context.step < self.frequency:
            missing = [(root == 0).all(dim=-1, keepdim=True).all(dim=-2, keepdim=True) for root in kept]
            if any(bool(each.any()) for each in missing):
                for root, each, new in zip(kept, missing, self._roots(state, context), strict=True):
                    root.copy_(torch.where(each, new, root))

    def _remember(self, g: Tensor, state: dict[str, Tensor], context: Context) -> None:
        stats = _all(state, "second_moment")
        if self.accumulate == "max":
            for s, new in zip(stats, self.norm.second_moment(g), strict=True):
                torch.maximum(s.mul_(self.beta**2), new.sqrt_().add_(self.eps * context.scale).square_(), out=s)
            return
        keep, add = (1.0, 1.0) if self.accumulate == "sum" else (self.beta, 1 - self.beta)
        if self.initial == "first" and context.step == 1:
            keep, add = 0.0, 1.0
        self.norm.remember_(stats, g, keep, add)
        for s, largest in zip(stats, _all(state, "max_second_moment"), strict=False):
            torch.maximum(s, largest, out=largest)
        if self.centered:
            state["mean"].mul_(keep).add_(g, alpha=add)

    def _correction(self, step: float) -> float:
        """The root of what the second moment is to be divided by."""
        plain = not self.bias_correction or self.accumulate != "ema" or self.initial == "first"
        return 1.0 if plain else (1 - self.beta**step) ** 0.5

    def _roots(self, state: dict[str, Tensor], context: Context) -> tuple[Tensor, ...]:
        """The roots of the second moments, plus eps, both without bias correction unless the moments are matrices."""
        stats = _all(state, "max_second_moment" if self.maximum else "second_moment")
        if self.centered:
            means = self.norm.second_moment(state["mean"])
            stats = tuple(s - mean for s, mean in zip(stats, means, strict=True))
            stats = stats if self.norm.matrix_memory else tuple(s.clamp_(min=0.0) for s in stats)
        correction = self._correction(context.step)
        unit = context.scale if self.eps_at == "raw" else context.scale * correction
        if self.norm.matrix_memory and correction != 1.0:
            stats, unit = tuple(s / correction**2 for s in stats), unit / correction
        inside = self.eps_at == "moment" or self.norm.matrix_memory
        eps = 0.0 if self.accumulate == "max" or not self.eps else self.eps * unit ** (2 if inside else 1)
        if inside and not self.norm.matrix_memory:
            stats, eps = tuple(s + eps for s in stats), 0.0
        return self.norm.unit_roots(stats, eps)

    def rms(self, shape: tuple[int, ...]) -> float:
        """That of the norm: the size of a step whose gradient is as large as those before it."""
        return self.norm.rms(shape)

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """That of the norm."""
        return self.norm.steepness(g, state)


def _all(state: Mapping[str, Tensor], name: str) -> tuple[Tensor, ...]:
    """The tensors called ``name``, ``name1`` ..."""
    return tuple(tensor for key, tensor in state.items() if key.rstrip("0123456789") == name)


@dataclass(frozen=True)
class Factored(Direction):
    """Adafactor's memory: a column and a row in place of the whole second moment (arXiv 1804.04235).

    ``r <- r + t^decay (row means of g^2 - r)``, ``c`` likewise of columns, ``v = r c / mean(r)``, result
    ``x / max(sqrt(v), eps)``. A vector is one row, so that ``v`` is its own second moment. This is no norm's duality
    map: without memory (``decay=0``) it divides each entry by the sizes of its row and of its column at once, one step
    of a Sinkhorn iteration.

    Args:
        decay: exponent of the step number in the weight of the newest gradient, at most 0.
        eps: the least that is divided by; ``None``: the smallest ``eps`` with ``1 + eps > 1`` in the working dtype.
    """

    reduces: ClassVar[str] = "all"  # type: ignore[misc]
    needs_matrix: ClassVar[bool] = True  # type: ignore[misc]
    decay: float = -0.8
    eps: float | None = None

    def __post_init__(self) -> None:
        check_range(self, "decay", self.decay, -1e300, 0, closed=True)
        if self.eps is not None:
            check_range(self, "eps", self.eps, 0, float("inf"))

    @property
    def takes_vectors(self) -> bool:
        """Always."""
        return True

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        return {"row": torch.zeros_like(x[..., :1]), "column": torch.zeros_like(x[..., :1, :])}

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        square = context.g.square()
        square.clamp_(max=torch.finfo(square.dtype).max / (2 * max(1, *square.shape[-2:])))  # so that sums are finite
        newest = context.step**self.decay
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

    def rms(self, shape: tuple[int, ...]) -> float:
        """1."""
        return 1.0

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """``sqrt(numel) ||g||``: the update has root mean square 1."""
        return Euclidean().dual_norm(g)


@dataclass(frozen=True)
class Identity(Direction):
    """The gradient itself: the Euclidean norm's duality map at its dual norm's length, ``||g|| g / ||g||`` (SGD)."""

    reduces: ClassVar[str] = "entry"  # type: ignore[misc]

    @property
    def cell(self) -> tuple[str, str]:
        """The Euclidean norm's."""
        return Euclidean().cell

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        return x


@dataclass(frozen=True)
class Clipped(Direction):
    """The nearest point of a norm's ball: ``norm.project(x, radius)``.

    ``Clipped(Euclidean())`` shortens updates to a root mean square of at most 1, as Adafactor does.

    Args:
        norm: whose ball.
        radius: of the ball.
    """

    degree: ClassVar[None] = None  # type: ignore[misc]
    sets_length: ClassVar[bool] = False  # type: ignore[misc]
    norm: Norm
    radius: float = 1.0

    def __post_init__(self) -> None:
        read(self, "norm", Norm)
        check_range(self, "radius", self.radius, 0, float("inf"))

    @property
    def decides_on_host(self) -> bool:
        return self.norm.reduces == "matrix"  # decompositions

    @property
    def reduces(self) -> str:  # type: ignore[override]
        """That of the norm."""
        return self.norm.reduces

    @property
    def needs_matrix(self) -> bool:  # type: ignore[override]
        """That of the norm."""
        return self.norm.needs_matrix

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        return self.norm.project(x, self.radius)


@dataclass(frozen=True)
class Decayed(Direction):
    """``x + weight_decay w``: weight decay as a part of the direction, before what comes after it sees the result.

    In a ``Chain``, for methods that average decayed directions (NovoGrad) or measure their length (LAMB).

    Args:
        weight_decay: not negative.
    """

    degree: ClassVar[None] = None  # type: ignore[misc]
    reduces: ClassVar[str] = "entry"  # type: ignore[misc]
    sets_length: ClassVar[bool] = False  # type: ignore[misc]
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_range(self, "weight_decay", self.weight_decay, 0, float("inf"))

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        return x.add(context.w, alpha=self.weight_decay) if self.weight_decay else x


@dataclass(frozen=True, init=False, repr=False)
class Chain(Direction):
    """Stages one after the other: ``Chain(Row(), Spectral())`` normalizes rows, then takes the polar factor.

    The first stage sees the gradient beside the momentum; for each later stage both are what the stage before returned.
    A :class:`~normopt.momentum.Momentum` is a stage too: ``Chain(Euclidean(), EMA(0.9))`` averages unit gradients.
    """

    stages: tuple[Stage, ...]

    def __init__(self, *names_or_stages: str | Stage) -> None:
        if not names_or_stages or not all(isinstance(stage, (str, Stage)) for stage in names_or_stages):
            raise ValueError(f"Chain: needs one or more norms, directions or momenta, got {names_or_stages!r}")
        stages = tuple(get(Stage, stage) for stage in names_or_stages)
        for late in (stage for stage in stages[1:] if stage.looks_first):
            raise ValueError(f"Chain: {late} must come first, because it has to see the first gradient before it moves")
        for back in (stage for stage in stages if getattr(stage, "looks_back", False)):
            raise ValueError(f"Chain: {back} compares gradients at two points; only a rule's momentum can")
        object.__setattr__(self, "stages", stages)

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.stages))})"

    def __str__(self) -> str:
        return f"Chain({', '.join(map(str, self.stages))})"

    def resolve(self, options: Mapping[str, Any]) -> Chain:
        return Chain(*(stage.resolve(options) for stage in self.stages))

    @property
    def reduces(self) -> str:  # type: ignore[override]
        """The common level of all stages."""
        return coarsest(stage.reduces for stage in self.stages)

    @property
    def needs_matrix(self) -> bool:  # type: ignore[override]
        """Whether any stage does."""
        return any(stage.needs_matrix for stage in self.stages)

    @property
    def takes_vectors(self) -> bool:
        """Whether all stages do."""
        return all(stage.takes_vectors for stage in self.stages)

    @property
    def cell(self) -> tuple[str, str]:
        """That of the first direction."""
        return next((stage.cell for stage in self.stages if isinstance(stage, Direction)), super().cell)

    @property
    def degree(self) -> int | None:  # type: ignore[override]
        """The product of all stages'."""
        degrees = [stage.degree for stage in self.stages]
        return None if None in degrees else min(degree for degree in degrees if degree is not None)

    @property
    def looks_first(self) -> bool:  # type: ignore[override]
        """Whether the first stage does."""
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
        """That of the last direction that sets the length."""
        return self._last()[0].rms(shape)

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """That of the last direction that sets the length."""
        last, prefix = self._last()
        return last.steepness(g, substate(state, prefix))

    def _last(self) -> tuple[Direction, str]:
        """The last stage that sets the length, and the prefix of its state; the gradient itself where none does."""
        for i, stage in reversed([*enumerate(self.stages)]):
            if isinstance(stage, Direction) and stage.sets_length:
                return stage, f"{i}."
        return Identity(), "-"


@dataclass(frozen=True)
class Grafted(Direction):
    """The direction of one, the length of another: ``direction(x) ||magnitude(x)|| / ||direction(x)||`` (Frobenius).

    Args:
        direction: where to go; its length is dropped.
        magnitude: how far: the Frobenius norm of its result for each matrix.

    Source: Agarwal et al., "Disentangling adaptive gradient methods", arXiv 2002.11803.
    """

    direction: Stage
    magnitude: Stage

    def __post_init__(self) -> None:
        read(self, "direction", Stage)
        read(self, "magnitude", Stage)

    @property
    def reduces(self) -> str:  # type: ignore[override]
        """The common level of both and of the Frobenius norm."""
        return coarsest(("all", self.direction.reduces, self.magnitude.reduces))

    @property
    def needs_matrix(self) -> bool:  # type: ignore[override]
        """Whether either does."""
        return self.direction.needs_matrix or self.magnitude.needs_matrix

    @property
    def takes_vectors(self) -> bool:
        """Whether both do."""
        return self.direction.takes_vectors and self.magnitude.takes_vectors

    @property
    def cell(self) -> tuple[str, str]:
        """That of the direction."""
        return self.direction.cell if isinstance(self.direction, Direction) else super().cell

    @property
    def degree(self) -> int | None:  # type: ignore[override]
        """That of the magnitude."""
        return self.magnitude.degree

    @property
    def looks_first(self) -> bool:  # type: ignore[override]
        """Whether either does."""
        return any(part.looks_first for part in self._parts().values())

    @property
    def sets_length(self) -> bool:  # type: ignore[override]
        """Whether the magnitude is another than the input's."""
        return self.magnitude != Identity()

    def _parts(self) -> dict[str, Stage]:
        return {"direction.": self.direction, "magnitude.": self.magnitude}

    @property
    def averages(self) -> frozenset[str]:
        return frozenset(prefix + name for prefix, part in self._parts().items() for name in part.averages)

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        return {name + k: v for name, part in self._parts().items() for k, v in part.init_state(x).items()}

    def look(self, g: Tensor, state: dict[str, Tensor]) -> None:
        for name, part in self._parts().items():
            if part.looks_first:
                part.look(g, substate(state, name))

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        return self._graft(*(part(x, substate(state, name), context) for name, part in self._parts().items()))

    def apply(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        return self._graft(*(part.apply(x, substate(state, name), context) for name, part in self._parts().items()))

    def _graft(self, d: Tensor, length: Tensor) -> Tensor:
        return normalize(d, axes(d)).mul_(euclidean(length, axes(length), keepdim=True))

    def rms(self, shape: tuple[int, ...]) -> float:
        """That of the magnitude."""
        return self.magnitude.rms(shape) if isinstance(self.magnitude, Direction) else float("nan")

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The Euclidean norm times the magnitude's usual length."""
        size = self.rms(tuple(g.shape[-2:]))
        if size != size:
            return super().steepness(g, state)
        return Euclidean().dual_norm(g) * size


class _Elsewhere(Direction):
    """A direction at work on the matrices in another form; what can be said of the two is the same."""

    needs_matrix: ClassVar[bool] = True  # type: ignore[misc]
    direction: Direction

    @property
    def takes_vectors(self) -> bool:
        """That of the direction."""
        return self.direction.takes_vectors

    @property
    def cell(self) -> tuple[str, str]:
        """That of the direction."""
        return self.direction.cell

    @property
    def degree(self) -> int | None:  # type: ignore[override]
        """That of the direction."""
        return self.direction.degree

    @property
    def looks_first(self) -> bool:  # type: ignore[override]
        """That of the direction."""
        return self.direction.looks_first

    @property
    def sets_length(self) -> bool:  # type: ignore[override]
        """That of the direction."""
        return self.direction.sets_length

    def rms(self, shape: tuple[int, ...]) -> float:
        """That of the direction."""
        return self.direction.rms(shape)


@dataclass(frozen=True)
class Rotated(_Elsewhere):
    """A direction in rotated coordinates: ``L direction(L^T x R) R^T`` with orthonormal ``L`` and ``R`` of the basis.

    ``Rotated(Smoothed(Max()), Eigenbasis())`` is SOAP: Adam in the eigenbasis of Shampoo's statistics. The basis is
    learnt from the gradients; after it has changed, the direction's memory, which lives in the old coordinates, is
    kept as it is, its rows and columns in the order of the new basis.

    Args:
        direction: what happens in the rotated coordinates. Norms that are the same in every basis are refused.
        basis: which coordinates.
    """

    direction: Direction
    basis: Basis

    def __post_init__(self) -> None:
        read(self, "direction", Direction)
        read(self, "basis", Basis)
        if getattr(self.direction, "rotation_invariant", False):
            raise ValueError(f"Rotated: {self.direction} is the same in every basis; leave the rotation out")
        if self.direction.looks_first or _remembers_directions(self.direction):
            raise ValueError(f"Rotated: {self.direction} has a memory of directions, which would have to turn")

    @property
    def cell(self) -> tuple[str, str]:
        """The direction's row, rotated."""
        return self.direction.cell[0], ROTATED

    @property
    def looks_first(self) -> bool:  # type: ignore[override]
        """That of the basis."""
        return self.basis.looks_first

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
        basis.learn(context.g, state, context, [t for name, t in state.items() if name.startswith("rotated.")])
        return d

    def apply(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        basis = self.basis
        there = context.through(lambda t: basis.rotate(t, state))
        return basis.unrotate(self.direction.apply(self._seen(x, state), substate(state, "rotated."), there), state)

    def _seen(self, x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """``L^T x R`` without its rounding errors, which divided by those of the memory could be of any size."""
        turned = self.basis.rotate(x, state)
        if turned is x:
            return x
        noise = euclidean(x, axes(x), keepdim=True) * (4 * torch.finfo(x.dtype).eps)
        return torch.where(turned.abs() > noise, turned, 0.0)

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """That of the direction in the rotated coordinates."""
        return self.direction.steepness(self.basis.rotate(g, state), substate(state, "rotated."))


def _remembers_directions(stage: Stage) -> bool:
    """Whether a stage's memory has signs: averages of gradients, which turn with the basis; not those of squares."""
    if isinstance(stage, Chain):
        return any(map(_remembers_directions, stage.stages))
    if isinstance(stage, Grafted):
        return _remembers_directions(stage.direction) or _remembers_directions(stage.magnitude)
    return not isinstance(stage, Direction) or (isinstance(stage, Smoothed) and stage.centered is True)


@dataclass(frozen=True)
class Blocked(_Elsewhere):
    """A direction for each block of a large matrix: sides longer than ``size`` are cut into equal parts.

    Bounds the cost of directions that keep or decompose square matrices (Shampoo's block size). A matrix whose sides
    cannot be cut evenly is filled up with zeros.

    Args:
        direction: what happens in each block.
        size: the longest side of a block.
    """

    direction: Direction
    size: int = 1024

    def __post_init__(self) -> None:
        read(self, "direction", Direction)
        check_count(self, "size", self.size)

    def cut(self, x: Tensor) -> Tensor:
        """``x`` of shape ``(..., out, in)`` as blocks ``(..., blocks, out / rows, in / columns)``."""
        (rows, height), (columns, width) = (self._parts(n) for n in x.shape[-2:])
        x = torch.nn.functional.pad(x, (0, columns * width - x.shape[-1], 0, rows * height - x.shape[-2]))
        return x.reshape(*x.shape[:-2], rows, height, columns, width).transpose(-3, -2).flatten(-4, -3)

    def join(self, blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of ``cut``; ``shape`` ends in ``(out, in)``."""
        m, n = shape[-2:]
        rows, columns = self._parts(m)[0], self._parts(n)[0]
        whole = blocks.reshape(*blocks.shape[:-3], rows, columns, *blocks.shape[-2:]).transpose(-3, -2)
        return whole.flatten(-4, -3).flatten(-2, -1)[..., :m, :n]

    def _parts(self, n: int) -> tuple[int, int]:
        """How many parts a side of ``n`` is cut into, and how long each is."""
        parts = max(1, -(-n // self.size))
        return parts, -(-n // parts)

    @property
    def averages(self) -> frozenset[str]:
        return self.direction.averages

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        return self.direction.init_state(self.cut(x))

    def look(self, g: Tensor, state: dict[str, Tensor]) -> None:
        self.direction.look(self.cut(g), state)

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        return self.join(self.direction(self.cut(x), state, context.through(self.cut)), x.shape)

    def apply(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        return self.join(self.direction.apply(self.cut(x), state, context.through(self.cut)), x.shape)

    def rms(self, shape: tuple[int, ...]) -> float:
        """That of the direction for a block."""
        m, n = shape[-2:] if len(shape) > 1 else (1, *shape)
        return self.direction.rms((self._parts(m)[1], self._parts(n)[1]))

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The sum over all blocks."""
        return self.direction.steepness(self.cut(g), state).sum(dim=-1)
