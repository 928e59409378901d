"""Every norm, memory, momentum, step size and constraint together: they train, they resume, or they are refused."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normopt import (
    EMA,
    L2,
    AdaScaled,
    Blocked,
    Chain,
    Clipped,
    Conjugated,
    Constant,
    Constraint,
    CoshScaled,
    DAdaptation,
    Decayed,
    Direction,
    Dual,
    Eigenbasis,
    Euclidean,
    FrankWolfe,
    FrobeniusSphere,
    GradientTrust,
    Grafted,
    HeavyBall,
    Identity,
    InputWhitened,
    KahanSum,
    LeadingSubspace,
    Max,
    Momentum,
    NoiseScaled,
    Norm,
    Normalized,
    Nuclear,
    Rotated,
    Row,
    RowBound,
    RowFloor,
    Rule,
    Sharp,
    Smoothed,
    SoftSpectralCap,
    Spectral,
    Sphere,
    SteepestDescent,
    StepSize,
    Stiefel,
    StochasticRounding,
    Sum,
    Tangent,
)
from normopt.constraints.bounds import Transposed
from normopt.engine.plan import state_shapes
from normopt.ingredient import choices
from normopt.ingredient.stage import is_of_inputs
from normopt.report import MEMORIES
from normopt.stepsize.free import LearningRateFree

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
    Sum(Spectral(), Normalized(Spectral()), -0.2),
    Rotated(Grafted(Max(), Smoothed(Max()), relative=True), Eigenbasis()),
    Conjugated(Max(), Smoothed(Row())),
    *(d for cls in BUILT_IN if not issubclass(cls, (Norm, Decayed)) and (d := made(cls)) is not None),
]
MOMENTA: list[Momentum] = [cls() for cls in choices(Momentum).values() if cls.__module__.startswith("normopt.")]
#: LARS' default steps are a thousandth of the others', too small beside weight decay.
STEP_SIZES: list[StepSize] = [
    cls(1.0) if cls is GradientTrust else cls()
    for cls in choices(StepSize).values()
    if cls.__module__.startswith("normopt.")
]
CONSTRAINTS: list[Constraint | None] = [
    None,
    *(
        cls()
        for cls in choices(Constraint).values()
        if cls.__module__.startswith("normopt.") and cls not in (L2, Transposed)
    ),
    L2(0.1),
    Transposed(RowBound()),
]


def test_everything_of_the_registry_is_here() -> None:
    """A direction that is added to the library must be added to the list above, or be reached through it."""
    assert set(BUILT_IN) <= {type(part) for direction in DIRECTIONS for part in parts(direction)}
    assert len(NORMS) >= 6 and len(MOMENTA) >= 6 and len(STEP_SIZES) >= 7 and len(CONSTRAINTS) >= 4


PARTS = ("norm", "direction", "magnitude", "first", "second", "memory")


def parts(direction: Any) -> list[Any]:
    inner = [getattr(direction, name, None) for name in PARTS]
    inner += getattr(direction, "stages", ())
    return [direction, *(part for d in inner if d is not None for part in parts(d))]


class Run:
    """A matrix for each rule, all in one optimizer, and 0.5 ||w - target||^2 of each."""

    def __init__(self, rules: list[Rule]) -> None:
        noise = torch.Generator().manual_seed(0)
        shapes = [SHAPES[i % len(SHAPES)] for i in range(len(rules))]
        start, self.targets = (
            [torch.randn(shape, generator=noise, dtype=torch.float64) for shape in shapes] for _ in range(2)
        )
        self.weights = [nn.Parameter(0.1 * w) for w in start]
        groups = [group_of(w, rule) for w, rule in zip(self.weights, rules, strict=True)]
        self.optimizer = SteepestDescent(groups, lr=1e-3)
        for w, rule in zip(self.weights, rules, strict=True):
            for name, shape in state_shapes(w, rule).items() if rule.reads_inputs else ():
                if is_of_inputs(name):  # as InputStatistics puts them there
                    spectrum = torch.diag(torch.arange(1.0, shape[-1] + 1, dtype=torch.float64))
                    self.optimizer.state[w] = {"step": torch.tensor(0.0), name: spectrum.expand(shape).clone()}

    def losses(self) -> list[float]:
        return [0.5 * (w - t).square().sum().item() for w, t in zip(self.weights, self.targets, strict=True)]

    def losses_of_pull(self, steps: int) -> list[float]:
        """Of weights that constraints have pulled to 0 and no update has moved: tiny updates do no more than this."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        shrunk = [w.detach() * (1 - lr) ** steps for w, lr in zip(self.weights, rates, strict=True)]
        return [0.5 * (w - t).square().sum().item() for w, t in zip(shrunk, self.targets, strict=True)]

    def steps(self, count: int) -> list[list[float]]:
        losses = []
        for _ in range(count):
            self.optimizer.step(self.gradients)
            losses.append(self.losses())
        return losses

    def gradients(self) -> None:
        """As a closure, for momenta that look back."""
        for w, target in zip(self.weights, self.targets, strict=True):
            w.grad = w.detach() - target

    def copy_to(self, other: Run) -> None:
        """As through a file."""
        with torch.no_grad():
            for mine, theirs in zip(self.weights, other.weights, strict=True):
                theirs.copy_(mine)
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))


RATES = {LearningRateFree: 1.0, Dual: 1e-5, Sharp: 1e-4}
SHAPES = [(6, 4), (4, 6), (5, 5)]


def group_of(w: Tensor, rule: Rule) -> dict[str, Any]:
    """Its own learning rate: steps by a dual norm, or by the sum of all of them, are longer."""
    rate = next((rate for kind, rate in RATES.items() if isinstance(rule.step_size, kind)), 1e-3)
    ingredients = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    return {"params": [w], "lr": rate, **ingredients}


def check(rules: list[Rule], descend: bool = True) -> None:
    """Five steps that descend (unless they stay on a sphere), and the last three of them again from a checkpoint."""
    run, resumed = Run(rules), Run(rules)
    before, pulled = run.losses(), run.losses_of_pull(5)
    run.steps(2)
    run.copy_to(resumed)
    rest, again = run.steps(3), resumed.steps(3)
    for i, rule in enumerate(rules):
        path = [before[i], *(losses[i] for losses in rest)]
        shrinks = any(constraint.overrides("shrink") for constraint in rule.constraint)
        falls = path[-1] < (max(before[i], pulled[i]) if shrinks else before[i]) or may_rise(rule)
        assert all(map(math.isfinite, path)) and (falls or not descend), f"{rule}: {path}"
        assert [losses[i] for losses in again] == path[1:], f"{rule} does not resume"
        assert torch.equal(run.weights[i], resumed.weights[i]), f"{rule} does not resume"


def may_rise(rule: Rule) -> bool:
    """Whether small steps need not go down: a part of them alone is left, or they are tangents off their manifold.

    The part of a gradient along the Stiefel manifold is a direction of descent at points of the manifold alone.
    """
    keeps_length = any(isinstance(constraint, (Sphere, FrobeniusSphere, Stiefel)) for constraint in rule.constraint)
    return keeps_length or isinstance(rule.norm, Tangent)


def sensible(direction: Direction, momentum: Momentum, step_size: StepSize, constraint: Constraint | None) -> bool:
    """Whether a combination makes sense; those that do not are refused at construction."""
    if constraint is not None and constraint.needs_bounded_step and step_size.times:
        with pytest.raises(ValueError, match="needs steps of bounded length"):
            Rule(direction, momentum, step_size, (constraint,))
        return False
    if isinstance(constraint, SoftSpectralCap) and not (direction == Spectral() and step_size == Constant()):
        with pytest.raises(ValueError, match="how large updates can be"):
            Rule(direction, momentum, step_size, (constraint,))
        return False
    if momentum.looks_back and step_size.overrides("weigh"):
        with pytest.raises(ValueError, match="would weigh only one"):
            Rule(direction, momentum, step_size)
        return False
    if isinstance(step_size, LearningRateFree) and not bounded(direction):
        with pytest.raises(ValueError, match="bounds its result in no norm"):
            Run([Rule(direction, momentum, step_size)])
        return False
    if isinstance(step_size, DAdaptation) and direction.degree is None:
        with pytest.raises(ValueError, match="neither linear nor independent of length"):
            Run([Rule(direction, momentum, step_size)])
        return False
    return True


def bounded(direction: Direction) -> bool:
    """Whether the result has at most norm 1 in some norm: not if it is as long as the gradient."""
    return not isinstance(
        direction, (AdaScaled, CoshScaled, Identity, InputWhitened, LeadingSubspace, NoiseScaled, Tangent)
    )


def check_sensible(combinations: Iterable[tuple[Direction, Momentum, StepSize, Constraint | None]]) -> None:
    check([Rule(d, m, s, (c,) if c else ()) for d, m, s, c in combinations if sensible(d, m, s, c)])


@pytest.mark.parametrize("direction", DIRECTIONS, ids=str)
def test_every_direction_with_every_step_size(direction: Direction) -> None:
    """Momenta and constraints take turns."""
    start = DIRECTIONS.index(direction)
    turns = itertools.islice(itertools.cycle(itertools.product(CONSTRAINTS, MOMENTA)), start, None)
    check_sensible((direction, m, s, c) for s, (c, m) in zip(STEP_SIZES, turns, strict=False))


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS, ids=str)
def test_every_combination(direction: Direction) -> None:
    """What acts on the weights alone, after the step, needs no more than one momentum."""
    bounds = [c for c in CONSTRAINTS if c is not None and c.overrides("weight")]
    others = [c for c in CONSTRAINTS if c not in bounds]
    check_sensible(itertools.product([direction], MOMENTA, STEP_SIZES, others))
    check_sensible(itertools.product([direction], MOMENTA[:1], STEP_SIZES, bounds))


PAIRS = [pair for pair in itertools.permutations([c for c in CONSTRAINTS if c is not None], 2)]


@pytest.mark.parametrize("direction", [Spectral(), Smoothed(Max())], ids=str)
def test_every_pair_of_constraints(direction: Direction) -> None:
    """In either order. A step that both bound or pull need not go down: it is finite, and resumes."""
    rules = []
    for pair in PAIRS:
        refused = [c for c in pair if not sensible(direction, MOMENTA[0], Constant(), c)]
        if not refused and fit(direction, pair):
            rules.append(Rule(direction, EMA(0.9), Constant(), pair))
    assert len(rules) > len(PAIRS) / 2
    check(rules, descend=False)


def fit(direction: Direction, pair: tuple[Constraint, ...]) -> bool:
    """Whether two constraints make sense together; those that do not are refused at construction."""
    wants, lengthens = (any(getattr(c, name) for c in pair) for name in ("needs_bounded_step", "lengthens"))
    if wants and lengthens:
        with pytest.raises(ValueError, match=r"can make them longer: leave one out"):
            Rule(direction, constraint=pair)
        return False
    if all(isinstance(c, (KahanSum, StochasticRounding)) for c in pair):
        with pytest.raises(ValueError, match="both round the weights: leave one of them out"):
            Rule(direction, constraint=pair)
        return False
    return True


REFUSED: dict[str, tuple[Any, str]] = {
    "no second moment": (lambda: Smoothed(Nuclear()), "no second moment"),
    "the same in every basis": (lambda: Rotated(Smoothed(Spectral()), Eigenbasis()), "the same in every basis"),
    "a memory of directions": (lambda: Rotated(Chain(Max(), EMA(0.9)), Eigenbasis()), "memory"),
    "no largest matrix": (lambda: Smoothed(Spectral(), maximum=True), "none is the largest"),
    "two maxima": (lambda: Smoothed(Max(), accumulate="max", maximum=True), "accumulate='max'"),
    "no norm to measure by": (lambda: refused(Clipped(Max()), "prodigy"), "bounds its result in no norm"),
    "as long as the gradient": (lambda: refused(Identity(), "prodigy"), "bounds its result in no norm"),
    "no norm, in a graft": (lambda: refused(Grafted(Max(), Identity()), "dadaptation"), "bounds its result in no norm"),
    "sliced rows": (lambda: refused(Row(), "Prodigy(slice_p=2)"), "slice_p"),
    "unbounded steps in a ball": (lambda: refused(Max(), "sharp", "frank-wolfe"), "bounded length"),
    "a floor in a ball": (lambda: refused(Spectral(), "constant", (FrankWolfe(), RowFloor())), "can make them longer"),
    "a floor under a cap": (
        lambda: refused(Spectral(), "constant", (RowFloor(), SoftSpectralCap())),
        "make them longer",
    ),
    "vectors in a matrix norm": (lambda: refused(Row(), "constant", shape=(3,)), "norm of matrices"),
}


def refused(norm: Direction, step_size: str, constraint: Any = None, shape: tuple[int, ...] = (3, 4)) -> None:
    SteepestDescent([nn.Parameter(torch.zeros(shape))], norm=norm, step_size=step_size, constraint=constraint)


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_refused_at_construction(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
