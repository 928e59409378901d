"""What is refused, by name, before anything has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import normopt
from normopt import SteepestDescent
from normopt.zoo.base import Declared
from tests.support.optimizers import Make, every, everyone
from tests.support.steps import assert_equal, give_gradients, run, snapshot, tensors


@everyone
@pytest.mark.parametrize("lr", [-1, -1e-3, float("nan"), True, "0.1", None, torch.ones(2)], ids=str)
def test_bad_learning_rates_are_refused(make: Make, lr: Any) -> None:
    if lr is not None or isinstance(make(tensors()), Declared):  # others have a default that is None
        with pytest.raises(ValueError, match="lr must be"):
            make(tensors(), lr=lr)
    with pytest.raises(ValueError, match="lr must be"):
        make([{"params": tensors(), "lr": lr}])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sgd", {"momentum": -0.1}, r"HeavyBall: beta must lie in \[0, inf\), got -0.1"),
        ("sgd", {"momentum": -0.1}, "HeavyBall: beta"),
        ("sgd", {"nesterov": True}, "nesterov needs beta > 0"),
        ("sgd", {"momentum": 0.9, "dampening": 0.1, "nesterov": True}, "nesterov needs"),
        ("sgd", {"weight_decay": -1}, "L2: weight_decay must lie in"),
        ("signum", {"momentum": 1.5}, "EMA: beta must lie in"),
        ("signum", {"momentum": "high"}, "EMA: beta must be a number, got 'high'"),
        ("signum", {"weight_decay": None}, "WeightDecay: weight_decay must be a number, got None"),
        ("signsgd", {"weight_decay": -0.1}, "WeightDecay: weight_decay must lie in"),
        ("adam", {"betas": (1.0, 0.9)}, "EMA: beta must lie in"),
        ("adam", {"betas": (0.9, 1.0)}, "Smoothed: beta must lie in"),
        ("adamw", {"betas": (0.9, -0.1)}, "Smoothed: beta must lie in"),
        ("adamw", {"betas": 0.9}, "betas must be a tuple"),
        ("adamw", {"betas": (0.9,)}, "betas must be a tuple"),
        ("adamw", {"eps": -1e-8}, "Smoothed: eps must lie in"),
        ("adamw", {"weight_decay": float("nan")}, "WeightDecay: weight_decay"),
        ("muon", {"momentum": 1.01}, r"EMA: beta must lie in \[0, 1\], got 1.01"),
        ("muon", {"weight_decay": -1.0}, "WeightDecay: weight_decay"),
        ("muon", {"ns_steps": 0}, "steps must be a whole number"),
        ("muon", {"adjust_lr_fn": "match_rms_adam"}, "did you mean 'match_rms_adamw'"),
        ("muon", {"orthogonalize": "polar-expres"}, "did you mean 'polar-express'"),
        ("muon", {"orthogonalize_dtype": "bfloat61"}, "name of a torch dtype"),
        ("muon", {"orthogonalize": "exact", "ns_coefficients": (3.0, -3.0, 1.0)}, "ns_coefficients need"),
        ("scion", {"radius": -1.0}, "Constant: radius must lie in"),
        ("scion", {"norm": "colum"}, "did you mean 'column'"),
        ("scion", {"momentum": -0.1}, "EMA: beta must lie in"),
        ("adafactor", {"d": 0.9}, r"Adafactor: d must lie in \[1, inf\), got 0.9"),
    ],
)
def test_bad_numbers_are_refused_by_name(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        normopt.create(name, tensors(), lr=0.1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "spektral"}, "unknown direction 'spektral'; did you mean 'spectral'"),
        ({"momentum": "heavyball"}, "did you mean 'heavy-ball'"),
        ({"momentum": True}, "EMA: beta must be a number, got True"),
        ({"momentum": 1.5}, "EMA: beta must lie in"),
        ({"momentum": "EMA(1.0, bias_correction=True)"}, r"EMA: beta must lie in \[0, 1\), got 1.0"),
        ({"step_size": "duel"}, "did you mean 'dual'"),
        ({"constraint": "weight-decoy"}, "did you mean 'weight-decay'"),
        ({"constraint": ["L2(0.1)", "frank-wolf"]}, "did you mean 'frank-wolfe'"),
        ({"norm": "Max("}, "cannot read the ingredient"),
        ({"norm": "EMA(0.9)"}, "expected a Direction"),
        ({"norm": "__import__('os')()"}, "cannot read|unknown|malformed"),
        ({"norm": 3}, "expected a Direction"),
        ({"options": {"betas": (0.9, 0.9)}}, "reads 'betas'"),
        ({"norm": "Smoothed(Max(), Option('betas', 1))", "options": {"beta": (0.9, 0.9)}}, "did you mean 'betas'"),
        ({"norm": "Smoothed(Max(), Option('betas', 1))"}, "option 'betas' is missing"),
        ({"norm": "Smoothed(Nuclear())"}, "has no second moment"),
        ({"norm": "Smoothed(Spectral(), maximum=True)"}, "of which none is the largest"),
        ({"norm": "Chain()"}, "needs one or more"),
        ({"geometry": "scion"}, "whole model"),
        ({"overrides": {"*": "max"}}, "whole model"),
    ],
)
def test_bad_ingredients_are_refused_with_a_hint(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        SteepestDescent(tensors(), **{"lr": 0.1, **options})


@everyone
def test_typos_are_refused(make: Make) -> None:
    with pytest.raises(TypeError, match="weigth_decay"):
        make(tensors(), weigth_decay=0.1)
    with pytest.raises(TypeError, match="reads 'nrom'"):
        make([{"params": tensors(), "nrom": "max"}], lr=0.1)
    optimizer = make(tensors(), lr=0.1)
    for bad in ({"learning_rate": 0.1}, {"norm": "maxx"}, {"lr": -1.0}, {"momentum": -0.1}):
        with pytest.raises((TypeError, ValueError)):
            optimizer.add_param_group({"params": tensors([(3, 3)]), **bad})
    assert len(optimizer.param_groups) == 1


def test_a_vector_under_the_spectral_norm_is_refused() -> None:
    w, b = tensors([(4, 3), (3,)])
    for params, name in ([w, b], "parameter 1 of its group"), ([("w", w), ("b", b)], "parameter 'b'"):
        with pytest.raises(ValueError, match=rf"{name} has shape \(3,\).*norm='max'.*pass the model"):
            normopt.create("muon", params)
    optimizer = normopt.create("muon", [w])
    with pytest.raises(ValueError, match="norm of matrices"):
        optimizer.add_param_group({"params": [b]})
    optimizer.add_param_group({"params": [b], "norm": "max"})
    run(optimizer, [w, b], 2)


@every
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_parameters_that_are_no_real_numbers_are_refused(make: Make, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="only real floating-point"):
        make([nn.Parameter(torch.zeros(3, 3, dtype=dtype), requires_grad=False)], lr=0.1)


@every
@pytest.mark.parametrize("when", [0, 2])
def test_expanded_parameters_are_refused_before_anything_moves(make: Make, when: int) -> None:
    """torch would fail in the middle of the step: several entries are one number in memory."""
    params = tensors([(4, 3), (4, 3), (3, 2)])
    optimizer = make([{"params": params[:2]}, {"params": params[2:]}], lr=0.1)
    run(optimizer, params, when)
    params[1].data = params[1].data[:1].clone().expand(4, 3)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"parameter 1 of its group is an expanded tensor of shape \(4, 3\)"):
        run(optimizer, params, 1)
    assert_equal(snapshot(optimizer), before)
    params[1].data = params[1].data.contiguous()
    run(optimizer, params, 1)
    assert all(p.isfinite().all() for p in params)


@every
@pytest.mark.parametrize("kind", ["sparse", "complex"])
@pytest.mark.parametrize("culprit", [0, 3])
def test_bad_gradients_are_refused_before_anything_moves(make: Make, kind: str, culprit: int) -> None:
    params = tensors()
    optimizer = make([{"params": params[:2]}, {"params": params[2:]}], lr=0.1)
    run(optimizer, params, 2)
    give_gradients(params, 2)
    g = params[culprit].grad
    params[culprit].grad = None
    params[culprit].grad_dtype = None
    params[culprit].grad = g.to_sparse() if kind == "sparse" else g.to(torch.complex128)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"parameter {culprit % 2} of its group has a {kind} gradient"):
        optimizer.step()
    assert_equal(snapshot(optimizer), before)
