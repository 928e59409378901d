"""What users rarely do one after the other, or together: each must do what it does alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import normopt
from normopt import EMA, Option, SteepestDescent, View, zoo
from normopt.rule import Rule, rule_of
from tests.support.optimizers import Make, everyone
from tests.support.steps import give_gradients, run, snapshot, tensors

TURNED = View(flatten=False, transpose=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("norm", ["row", "column", "Spectral(method='exact')", "Smoothed(Row())", "Sinkhorn(2)"])
def test_stacks_of_square_matrices_that_are_seen_transposed(norm: str, dtype: torch.dtype) -> None:
    """Alone in their batch they have the shape of what they are seen as, and must still be turned back."""
    torch.manual_seed(0)
    weights, gradients = (torch.randn(3, 5, 5, dtype=dtype) for _ in range(2))
    together = [nn.Parameter(weights.clone()) for _ in range(2)]
    turned, alone = nn.Parameter(weights.mT.clone()), nn.Parameter(weights.clone())
    turned.grad, alone.grad = gradients.mT.clone(), gradients.clone()
    for p in together:
        p.grad = gradients.clone()
    as_seen = SteepestDescent([turned], 0.1, norm, view=View(flatten=False))
    for optimizer in (SteepestDescent(together, 0.1, norm, view=TURNED), as_seen):
        optimizer.step()
    SteepestDescent([alone], 0.1, norm, constraint="RowBound(1e3)", view=TURNED).step()
    tolerance = {torch.bfloat16: 0.02, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(together[0].detach(), turned.detach().mT, rtol=0, atol=tolerance)
    torch.testing.assert_close(alone.detach(), turned.detach().mT, rtol=0, atol=tolerance)


@everyone
def test_steps_with_and_without_a_closure_in_turn(make: Make) -> None:
    """A step like the last one is like the last one of either kind."""
    moved = []
    for forgets in (False, True):
        params = tensors()
        optimizer = make(params)
        if rule_of(optimizer.param_groups[0]).momentum.looks_back:
            pytest.skip("it needs a closure at every step")
        decays = "weight_decay" in optimizer.param_groups[0]
        run(optimizer, params, 3)
        kept = optimizer.param_groups[0].get("weight_decay")
        if decays:
            optimizer.param_groups[0]["weight_decay"] = 0.25
        give_gradients(params, 8)
        first, params[0].grad = params[0].grad, None

        def closure(params: Any = params, first: Any = first) -> float:
            params[0].grad, params[1].grad = first, None
            return 0.0

        optimizer.step(closure)
        if decays:
            optimizer.param_groups[0]["weight_decay"] = kept
        for seed in range(3):
            if forgets:
                optimizer._warm = None
            give_gradients(params, seed)
            optimizer.step()
        moved.append(snapshot(optimizer))
    assert str(moved[0]) == str(moved[1])


def test_true_is_no_one() -> None:
    rule = Rule(momentum=EMA(0.5, nesterov=Option("nesterov")))
    for values in ((True, 1.0), (1.0, True), (False, 0.0)):
        for value in values:
            found = rule.at({"nesterov": value}).momentum
            assert (isinstance(found, EMA) and found.nesterov is value) or type(found.nesterov) is type(value)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("name", ["novograd", "adammini", "normuon", "dasgo", "subsetnorm", "adamw", "muon"])
def test_no_entries_in_low_precision(name: str, shape: tuple[int, ...]) -> None:
    params = [nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(3, 2))]
    if len(shape) < 2 and name in ("adammini", "normuon", "muon"):
        pytest.skip("it is for matrices")
    optimizer = normopt.create(name, params, state_dtype="bfloat16")
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert params[1].isfinite().all()


def test_names_that_change_groups() -> None:
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    here = zoo.Lion([{"params": [("a", a)]}, {"params": [("b", b)]}])
    there = zoo.Lion([{"params": [("b", b)]}, {"params": [("a", a)]}])
    with pytest.raises(ValueError, match="parameter 'b' is in param group 0 here, and in group 1 of the saved state"):
        there.load_state_dict(here.state_dict())


def test_a_limited_step_leaves_modes_alone_and_refuses_iterates() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3))
    model[1].eval()
    model[2].eval()
    optimizer = zoo.SGD(model, lr=1e3)
    x = torch.randn(6, 4)
    model(x).square().sum().backward()
    normopt.softmax_limited_step(optimizer, model, x)
    assert [module.training for module in model] == [True, False, False, True] and model.training
    with pytest.raises(ValueError, match="Averaged keeps iterates of its own"):
        normopt.softmax_limited_step(normopt.Averaged(optimizer), model, x)  # type: ignore[arg-type]


def test_statistics_of_a_single_input() -> None:
    layer = nn.Linear(4, 3)
    optimizer = SteepestDescent([layer.weight], norm="InputWhitened()")
    normopt.InputStatistics(layer, optimizer)
    x = torch.randn(4)
    layer(x).sum().backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[layer.weight]["inputs"].squeeze(0), torch.outer(x, x))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["sgd", "adamw", "muon", "prodigy"])
def test_a_step_that_is_left_out_changes_no_average(name: str, weight_decay: float) -> None:
    params = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2, 2))]
    inner = normopt.create(name, params, lr=0.1, nonfinite="skip")
    optimizer = normopt.Averaged(inner, weight_decay=weight_decay)

    def step(value: float) -> None:
        for i, p in enumerate(params):
            p.grad = torch.full_like(p, value + i)
        optimizer.step()

    for _ in range(3):
        step(1.0)
    before = str((params, optimizer.state_dict()))
    step(float("inf"))
    assert not inner.took_step and str((params, optimizer.state_dict())) == before
    step(1.0)
    assert inner.took_step and str((params, optimizer.state_dict())) != before
