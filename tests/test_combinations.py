"""Every norm, memory, momentum, step size and constraint together: they train, they resume, or they are refused."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normopt import (
    EMA,
    Blocked,
    Chain,
    Clipped,
    Constraint,
    DAdaptation,
    Decayed,
    Direction,
    Eigenbasis,
    Euclidean,
    FrankWolfe,
    Grafted,
    HeavyBall,
    Identity,
    Max,
    Momentum,
    Norm,
    Nuclear,
    Rotated,
    Row,
    Rule,
    Smoothed,
    Spectral,
    SteepestDescent,
    StepSize,
)
from normopt.ingredient import choices
from normopt.report import MEMORIES
from normopt.stepsize import LearningRateFree

NORMS = [cls() for cls in choices(Norm).values() if cls.__module__.startswith("normopt.")]


BUILT_IN = [cls for cls in choices(Direction).values() if cls.__module__.startswith("normopt.")]


def made(make: Any, *arguments: Any) -> Direction | None:
    """What ``make`` makes: nothing where norm and memory do not go together, or an argument is missing."""
    try:
        return make(*arguments)  # type: ignore[no-any-return]
    except (ValueError, TypeError):
        return None


#: Every cell of the periodic table, every norm grafted, in a chain and in blocks, and what is no norm.
DIRECTIONS: list[Direction] = [
    *(d for norm in NORMS for make in MEMORIES.values() if (d := made(make, norm)) is not None),
    *(Grafted(norm, Smoothed(Max())) for norm in NORMS),
    Grafted(Smoothed(Spectral(), frequency=2), Smoothed(Max())),
    Chain(Row(), Spectral(), Smoothed(Max())),
    Chain(Smoothed(Max(), accumulate="max"), Decayed(0.1), HeavyBall(0.5)),
    Chain(Rotated(Smoothed(Max()), Eigenbasis(frequency=2)), Clipped(Euclidean())),
    Blocked(Smoothed(Spectral(), accumulate="sum"), 3),
    Rotated(Max(), Eigenbasis()),
    *(d for cls in BUILT_IN if not issubclass(cls, (Norm, Decayed)) and (d := made(cls)) is not None),
]
MOMENTA: list[Momentum] = [cls() for cls in choices(Momentum).values() if cls.__module__.startswith("normopt.")]
STEP_SIZES: list[StepSize] = [cls() for cls in choices(StepSize).values() if cls.__module__.startswith("normopt.")]
CONSTRAINTS: list[Constraint | None] = [
    None,
    *(cls() for cls in choices(Constraint).values() if cls.__module__.startswith("normopt.")),
]


def test_everything_of_the_registry_is_here() -> None:
    """A direction that is added to the library must be added to the list above, or be reached through it."""
    assert set(BUILT_IN) <= {type(part) for direction in DIRECTIONS for part in parts(direction)}
    assert len(NORMS) >= 6 and len(MOMENTA) >= 6 and len(STEP_SIZES) >= 7 and len(CONSTRAINTS) >= 4


def parts(direction: Any) -> list[Any]:
    inner = [getattr(direction, name, None) for name in ("norm", "direction", "magnitude")]
    inner += getattr(direction, "stages", ())
    return [direction, *(part for d in inner if d is not None for part in parts(d))]


class Quadratic(nn.Module):
    """0.5 sum ||w - target||^2 over matrices, tall, wide and square."""

    def __init__(self) -> None:
        super().__init__()
        noise = torch.Generator().manual_seed(0)
        shapes = [(6, 4), (4, 6), (5, 5), (6, 4)]
        start = [0.1 * torch.randn(shape, generator=noise, dtype=torch.float64) for shape in shapes]
        self.weights = nn.ParameterList(map(nn.Parameter, start))
        self.targets = [torch.randn(shape, generator=noise, dtype=torch.float64) for shape in shapes]

    def forward(self) -> Tensor:
        return torch.stack(
            [0.5 * (w - target).square().sum() for w, target in zip(self.weights, self.targets, strict=True)]
        ).sum()


def optimizer_of(model: nn.Module, rule: Rule) -> SteepestDescent:
    free = isinstance(rule.step_size, LearningRateFree)
    return SteepestDescent(
        model.parameters(), 1.0 if free else 1e-3, rule.norm, rule.momentum, rule.step_size, rule.constraint
    )


def steps(model: Quadratic, optimizer: SteepestDescent, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        optimizer.step()
        losses.append(model().item())
    return losses


def check(rule: Rule) -> None:
    """Five steps that descend, and the same again from a checkpoint after two of them."""
    model = Quadratic()
    before = model().item()
    optimizer = optimizer_of(model, rule)
    first = steps(model, optimizer, 2)
    resumed = Quadratic()
    resumed.load_state_dict(model.state_dict())
    other = optimizer_of(resumed, rule)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as from a file
    rest = steps(model, optimizer, 3)
    assert all(map(torch.isfinite, map(torch.tensor, first + rest))), rule
    assert rest[-1] < before, f"{rule}: {before} -> {first + rest}"
    assert steps(resumed, other, 3) == rest, f"{rule} does not resume"
    for a, b in zip(model.weights, resumed.weights, strict=True):
        assert torch.equal(a, b), f"{rule} does not resume"


def combine(direction: Direction, momentum: Momentum, step_size: StepSize, constraint: Constraint | None) -> None:
    """Check a combination, or that one which makes no sense is refused at construction."""
    if isinstance(constraint, FrankWolfe) and step_size.times:
        with pytest.raises(ValueError, match="needs steps of bounded length"):
            Rule(direction, momentum, step_size, (constraint,))
        return
    if isinstance(step_size, DAdaptation) and direction.degree is None:
        with pytest.raises(ValueError, match="neither linear nor independent of length"):
            optimizer_of(Quadratic(), Rule(direction, momentum, step_size))
        return
    check(Rule(direction, momentum, step_size, (constraint,) if constraint else ()))


@pytest.mark.parametrize("direction", DIRECTIONS, ids=str)
def test_every_direction_with_every_step_size(direction: Direction) -> None:
    """Momenta and constraints take turns."""
    turns = itertools.cycle(itertools.product(CONSTRAINTS, MOMENTA))
    for _ in range(DIRECTIONS.index(direction)):
        next(turns)
    for step_size, (constraint, momentum) in zip(STEP_SIZES, turns, strict=False):
        combine(direction, momentum, step_size, constraint)


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS, ids=str)
def test_every_combination(direction: Direction) -> None:
    for momentum, step_size, constraint in itertools.product(MOMENTA, STEP_SIZES, CONSTRAINTS):
        combine(direction, momentum, step_size, constraint)


REFUSED: dict[str, tuple[Any, str]] = {
    "no second moment": (lambda: Smoothed(Nuclear()), "no second moment"),
    "the same in every basis": (lambda: Rotated(Smoothed(Spectral()), Eigenbasis()), "the same in every basis"),
    "a memory of directions": (lambda: Rotated(Chain(Max(), EMA(0.9)), Eigenbasis()), "memory"),
    "no largest matrix": (lambda: Smoothed(Spectral(), maximum=True), "none is the largest"),
    "two maxima": (lambda: Smoothed(Max(), accumulate="max", maximum=True), "accumulate='max'"),
    "no norm to measure by": (lambda: refused(Clipped(Max()), "prodigy"), "bounds its result in no norm"),
    "no norm, in a graft": (lambda: refused(Grafted(Max(), Identity()), "dadaptation"), "bounds its result in no norm"),
    "sliced rows": (lambda: refused(Row(), "Prodigy(slice_p=2)"), "slice_p"),
    "unbounded steps in a ball": (lambda: refused(Max(), "sharp", "frank-wolfe"), "bounded length"),
    "vectors in a matrix norm": (lambda: SteepestDescent([nn.Parameter(torch.zeros(3))], norm="row"), "norm of matrices"),
}


def refused(norm: Direction, step_size: str, constraint: str | None = None) -> None:
    SteepestDescent([nn.Parameter(torch.zeros(3, 4))], norm=norm, step_size=step_size, constraint=constraint)


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_refused_at_construction(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
