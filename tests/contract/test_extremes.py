"""Gradients of any size, of rank one and of one entry, and none at all, for every optimizer in the registry.

What each of them should do is read off its ingredients: by which power of c its steps grow with gradients c times as
large, and whether it squares gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import normopt
from normopt import SteepestDescent
from normopt.constraints.decay import WeightDecay
from normopt.constraints.tangent import TangentProjection
from normopt.directions.algebra import Chain
from normopt.directions.coordinates import Blocked, Rotated
from normopt.directions.factored import Factored
from normopt.directions.pairs import Grafted
from normopt.directions.scaled import AdaScaled
from normopt.directions.smoothed import Smoothed
from normopt.directions.subspace import LeadingSubspace
from normopt.directions.whitening import KLWhitened
from normopt.engine import batch, plan
from normopt.ingredient import Stage
from normopt.rule import Rule, rule_of
from normopt.stepsize.fixed import Storm
from normopt.stepsize.trust import GradientTrust, TrustRatio
from tests.support.models import Net

NAMES = normopt.list_optimizers()
every = pytest.mark.parametrize("name", NAMES)
pytestmark = pytest.mark.slow

#: Sizes of Gaussian gradients: what float32 and bfloat16 hold, and float16's least number, its least normal one, 1 and
#: its largest. Those below are of size 1.
SIZES: dict[torch.dtype, tuple[float, ...]] = {
    torch.float32: (1e-30, 1e-15, 1.0, 1e15, 1e30),
    torch.bfloat16: (1e-30, 1e-15, 1.0, 1e15, 1e30),
    torch.float16: (2.0**-24, 2.0**-14, 1.0, 65504.0),
}
DEGENERATE = ("one entry", "rank one")
#: Steps from small weights are not lost in their rounding. But some are too short for half precision all the same.
SMALL = 2.0**-10
TOO_SHORT_FOR_HALF = {
    "lars": "1e-3 lr = 1e-6 times the size of a matrix",
    "prodigy": "d0 = 1e-6, less than half a unit in the last place of the largest weights",
    "dadaptadam": "likewise",
}


# What the ingredients say ----------------------------------------------------------------------------------------


def degree(stage: Stage, x: int | None = 1) -> int | None:
    """``k`` if the result grows by ``c^k`` where its input grows by ``c^x`` at all steps; ``None`` if there is none."""
    if isinstance(stage, AdaScaled):  # it sees the raw gradient, whatever comes before it
        return None
    if x in (0, None) and not isinstance(stage, Chain):
        return x
    match stage:
        case Chain(stages=stages):
            for each in stages:
                x = degree(each, x)
            return x
        case Grafted(direction=direction, magnitude=magnitude):
            return None if degree(direction, x) is None else degree(magnitude, x)
        case Rotated(direction=direction) | Blocked(direction=direction):
            return degree(direction, x)
        case LeadingSubspace(leading=leading, rest=rest):
            return degree(leading, x) if degree(leading, x) == degree(rest, x) else None
        case KLWhitened():  # its eigenvalues start from a number
            return None
        case Smoothed(eps=eps, initial=initial):
            return None if eps or (initial and initial != "first") else 0
        case Factored(eps=eps):
            return 0 if eps == 0 else None
    return None if stage.degree is None else stage.degree * x


def degree_of_steps(rule: Rule, is_small: bool = False) -> int | None:
    """The same of whole steps; ``is_small`` for vectors and scalars, which LARS leaves to SGD."""
    step_size = rule.step_size
    clipped = isinstance(step_size, TrustRatio) and step_size.max_grad_norm < math.inf
    if isinstance(step_size, Storm) or clipped:
        return None
    found = degree(rule.norm, 0 if isinstance(step_size, GradientTrust) and not is_small else 1)
    if found is None or (isinstance(step_size, TrustRatio) and step_size.always_adapt):
        return None if found is None else 0
    return found + (step_size.times == "dual norm")


def seen(stage: Stage, x: int | None = 1) -> Iterator[tuple[Stage, int | None]]:
    """All stages, with the degree of what they see."""
    yield stage, x
    match stage:
        case Chain(stages=stages):
            for each in stages:
                yield from seen(each, x)
                x = degree(each, x)
        case Grafted(direction=direction, magnitude=magnitude):
            yield from seen(direction, x)
            yield from seen(magnitude, x)
        case Rotated(direction=direction) | Blocked(direction=direction):
            yield from seen(direction, x)
        case LeadingSubspace(leading=leading, rest=rest):
            yield from seen(leading, x)
            yield from seen(rest, x)


def takes_squares(rule: Rule) -> bool:
    """Whether something squares gradients, so that neither c^2 nor c^-2 may be beyond what float32 holds."""
    projects = any(isinstance(bound, TangentProjection) for bound in rule.constraint)
    return projects or any(isinstance(stage, (Smoothed, Factored, KLWhitened, Rotated)) for stage, _ in seen(rule.norm))


def resolved(group: dict[str, Any]) -> Rule:
    return rule_of(group).at(group)


# Runs ------------------------------------------------------------------------------------------------------------


def gradient(kind: float | str, p: Tensor, seed: int) -> Tensor:
    noise = torch.Generator().manual_seed(seed)
    if kind == "one entry":
        g = torch.zeros(p.shape)
        g.view(-1)[-1] = -2.5
    elif kind == "rank one" and p.ndim > 1:
        left, right = (torch.randn(n, generator=noise) for n in (p.shape[0], p[0].numel()))
        g = torch.outer(left, right).view(p.shape)
    else:
        size = kind if isinstance(kind, float) else 1.0
        g = torch.randn(p.shape, generator=noise, dtype=torch.float64) * size
    largest = torch.finfo(p.dtype).max
    return g.clamp(-largest, largest).to(p.dtype)


def give(params: list[Tensor], kind: float | str, step: int) -> None:
    for i, p in enumerate(params):
        p.grad = gradient(kind, p, 100 * step + i)


def start(
    name: str, dtype: torch.dtype = torch.float32, size: float = SMALL, decay: float = 0.0
) -> tuple[list[Tensor], SteepestDescent]:
    """The parameters of a new model, ``size`` times as large as usual, and their optimizer."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    for p in model.parameters():
        p.detach().mul_(size)
    optimizer = normopt.create(name, model)
    for group in optimizer.param_groups:
        group |= {"weight_decay": decay} if "weight_decay" in group else {}
    return list(model.parameters()), optimizer


def owners(optimizer: SteepestDescent) -> Iterator[tuple[Tensor, str, Rule, dict[str, Any]]]:
    """Each parameter with its name, rule and group."""
    for group in optimizer.param_groups:
        rule = resolved(group)
        for p, name in zip(group["params"], group["param_names"], strict=True):
            yield p, name, rule, group


def copies(optimizer: SteepestDescent) -> list[Tensor]:
    return [p.detach().clone() for p, *_ in owners(optimizer)]


def not_finite(optimizer: SteepestDescent) -> list[str]:
    state = {(name, k): v for p, name, *_ in owners(optimizer) for k, v in optimizer.state[p].items()}
    state |= {("", k): v for group in optimizer.param_groups for k, v in group.items() if isinstance(v, Tensor)}
    return [f"{name} {k}" for (name, k), v in state.items() if not v.isfinite().all()]


# Direction and finite numbers --------------------------------------------------------------------------------------


def may_stand_still(name: str, p: Tensor, kind: float | str, rule: Rule) -> bool:
    """Why a step may be 0 where the gradient is not."""
    size = kind if isinstance(kind, float) else 1.0
    return (
        # eps outweighs the gradient, or the step is as short as the gradient
        (size < 1 and degree_of_steps(rule, p.ndim < 2) != 0)
        or (p.dtype != torch.float32 and name in TOO_SHORT_FOR_HALF)
    )


def assert_down(name: str, optimizer: SteepestDescent, weights: list[list[Tensor]], kind: float | str) -> None:
    """``<g, -dw> > 0`` for each parameter, in the first step that is more than a look."""
    for i, (p, where, rule, _) in enumerate(owners(optimizer)):
        old, new = (each[i].double() for each in weights[rule.norm.looks_first :][:2])
        g = p.grad.double()
        along = float((g / g.abs().max().clamp(min=1e-300) * (old - new)).sum())
        still = not g.any() or may_stand_still(name, p, kind, rule)
        assert along >= 0 if still else along > 0, (where, p.dtype, kind)


@every
def test_the_first_step_goes_down_and_all_numbers_stay_finite(name: str) -> None:
    for dtype, sizes in SIZES.items():
        for kind in (*sizes, *DEGENERATE):
            params, optimizer = start(name, dtype)
            weights = [copies(optimizer)]
            looks = any(rule.norm.looks_first for _, _, rule, _ in owners(optimizer))
            for _ in range(1 + looks):
                optimizer.step(partial(give, params, kind, 0))
                weights.append(copies(optimizer))
            assert_down(name, optimizer, weights, kind)
            optimizer.step(partial(give, params, kind, 1))
            assert all(p.isfinite().all() for p in params), (dtype, kind)
            assert not not_finite(optimizer), (dtype, kind)


# Zero ------------------------------------------------------------------------------------------------------------


@every
def test_without_a_gradient_to_follow_nothing_moves(name: str) -> None:
    for dtype in SIZES:
        params, optimizer = start(name, dtype)
        before = [p.detach().clone() for p in params]
        for i in range(2):
            optimizer.step(partial(give, params, 0.0, i))
        assert all(map(torch.equal, params, before)) and not not_finite(optimizer)


def shrink(rule: Rule, group: dict[str, Any], is_vector: bool) -> float | None:
    """What decay alone multiplies weights by in one step; ``None`` if decay is a part of the gradient."""
    rate = float(group["lr"] * group.get("d", 1.0))
    factor = 1.0 if group.get("weight_decay") is None else None
    for bound in rule.constraint:
        if isinstance(bound, WeightDecay):
            factor = 1 - rate * bound.weight_decay
        if isinstance(bound, TangentProjection):
            decay = rate * bound.weight_decay / (1 - bound.momentum)
            factor = 1 - decay * (1.0 if is_vector else bound.wd_ratio)
    return factor


@every
def test_without_a_gradient_to_follow_weights_decay(name: str) -> None:
    """By the decoupled decay's factor, or at least towards 0."""
    params, optimizer = start(name, size=1.0, decay=0.5)
    before = copies(optimizer)
    for i in range(3):
        optimizer.step(partial(give, params, 0.0, i))
    for (p, _, rule, group), w in zip(owners(optimizer), before, strict=True):
        factor = shrink(rule, group, p.ndim < 2)
        if factor is None:
            assert p.norm() <= w.norm() * (1 + 1e-6)
        else:
            torch.testing.assert_close(p.detach(), w * factor ** (3 - rule.norm.looks_first), rtol=1e-6, atol=0)


# Scale -----------------------------------------------------------------------------------------------------------


def way(name: str, power: int, exact: bool) -> list[tuple[str, int | None, Tensor]]:
    """How far three gradients times ``2^power`` take each parameter, and by which degree that should grow.

    ``exact``: with every eps at 0.
    """
    params, optimizer = start(name)
    for group in optimizer.param_groups if exact else ():
        if "eps" in group:
            eps = group["eps"]
            group["eps"] = (0.0, *eps[1:]) if isinstance(eps, tuple) else 0.0
    before = copies(optimizer)
    for i in range(3):
        give(params, 1.0, i)
        for p in params:
            p.grad *= 2.0**power
        optimizer.step(lambda: None)
    return [
        (where, degree_of_steps(rule, p.ndim < 2), p.detach().double() - old.double())
        for (p, where, rule, _), old in zip(owners(optimizer), before, strict=True)
    ]


def is_of_degree(k: int, powers: list[int], moved: list[Tensor]) -> bool:
    """Whether all ways are the first one, times c^k, but for the rounding of steps and of weights."""
    for power, each in zip(powers, moved, strict=True):
        expected = moved[0] * 2.0 ** (k * (power - powers[0]))
        rounding = 1e-5 * expected.abs().max() + 4 * SMALL * torch.finfo(torch.float32).eps
        if (each - expected).abs().max() > rounding:
            return False
    return True


@every
@pytest.mark.parametrize("exact", [False, True], ids=["eps", "no eps"])
def test_steps_scale_with_gradients_as_the_ingredients_say(name: str, exact: bool) -> None:
    """With powers of two, which round nothing. What has no degree has an eps, or numbers of its own, and breaks it."""
    far = not any(takes_squares(resolved(group)) for group in start(name)[1].param_groups)
    powers = [90, 0, -90] if far else [40, 0, -25]
    ways = [way(name, power, exact) for power in powers]
    for those in zip(*ways, strict=True):
        where, k, moved = those[0][0], those[0][1], [each[2] for each in those]
        assert moved[0].any(), where
        assert [j for j in (0, 1) if is_of_degree(j, powers, moved)] == ([] if k is None else [k]), where


# Rounding errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 1e3, 1e15])
def test_rounding_errors_are_no_directions(size: float) -> None:
    """A whole data set's gradient is the same before and after SOAP's look, and diagonal in the basis from it.

    Beside the diagonal are only rounding errors, those of the average and those of the memory; their quotients may be
    of any size.
    """
    params = [torch.nn.Parameter(torch.zeros(6, 8)) for _ in range(40)]
    optimizer = normopt.create("soap", params, lr=1.0, weight_decay=0.0)
    for _ in range(2):
        optimizer.step(partial(give, params, size, 0))
    assert all(p.abs().max() < 2 for p in params)


def test_factors_of_a_second_moment_may_have_an_infinite_product() -> None:
    """Each of Adafactor's is about the square of the gradient, their product over their mean too."""

    def moved(size: float) -> Tensor:
        p = torch.nn.Parameter(torch.ones(4, 3))
        optimizer = normopt.create("adafactor", [p])
        optimizer.step(partial(give, [p], size, 0))
        return 1 - p.detach()

    for power in (34, 50, 60):
        torch.testing.assert_close(moved(2.0**power), moved(1.0), rtol=1e-4, atol=0)


def test_adafactor_without_eps_stays_where_nothing_has_happened() -> None:
    p = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = normopt.create("adafactor", [p], eps=(0.0, 1e-3))
    optimizer.step(partial(give, [p], 0.0, 0))
    assert torch.equal(p, torch.ones(4, 3))


@pytest.mark.parametrize("name", ["adamp", "lamb", "soap", "novograd"])
@pytest.mark.parametrize("size", [1.0, 1e12, 1e17, 1e30])
def test_only_gradients_whose_squares_may_overflow_are_cut_off(
    name: str, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights() -> list[Tensor]:
        model = Net()
        model.load_state_dict(start.state_dict())
        optimizer, noise = normopt.create(name, model, lr=0.1), torch.Generator().manual_seed(0)
        for _ in range(3):
            for p in model.parameters():
                p.grad = size * torch.randn(p.shape, generator=noise)
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    start, cut, real = Net(), [], batch.clamped
    monkeypatch.setattr(batch, "clamped", lambda g: cut.append(g.shape) or real(g))
    expected = weights()
    cut.clear()
    monkeypatch.setattr(plan, "MAX_ENTRIES", 0)  # as for models too large to be gathered beforehand: norms are asked
    torch.testing.assert_close(weights(), expected, rtol=1e-4, atol=1e-6)
    assert bool(cut) == (size > 1e15)
