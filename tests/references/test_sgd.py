"""SGD beside torch's, and STORM+, which looks back."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normopt
from normopt import L2, Chain, Max, Option, Recursive, SteepestDescent, zoo
from normopt.nn import GPT
from tests.support.models import gpt
from tests.support.paths import SHAPES, Make, assert_same_path, case

TORCH = [
    case("SGD", lr=0.05),
    case("SGD", lr=0.05, momentum=0.9),
    case("SGD", lr=0.05, momentum=0.9, weight_decay=0.1, dampening=0.1),
    case("SGD", lr=0.05, momentum=1.0),
    case("SGD", lr=0.05, momentum=1.0, weight_decay=0.1, dampening=0.5),
    case("SGD", lr=0.05, momentum=1.0, dampening=1.0),
    case("SGD", lr=0.05, momentum=1.0, nesterov=True),
    case("SGD", lr=0.05, momentum=0.9, nesterov=True),
    case("SGD", lr=0.05, momentum=0.9, nesterov=True, maximize=True),
]


@pytest.mark.parametrize(("ours", "reference"), TORCH)
def test_torch_optim(ours: Make, reference: Make) -> None:
    assert_same_path(ours, reference, SHAPES, 2e-5)


# STORM+ ---------------------------------------------------------------------------------------------------------------


class Sampled:
    """0.5 |A (w - target)|^2 over two tensors, with a sample's noise in curvature and in gradient."""

    def __init__(self, noise: float, shapes: tuple[tuple[int, ...], ...] = ((4, 3), (5,)), seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.noise, self.draw = noise, draw
        self.params = [nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64)) for shape in shapes]
        self.targets = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
        self.curvatures = [0.5 + torch.rand(shape, generator=draw, dtype=torch.float64) for shape in shapes]
        self.calls = 0
        self.resample()

    def resample(self) -> None:
        def randn(p: Tensor) -> Tensor:
            return self.noise * torch.randn(p.shape, generator=self.draw, dtype=torch.float64)

        self.sample = [(1 + randn(p), randn(p)) for p in self.params]

    def gradients(self, weights: list[Tensor]) -> list[Tensor]:
        return [
            factor * curvature * (w.detach() - target) + shift
            for w, target, curvature, (factor, shift) in zip(
                weights, self.targets, self.curvatures, self.sample, strict=True
            )
        ]

    def full(self) -> list[Tensor]:
        return [c * (p.detach() - t) for p, t, c in zip(self.params, self.targets, self.curvatures, strict=True)]

    def loss(self) -> Tensor:
        terms = zip(self.params, self.targets, self.curvatures, self.sample, strict=True)
        return torch.stack([(0.5 * f * c * (p - t).square() + s * p).sum() for p, t, c, (f, s) in terms]).sum()

    def closure(self) -> Tensor:
        self.calls += 1
        for p in self.params:
            p.grad = None
        loss = self.loss()
        loss.backward()
        return loss

    def distance(self) -> float:
        pairs = zip(self.params, self.targets, strict=True)
        return math.sqrt(sum(float((p - t).detach().square().sum()) for p, t in pairs))


def test_storm_without_noise_follows_the_gradient() -> None:
    problem = Sampled(0.0)
    optimizer = zoo.STORMPlus(problem.params)
    for step in range(30):
        expected = problem.full()
        optimizer.step(problem.closure)
        assert problem.calls == 1 + 2 * step  # the first step evaluates once
        for p, g in zip(problem.params, expected, strict=True):
            torch.testing.assert_close(optimizer.state[p]["momentum"], g, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_storm_converges_without_tuning(scale: float) -> None:
    """From near and far, with the paper's numbers."""
    problem = Sampled(0.0)
    for p, target in zip(problem.params, problem.targets, strict=True):
        p.detach().sub_(target).mul_(scale).add_(target)
    optimizer, start = zoo.STORMPlus(problem.params), problem.distance()
    for _ in range(400):
        optimizer.step(problem.closure)
    assert problem.distance() < 0.05 * start


def test_storms_divisors_are_the_scale_of_the_gradients() -> None:
    """A problem whose gradients and distances are c times as large takes the same path with a0 = b0 = c^2."""
    small, large, c = Sampled(0.0), Sampled(0.0), 10.0
    for p in (*large.params, *large.targets):
        p.detach().mul_(c)
    first, second = zoo.STORMPlus(small.params), zoo.STORMPlus(large.params, a0=c**2, b0=c**2)
    for _ in range(20):
        first.step(small.closure)
        second.step(large.closure)
    for p, q in zip(small.params, large.params, strict=True):
        torch.testing.assert_close(c * p.detach(), q.detach())


@pytest.mark.parametrize("numbers", [{}, {"a0": 3.0, "b0": 0.2, "lr": 0.5}, {"weight_decay": 0.3}], ids=str)
def test_storm_is_its_recurrence(numbers: dict[str, float]) -> None:
    """With noise, the same sample at both points; written out by hand."""
    problem = Sampled(0.5, seed=2)
    optimizer = zoo.STORMPlus(problem.params, **numbers)
    lr, a0, b0 = (numbers.get(name, 1.0) for name in ("lr", "a0", "b0"))
    decay = numbers.get("weight_decay", 0.0)
    w = [p.detach().clone() for p in problem.params]
    before: list[Tensor] = []
    d: list[Tensor] = []
    squares = moved = 0.0
    for step in range(25):
        problem.resample()
        g = [x + decay * y for x, y in zip(problem.gradients(w), w, strict=True)]
        a = (1 + squares / a0) ** (-2 / 3)
        if step == 0:
            d = g
        else:
            past = [x + decay * y for x, y in zip(problem.gradients(before), before, strict=True)]
            d = [x + (1 - a) * (old - y) for x, y, old in zip(g, past, d, strict=True)]
        squares += sum(float(x.square().sum()) for x in g)
        moved += sum(float(x.square().sum()) for x in d) * (1 + squares / a0) ** (2 / 3)
        eta = lr * (moved / b0) ** (-1 / 3)
        before = w
        w = [x - eta * y for x, y in zip(w, d, strict=True)]
        optimizer.step(problem.closure)
        for p, expected in zip(problem.params, w, strict=True):
            torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)


def test_recursive_momentum_has_less_noise_than_the_gradient() -> None:
    """Its point: averaged over the last steps, it is much closer to the full gradient than a sample is."""
    problem = Sampled(0.3, ((30, 20),))
    optimizer = SteepestDescent(problem.params, lr=0.05, norm="identity", momentum=Recursive(0.9))
    errors = torch.zeros(2, dtype=torch.float64)
    for step in range(200):
        problem.resample()
        full, (sampled,) = problem.full()[0], problem.gradients(problem.params)
        optimizer.step(problem.closure)
        if step >= 100:
            d = optimizer.state[problem.params[0]]["momentum"]
            errors += torch.stack([(d - full).norm(), (sampled - full).norm()])
    assert errors[0] < 0.4 * errors[1]


def test_storm_resumes_to_the_bit() -> None:
    def run(steps: int, problem: Sampled, optimizer: SteepestDescent, first: int) -> None:
        for i in range(first, first + steps):
            problem.draw.manual_seed(i)
            problem.resample()
            optimizer.step(problem.closure)

    whole, half, rest = (Sampled(0.5) for _ in range(3))
    through, saving, loading = (zoo.STORMPlus(problem.params) for problem in (whole, half, rest))
    run(7, whole, through, 0)
    run(3, half, saving, 0)
    for p, q in zip(rest.params, half.params, strict=True):
        p.detach().copy_(q.detach())
    loading.load_state_dict(pickle.loads(pickle.dumps(saving.state_dict())))
    run(4, rest, loading, 3)
    for p, q in zip(whole.params, rest.params, strict=True):
        assert torch.equal(p, q)
        for name, value in through.state[p].items():
            assert torch.equal(value, loading.state[q][name]), name
    for name in ("gradient_squares", "average_squares"):
        assert torch.equal(through.param_groups[0][name], loading.param_groups[0][name])
    assert set(through.param_groups[0]) == set(zoo.STORMPlus(whole.params).param_groups[0])


def test_storm_needs_a_closure() -> None:
    problem = Sampled(0.0)
    optimizer = zoo.STORMPlus(problem.params)
    problem.closure()
    before = [p.detach().clone() for p in problem.params]
    with pytest.raises(ValueError, match=r"optimizer\.step\(closure\)"):
        optimizer.step()
    assert all(map(torch.equal, before, problem.params)) and not optimizer.state


@pytest.mark.parametrize("zeroing", ["none", "zero", "never"])
def test_storm_leaves_gradients_as_they_were(zeroing: str) -> None:
    """However the closure clears gradients: afterwards they are the tensors of its first call, unchanged."""
    problem = Sampled(0.5)
    optimizer, seen = zoo.STORMPlus(problem.params), []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        if zeroing != "never":
            optimizer.zero_grad(set_to_none=zeroing == "none")
        loss = problem.loss()
        loss.backward()
        seen.append(([p.grad for p in problem.params], [p.grad.clone() for p in problem.params]))
        return loss

    for step in range(3):
        problem.resample()
        for p in problem.params:
            p.grad = None if zeroing != "zero" else torch.zeros_like(p)
        expected = problem.loss().item()
        loss = optimizer.step(closure)
        assert loss.item() == expected  # that of the first call
        tensors, values = seen[0 if step == 0 else -2]
        assert all(p.grad is g for p, g in zip(problem.params, tensors, strict=True))
        assert all(torch.equal(p.grad, g) for p, g in zip(problem.params, values, strict=True))
    assert len(seen) == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_storm_changes_nothing_if_the_second_call_raises(dtype: torch.dtype) -> None:
    problem = Sampled(0.5)
    problem.params = [nn.Parameter(p.detach().to(dtype)) for p in problem.params]
    optimizer = zoo.STORMPlus(problem.params)
    for _ in range(2):
        optimizer.step(problem.closure)
    weights, state = [p.detach().clone() for p in problem.params], copy.deepcopy(optimizer.state_dict())
    calls = []

    def failing() -> Tensor:
        calls.append(problem.closure())
        if len(calls) == 2:
            assert not any(map(torch.equal, weights, problem.params))
            raise KeyboardInterrupt
        gradients[:] = [p.grad for p in problem.params]
        return calls[-1]

    gradients: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing)
    assert all(map(torch.equal, weights, problem.params))
    assert all(p.grad is g for p, g in zip(problem.params, gradients, strict=True))
    for i, old in state["state"].items():
        for name, value in old.items():
            assert torch.equal(value, optimizer.state_dict()["state"][i][name])


def test_recursive_makes_the_second_call_at_the_previous_weights() -> None:
    """Of the tensors whose momentum looks back; others stay where they are, and new ones begin anew."""
    problem = Sampled(0.0, ((3, 2), (4,), (2, 2)))
    a, b, c = problem.params
    optimizer = SteepestDescent(
        [{"params": [a]}, {"params": [b], "momentum": "EMA(0.9)"}], lr=0.1, norm="max", momentum=Recursive(0.5)
    )
    points: list[list[Tensor]] = []

    def closure() -> None:
        points.append([p.detach().clone() for p in problem.params])
        problem.closure()

    before = [p.detach().clone() for p in problem.params]
    optimizer.step(closure)
    after = [p.detach().clone() for p in problem.params]
    optimizer.add_param_group({"params": [c]})
    optimizer.step(closure)
    assert len(points) == 3
    assert torch.equal(points[2][0], before[0]) and not torch.equal(before[0], after[0])
    assert torch.equal(points[2][1], after[1]) and not torch.equal(before[1], after[1])
    assert torch.equal(points[2][2], before[2])
    assert optimizer.state[c]["step"] == 1 and torch.equal(optimizer.state[c]["previous"], before[2])


def test_storm_of_a_parameter_that_the_past_does_not_reach() -> None:
    """Its gradient there is 0."""
    w = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer, calls = SteepestDescent([w], lr=0.1, norm="identity", momentum=Recursive(0.5)), []

    def closure() -> None:
        calls.append(None)
        w.grad = None if len(calls) == 3 else torch.ones_like(w)

    optimizer.step(closure)
    optimizer.step(closure)
    torch.testing.assert_close(optimizer.state[w]["momentum"], torch.full_like(w, 1.5))


def test_storm_maximize_and_decay_reach_the_gradient_of_the_past() -> None:
    up, down = Sampled(0.5), Sampled(0.5)
    first = zoo.STORMPlus(up.params, weight_decay=0.2, maximize=True)
    second = zoo.STORMPlus(down.params, weight_decay=0.2)

    def negated() -> None:
        up.closure()
        for p in up.params:
            p.grad = -p.grad

    for _ in range(5):
        up.resample()
        down.resample()
        first.step(negated)
        second.step(down.closure)
        assert all(map(torch.equal, up.params, down.params))


def test_recursive_is_refused_where_it_makes_no_sense() -> None:
    params = [nn.Parameter(torch.zeros(2, 2))]
    for step_size in ("prodigy", "dadaptation", "trust-ratio", "gradient-trust"):
        with pytest.raises(ValueError, match="would weigh only one"):
            SteepestDescent(params, norm="max", momentum="recursive", step_size=step_size)
    with pytest.raises(ValueError, match="takes its decay rate from the step size Storm"):
        SteepestDescent(params, norm="max", momentum=Recursive(None))
    with pytest.raises(ValueError, match="only a rule's momentum can"):
        Chain(Max(), Recursive())
    with pytest.raises(ValueError, match="beta must lie in"):
        Recursive(1.5)
    with pytest.raises(ValueError, match="a0 must lie in"):
        zoo.STORMPlus(params, a0=0.0)
    assert Recursive(Option("a")).options() == {"a"} and L2(0.1).options() == frozenset()


def test_storm_stays_where_the_gradient_is_zero() -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = zoo.STORMPlus([w])

    def closure() -> None:
        w.grad = torch.zeros_like(w)

    for _ in range(3):
        optimizer.step(closure)
    assert torch.equal(w, torch.ones(3))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_storm_trains_a_model_and_its_copies_go_on(copied: Callable[[Any], Any]) -> None:
    model, tokens = gpt(), torch.arange(24).reshape(2, 12) % 13
    optimizer = normopt.create("stormplus", model)

    def closure(model: GPT = model, optimizer: SteepestDescent = optimizer) -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1
    twin, other = copied((model, optimizer))
    assert optimizer.step(closure).item() == other.step(lambda: closure(twin, other)).item()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
