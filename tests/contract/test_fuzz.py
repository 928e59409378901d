"""Random lives of random optimizers: bad input changes nothing, and a checkpoint is the whole of them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import normopt
from normopt import SteepestDescent
from normopt.numerics import host
from tests.support.optimizers import BARE, JOINT, ZOO
from tests.support.steps import assert_equal, snapshot

#: Matrices that come to a model without their module get a role by their shape, and a warning.
pytestmark = pytest.mark.filterwarnings("ignore:add_param_group")

WHOLE = {**ZOO, "stormplus": partial(normopt.create, "stormplus")}
MATRICES = {name: partial(SteepestDescent, **options) for name, options in {**BARE, **JOINT}.items()}
GROUPS: list[dict[str, Any]] = [{}, {"lr": 0.02}, {"norm": "max"}, {"nonfinite": "skip"}, {"maximize": True}]
BAD_GROUPS: list[dict[str, Any]] = [{"lr": -1.0}, {"lr": float("inf")}, {"norm": "maxx"}, {"nrom": "max"}]
BAD_GROUPS += [{"nonfinite": "sometimes"}, {"momentum": -0.5}, {"constraint": "L2(-1.0)"}, {"view": "View(split=0)"}]
SPOILED: list[dict[str, Any]] = [{"state_version": 99}, {"lr": -1.0}, {"rule": "Rule(norm=Nuclear(2.5))"}]
SPOILED += [{"nonfinite": "sometimes"}, {"rule": "Rule("}, {"params": []}]
SEEDS = st.integers(0, 50)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.up = nn.Linear(3, 5)
        self.head = nn.Linear(5, 4)
        self.added = nn.ParameterList()


class Life:
    """A model and its optimizer, and how they came to be."""

    def __init__(self, name: str, groups: list[dict[str, Any]], weights: dict[str, Tensor] | None = None) -> None:
        torch.manual_seed(0)
        self.name, self.groups, self.model = name, [], Tiny()
        matrices = [(n, p) for n, p in self.model.named_parameters() if p.ndim == 2]
        self.optimizer = WHOLE[name](self.model, lr=0.01) if name in WHOLE else MATRICES[name](matrices, lr=0.01)
        for options in groups:
            self.add(options)
        if weights is not None:
            self.model.load_state_dict(weights)

    def add(self, options: dict[str, Any]) -> None:
        self.model.added.append(nn.Parameter(torch.full((2, 3), 0.5 + len(self.groups))))
        parameter = self.model.added[-1]
        named = "param_names" in self.optimizer.param_groups[0]
        params = [(f"added.{len(self.groups)}", parameter)] if named else [parameter]
        self.optimizer.add_param_group({"params": params, **options})
        self.groups.append(options)

    def reloaded(self) -> Life:
        """In another process: written, read, and loaded into a fresh optimizer."""
        file = io.BytesIO()
        torch.save([self.model.state_dict(), self.optimizer.state_dict()], file)
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        fresh = Life(self.name, self.groups, weights)
        fresh.optimizer.load_state_dict(state)
        return fresh

    @property
    def params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def give(self, seed: int, size: float, missing: set[int]) -> None:
        noise = torch.Generator().manual_seed(seed)
        for i, p in enumerate(self.params):
            g = size * torch.randn(p.shape, generator=noise)
            p.grad = None if i in missing else g

    def step(self, seed: int, size: float = 1.0, missing: set[int] = frozenset(), spoil: Any = None) -> None:  # type: ignore[assignment]
        def closure() -> None:
            self.give(seed, size, missing)
            if spoil is not None:
                spoil(self.params)

        self.optimizer.step(closure)


def _spoil_value(value: float, culprit: int) -> Callable[[list[Tensor]], None]:
    def spoil(params: list[Tensor]) -> None:
        params[culprit % len(params)].grad.view(-1)[0] = value

    return spoil


def _spoil_kind(kind: str, culprit: int) -> Callable[[list[Tensor]], None]:
    def spoil(params: list[Tensor]) -> None:
        p = params[culprit % len(params)]
        g, p.grad, p.grad_dtype = p.grad, None, None
        if kind == "shape":
            p.grad = g
            p.grad.data = torch.zeros(7)
        else:
            p.grad = {"sparse": g.to_sparse(), "complex": g.to(torch.complex64), "integers": g.long()}[kind]

    return spoil


class Lives(RuleBasedStateMachine):
    """Two runs of one optimizer, of which only the second is ever saved and loaded."""

    @initialize(name=st.sampled_from(sorted({**WHOLE, **MATRICES})))
    def construct(self, name: str) -> None:
        self.lives = [Life(name, []), Life(name, [])]

    def teardown(self) -> None:
        host.DEFERRED = False

    def refused(self, act: Callable[[Life], Any]) -> None:
        for life in self.lives:
            before = snapshot(life.optimizer)
            with pytest.raises((ValueError, TypeError)):
                act(life)
            assert_equal(snapshot(life.optimizer), before)

    @rule(seed=SEEDS, size=st.sampled_from([0.0, 1e-8, 1.0, 30.0]))
    def step(self, seed: int, size: float) -> None:
        for life in self.lives:
            life.step(seed, size)

    @rule(seed=SEEDS, missing=st.sets(st.integers(0, 6)))
    def step_with_missing_gradients(self, seed: int, missing: set[int]) -> None:
        for life in self.lives:
            life.step(seed, missing=missing)

    @rule(lr=st.sampled_from([0.0, 0.005, 0.02]))
    def change_the_rate(self, lr: float) -> None:
        for life in self.lives:
            life.optimizer.param_groups[0]["lr"] = lr

    @precondition(lambda self: len(self.lives[0].groups) < 2)
    @rule(options=st.sampled_from(GROUPS))
    def add_a_group(self, options: dict[str, Any]) -> None:
        for life in self.lives:
            life.add(options)

    @rule()
    def save_and_load(self) -> None:
        self.lives[1] = self.lives[1].reloaded()

    @rule()
    def copy(self) -> None:
        self.lives[1] = copy.deepcopy(self.lives[1])

    @rule(seed=SEEDS, value=st.sampled_from([float("nan"), float("inf"), -float("inf")]), culprit=SEEDS)
    def bad_value(self, seed: int, value: float, culprit: int) -> None:
        group = self.lives[0].optimizer.param_groups
        skips = [g["nonfinite"] == "skip" for g in group for _ in g["params"]]
        if skips[culprit % len(skips)]:
            for life in self.lives:
                before = snapshot(life.optimizer)
                life.step(seed, spoil=_spoil_value(value, culprit))
                assert_equal(snapshot(life.optimizer), before)
        else:
            self.refused(lambda life: life.step(seed, spoil=_spoil_value(value, culprit)))

    @rule(seed=SEEDS, value=st.sampled_from([float("nan"), float("inf")]), culprit=SEEDS)
    def bad_value_on_a_device(self, seed: int, value: float, culprit: int) -> None:
        host.DEFERRED = True
        weights = [p.detach().clone() for p in self.lives[0].params]
        steps = [float(s.get("step", 0)) for s in map(self.lives[0].optimizer.state.get, weights) if s]
        for life in self.lives:
            life.step(seed, spoil=_spoil_value(value, culprit))
            assert_equal([p.detach() for p in life.params], weights)
            state = life.optimizer.state_dict()["state"]
            try:
                life.step(seed)
            except ValueError as error:
                assert "that step was left out" in str(error)
                assert_equal(life.optimizer.state_dict()["state"], state)
        assert all(step >= 0 for step in steps)
        host.DEFERRED = False

    @rule(seed=SEEDS, kind=st.sampled_from(["shape", "sparse", "complex", "integers"]), culprit=SEEDS)
    def bad_gradient(self, seed: int, kind: str, culprit: int) -> None:
        self.refused(lambda life: life.step(seed, spoil=_spoil_kind(kind, culprit)))
        for p in self.lives[0].params + self.lives[1].params:
            p.grad = None

    @rule(options=st.sampled_from(BAD_GROUPS))
    def bad_group(self, options: dict[str, Any]) -> None:
        names = "param_names" in self.lives[0].optimizer.param_groups[0]
        fresh = nn.Parameter(torch.ones(2, 3))
        params = [("fresh", fresh)] if names else [fresh]
        self.refused(lambda life: life.optimizer.add_param_group({"params": params, **options}))

    @rule()
    def parameter_twice(self) -> None:
        def again(life: Life) -> None:
            group = life.optimizer.param_groups[0]
            first = (group["param_names"][0], group["params"][0]) if "param_names" in group else group["params"][0]
            life.optimizer.add_param_group({"params": [first]})

        self.refused(again)

    @rule(spoiled=st.sampled_from(SPOILED), place=SEEDS)
    def bad_state(self, spoiled: dict[str, Any], place: int) -> None:
        def load(life: Life) -> None:
            state = copy.deepcopy(life.optimizer.state_dict())
            state["param_groups"][place % len(state["param_groups"])].update(spoiled)
            life.optimizer.load_state_dict(state)

        self.refused(load)

    @precondition(lambda self: any(len(s) > 1 for s in self.lives[0].optimizer.state.values()))
    @rule(place=SEEDS)
    def bad_shape(self, place: int) -> None:
        def load(life: Life) -> None:
            state = copy.deepcopy(life.optimizer.state_dict())
            found = [(s, name) for s in state["state"].values() for name in s]
            each, name = found[place % len(found)]
            each[name] = torch.zeros(*each[name].shape, 9)
            life.optimizer.load_state_dict(state)

        self.refused(load)

    @invariant()
    def weights_are_finite_and_checkpoints_exact(self) -> None:
        if hasattr(self, "lives"):
            first, second = (snapshot(life.optimizer) for life in self.lives)
            assert all(bool(w.isfinite().all()) for w in first[0])
            assert_equal(second, first)


QUICK = settings(max_examples=30, stateful_step_count=10, suppress_health_check=list(HealthCheck))
TestLives = Lives.TestCase
TestLives.settings = QUICK


@pytest.mark.slow
class TestManyLives(Lives.TestCase):  # type: ignore[misc, valid-type]
    settings = settings(QUICK, max_examples=250, stateful_step_count=20)
