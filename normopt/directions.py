"""Which direction is steepest? The algebra over norms: memory, composition and borrowed lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from normopt.ingredient import Context, Stage, check_choice, check_range, coarsest, substate
from normopt.norms.base import Direction, Norm, axes, euclidean, normalize

ACCUMULATE = ("ema", "sum")


@dataclass(frozen=True)
class Smoothed(Direction):
    """A norm with memory: ``norm.whiten`` with the second moments of all gradients so far instead of this one's.

    ``s <- beta s + (1 - beta) second_moment(g)``, then ``whiten(x, s / (1 - beta^step), eps)``. ``Smoothed(Max())`` is
    Adam's denominator, ``Smoothed(Spectral())`` Shampoo's, ``Smoothed(Euclidean())`` NovoGrad's. With ``beta=0`` and
    ``eps=0`` it is the norm's duality map.

    Args:
        norm: the norm; it needs a second moment.
        beta: weight of the past, in [0, 1); not used by ``accumulate="sum"``.
        eps: added, after the bias correction, to the root of the second moment; under the spectral norm to the second
            moment itself, as in Shampoo. It follows the scale that a step size gives to gradients (Prodigy).
        bias_correction: divide by ``1 - beta^step``.
        accumulate: ``"ema"``, or ``"sum"`` over all steps (Adagrad, the Shampoo of arXiv 1802.09568).
        initial: what every entry of the second moment starts from.
        maximum: divide by the largest second moment so far, before the bias correction (AMSGrad as in torch.optim).

    Raises:
        ValueError: the norm has no second moment, or a number is out of range.
    """

    norm: Norm
    beta: float = 0.999
    eps: float = 1e-8
    bias_correction: bool = True
    accumulate: str = "ema"
    initial: float = 0.0
    maximum: bool = False

    def __post_init__(self) -> None:
        check_range(self, "beta", self.beta, 0, 1)
        check_range(self, "eps", self.eps, 0, float("inf"))
        check_range(self, "initial", self.initial, 0, float("inf"))
        check_choice(self, "accumulate", self.accumulate, ACCUMULATE)
        if not self.norm.has_memory:
            raise ValueError(f"Smoothed: {self.norm} has no second moment to remember")
        if self.maximum is True and self.norm.reduces == "matrix":
            raise ValueError(f"Smoothed: the second moments of {self.norm} are matrices, of which none is the largest")
        if self.initial and self.norm.reduces == "matrix":
            raise ValueError(f"Smoothed: the second moments of {self.norm} are matrices; they start from 0")

    @property
    def reduces(self) -> str:  # type: ignore[override]
        """That of the norm."""
        return self.norm.reduces

    @property
    def needs_matrix(self) -> bool:  # type: ignore[override]
        """That of the norm."""
        return self.norm.needs_matrix

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        stats = self.norm.second_moment(x)
        state = {f"second_moment{i or ''}": torch.full_like(s, self.initial) for i, s in enumerate(stats)}
        if self.maximum:
            state |= {f"max_{name}": tensor.clone() for name, tensor in state.items()}
        return state

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        averaged = self.accumulate == "ema"
        keep, add = (self.beta, 1 - self.beta) if averaged else (1.0, 1.0)
        stats = {name: tensor for name, tensor in state.items() if name.startswith("second_moment")}
        self.norm.remember_(tuple(stats.values()), context.g, keep, add)
        if self.maximum:
            stats = {name: state[f"max_{name}"].copy_(s.maximum(state[f"max_{name}"])) for name, s in stats.items()}
        # whiten(x, s / c, eps) = sqrt(c) whiten(x, s, sqrt(c)^degree eps): the correction costs nothing.
        root = (1 - self.beta**context.step) ** 0.5 if averaged and self.bias_correction else 1.0
        eps = self.eps * (root * context.scale) ** self.norm.eps_degree
        return self.norm.whiten(x, tuple(stats.values()), eps).mul_(root)

    def rms(self, shape: tuple[int, ...]) -> float:
        """That of the norm: the size of a step whose gradient is as large as those before it."""
        return self.norm.rms(shape)

    def dual_norm(self, g: Tensor) -> Tensor:
        """That of the norm."""
        return self.norm.dual_norm(g)


@dataclass(frozen=True)
class Identity(Direction):
    """The gradient itself: the Euclidean norm's duality map at its dual norm's length, ``||g|| g / ||g||`` (SGD)."""

    reduces: ClassVar[str] = "entry"  # type: ignore[misc]

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        return x

    def dual_norm(self, g: Tensor) -> Tensor:
        """The Euclidean norm."""
        return euclidean(g, axes(g))


@dataclass(frozen=True, init=False, repr=False)
class Chain(Direction):
    """Stages one after the other: ``Chain(Row(), Spectral())`` normalizes rows, then takes the polar factor.

    The first stage sees the gradient beside the momentum; for each later stage both are what the stage before returned.
    A :class:`~normopt.momentum.Momentum` is a stage too: ``Chain(Euclidean(), EMA(0.9))`` averages unit gradients.
    """

    stages: tuple[Stage, ...]

    def __init__(self, *stages: Stage) -> None:
        if not stages or not all(isinstance(stage, Stage) for stage in stages):
            raise ValueError(f"Chain: needs one or more norms, directions or momenta, got {stages!r}")
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

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        return {f"{i}.{k}": v for i, stage in enumerate(self.stages) for k, v in stage.init_state(x).items()}

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        for i, stage in enumerate(self.stages):
            x = stage(x, substate(state, f"{i}."), context)
            context = context.seeing(x)
        return x

    def rms(self, shape: tuple[int, ...]) -> float:
        """That of the last direction."""
        directions = [stage for stage in self.stages if isinstance(stage, Direction)]
        return directions[-1].rms(shape) if directions else float("nan")


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

    @property
    def reduces(self) -> str:  # type: ignore[override]
        """The common level of both and of the Frobenius norm."""
        return coarsest(("all", self.direction.reduces, self.magnitude.reduces))

    @property
    def needs_matrix(self) -> bool:  # type: ignore[override]
        """Whether either does."""
        return self.direction.needs_matrix or self.magnitude.needs_matrix

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {f"{name}.{k}": v for name, part in parts.items() for k, v in part.init_state(x).items()}

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        d = self.direction(x, substate(state, "direction."), context)
        length = self.magnitude(x, substate(state, "magnitude."), context)
        return normalize(d, axes(d)).mul_(euclidean(length, axes(length), keepdim=True))

    def rms(self, shape: tuple[int, ...]) -> float:
        """That of the magnitude."""
        return self.magnitude.rms(shape) if isinstance(self.magnitude, Direction) else float("nan")
