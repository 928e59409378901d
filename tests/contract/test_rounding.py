"""Averages and weights in bfloat16: what rounding takes away, and what it must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import normopt
from normopt import SteepestDescent
from normopt.engine import plan
from normopt.numerics.rounding import places, stochastically
from normopt.rule import rule_of
from tests.support.optimizers import EVERY
from tests.support.steps import assert_goes_on, run, tensors

Make = Callable[..., SteepestDescent]
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)


# Rounding ---------------------------------------------------------------------------------------------------------


@given(st.floats(width=32, allow_nan=False, allow_subnormal=False), st.integers(1, 10**6), st.integers(-1, 5))
def test_results_are_neighbours(x: float, step: int, salt: int) -> None:
    exact = torch.tensor([x])
    rounded = stochastically(exact, torch.bfloat16, step, salt)
    nearest = exact.bfloat16()
    bits = (rounded.view(torch.int16).int() - nearest.view(torch.int16).int()).abs()
    assert bits <= 1
    assert torch.equal(rounded, nearest) or not torch.equal(nearest.float(), exact)  # what can be held is held


@pytest.mark.parametrize("share", [0.1, 0.5, 0.97])
@pytest.mark.parametrize("sign", [1, -1])
def test_nothing_is_lost_on_average(share: float, sign: int) -> None:
    """The share of those that are rounded up has a standard deviation of 0.0016 at most; bounds are 5 of them."""
    x = torch.full((10, 10_000), sign * (1 + share * 2**-7))
    ups = [((stochastically(x, torch.bfloat16, step).float() * sign - 1) * 2**7) for step in (1, 2)]
    for up in ups:
        assert abs(up.mean() - share) < 5 * (share * (1 - share) / x.numel()) ** 0.5
    for a, b in [(ups[0], ups[1]), (ups[0][:, 1:], ups[0][:, :-1]), (ups[0][1:], ups[0][:-1])]:
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.02


def test_what_is_not_finite_stays_so() -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
    torch.testing.assert_close(stochastically(x, torch.bfloat16, 1), x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_a_tensor_as_step_rounds_alike() -> None:
    x = torch.randn(100)
    assert torch.equal(*(stochastically(x, torch.bfloat16, step) for step in (3.0, torch.tensor(3.0))))


# Averages ---------------------------------------------------------------------------------------------------------


def averages(optimizer: SteepestDescent) -> list[Tensor]:
    return [s[name] for g in optimizer.param_groups for p in g["params"] for s in [optimizer.state[p]]
            for name in rule_of(g).at(g).averages(s)]  # fmt: skip


@every
def test_averages_take_half_the_bytes_and_lead_the_same_way(make: Make) -> None:
    params, twins = tensors(dtype=torch.float32), tensors(dtype=torch.float32)
    start = [p.detach().clone() for p in params]
    whole, half = make(params, lr=0.01), make(twins, lr=0.01, state_dtype=torch.bfloat16)
    for optimizer, weights in ((whole, params), (half, twins)):
        run(optimizer, weights, 8)
    assert {x.dtype for x in averages(half)} <= {torch.bfloat16} and len(averages(half)) == len(averages(whole))
    others = sum(len(s) for s in whole.state.values()) - len(averages(whole))
    exact = [x for s in half.state.values() for x in s.values() if x.dtype == torch.float32]
    assert len(exact) == others
    for w, p, q in zip(start, params, twins, strict=True):
        assert torch.nn.functional.cosine_similarity((p - w).flatten(), (q - w).flatten(), dim=0) > 0.97


@pytest.mark.slow
@every
def test_a_run_with_half_the_bytes_goes_on_from_its_checkpoint(make: Make) -> None:
    params, twins = tensors(dtype=torch.float32), tensors(dtype=torch.float32)
    optimizer, twin = make(params, lr=0.1, state_dtype="bfloat16"), make(twins, lr=0.3, state_dtype="bfloat16")
    assert_goes_on(optimizer, params, twin, twins)


#: What two bytes hold of each optimizer's state, and what they must not.
KEPT: dict[str, tuple[set[str], set[str], dict[str, Any]]] = {
    "adam": ({"momentum", "second_moment"}, set(), {}),
    "adam amsgrad": ({"momentum"}, {"second_moment", "max_second_moment"}, {"amsgrad": True}),
    "rmsprop": ({"0.second_moment"}, set(), {}),
    "rmsprop centered": (set(), {"0.second_moment", "0.mean"}, {"centered": True}),
    "adagrad": (set(), {"second_moment"}, {}),
    "adamuon": ({"momentum", "2.second_moment"}, set(), {}),
    "dion": ({"buffer"}, {"basis"}, {}),
    "shampoo": ({"momentum"}, {"second_moment", "second_moment1"}, {}),
    "prodigy": ({"momentum", "second_moment"}, {"initial", "gradient_sum"}, {}),
    "soap": ({"momentum", "rotated.second_moment"}, {"left_gram", "left_basis", "right_gram", "right_basis"}, {}),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_two_bytes_hold(case: str) -> None:
    rounded, exact, options = KEPT[case]
    params = tensors([(6, 4), (6, 4)], torch.float32)
    optimizer = normopt.create(case.split()[0], params, state_dtype="bfloat16", **options)
    run(optimizer, params, 2)
    kept = {name: x.dtype for name, x in optimizer.state[params[0]].items()}
    assert {name for name, dtype in kept.items() if dtype == torch.bfloat16} == rounded
    assert exact <= {name for name, dtype in kept.items() if dtype == torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam", "rmsprop", "nadam", "soap", "normuon"])
def test_gradients_that_lead_one_way_lead_as_far(name: str) -> None:
    """Rounding noise of moments that nearly cancel would end in steps of any length.

    Whitened, the noise of a rounded momentum counts in full: it adds some percent in directions that hold nothing else.
    """
    options = {"centered": True} if name == "rmsprop" else {}
    far = []
    for dtype in (None, "bfloat16"):
        (weight,) = weights = [nn.Parameter(torch.zeros(20, 30))]
        optimizer = normopt.create(name, weights, lr=1e-3, state_dtype=dtype, **options)
        for i in range(300):
            noise = torch.randn(20, 30, generator=torch.Generator().manual_seed(i))
            weight.grad = 1 + 0.1 * noise
            optimizer.step()
        far.append(float(weight.detach().abs().mean()))
    assert far[1] == pytest.approx(far[0], rel=0.1)


def test_another_dtype_in_mid_run() -> None:
    params = tensors(dtype=torch.float32)
    optimizer = normopt.zoo.Lion(params, lr=0.01)
    run(optimizer, params, 2)
    before = optimizer.state[params[0]]["momentum"].clone()
    optimizer.param_groups[0]["state_dtype"] = "bfloat16"
    optimizer.param_groups[0]["lr"] = 0.0
    run(optimizer, params, 1, first=2)
    now = optimizer.state[params[0]]["momentum"]
    assert now.dtype == torch.bfloat16 and optimizer.state[params[0]]["step"] == 3
    torch.testing.assert_close(now.float(), before.lerp(params[0].grad, 0.01), rtol=0.02, atol=0.01)
    optimizer.param_groups[0]["state_dtype"] = "float15"
    optimizer.state.clear()
    with pytest.raises(ValueError, match="unknown state_dtype"):
        run(optimizer, params, 1)


def test_pieces_of_one_tensor_are_rounded_each_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "FLAT_ENTRIES", 1000)
    weight = nn.Parameter(torch.zeros(2000, dtype=torch.bfloat16))
    optimizer = normopt.zoo.Lion([{"params": [weight], "bounds": "StochasticRounding()"}], state_dtype="bfloat16")
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    m = optimizer.state[weight]["momentum"]
    assert not torch.equal(m[:1000], m[1000:]) and not torch.equal(weight[:1000], weight[1000:])
    x = torch.randn(2000)
    whole = stochastically(x, torch.bfloat16, 1)
    assert torch.equal(whole[1000:], stochastically(x[1000:], torch.bfloat16, 1, where=places(0, x.shape)[1000:]))


def test_second_moments_forget_though_each_change_is_less_than_a_unit_in_the_last_place() -> None:
    """``beta = 0.999`` takes 0.1% a step from what bfloat16 holds to 0.4%: to nearest, it would stay for ever."""
    weight = nn.Parameter(torch.zeros(200, 50))
    optimizer = normopt.zoo.Adam([weight], lr=0.0, betas=(0.9, 0.999), state_dtype="bfloat16")
    for i in range(1001):
        weight.grad = torch.full_like(weight, 30.0 if i == 0 else 0.0)
        optimizer.step()
    moment = optimizer.state[weight]["second_moment"]
    expected = 900 * 0.001 * 0.999**1000
    assert moment.dtype == torch.bfloat16 and moment.float().mean() == pytest.approx(expected, rel=0.02)
    assert (torch.tensor(0.9).bfloat16() * 0.999).bfloat16() == torch.tensor(0.9).bfloat16()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_averages_in_the_parameters_own_dtype(dtype: torch.dtype) -> None:
    params = tensors(dtype=dtype)
    optimizer = normopt.create("muon", params, state_dtype="parameter")
    run(optimizer, params, 2)
    assert {x.dtype for x in averages(optimizer)} == {dtype}


def test_each_group_has_its_own_and_describe_counts_the_bytes() -> None:
    params = tensors([(4, 4), (4, 4)], torch.float32)
    groups: list[dict[str, Any]] = [{"params": params[:1]}, {"params": params[1:], "state_dtype": torch.bfloat16}]
    optimizer = normopt.zoo.Adam(groups, lr=0.1)
    run(optimizer, params, 1)
    assert [g["state_dtype"] for g in optimizer.param_groups] == [None, "bfloat16"]
    assert [row["state_bytes"] for row in normopt.summary(optimizer)] == [132, 68]
    assert [line.split()[-1] for line in normopt.describe(optimizer).splitlines() if "#" in line] == ["132", "68"]


@pytest.mark.parametrize("dtype", ["float16", torch.float16, "bfloat", 16, "float64"], ids=str)
def test_unknown_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown state_dtype .*Known: bfloat16, float32, parameter"):
        normopt.zoo.Adam(tensors(), state_dtype=dtype)
    optimizer = normopt.zoo.Adam(tensors())
    with pytest.raises(ValueError, match="unknown state_dtype"):
        optimizer.add_param_group({"params": tensors(), "state_dtype": dtype})


def test_float16_parameters_need_another_dtype() -> None:
    with pytest.raises(ValueError, match=r"parameter 0 of its group has dtype float16.*give state_dtype 'bfloat16'"):
        normopt.zoo.Adam(tensors(dtype=torch.float16), state_dtype="parameter")
    normopt.zoo.Adam(tensors(dtype=torch.float16), state_dtype="bfloat16")


# Weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["lion", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sgd", "adamw", "muon", "scion"))]
)
def test_a_thousand_small_steps_go_nine_tenths_as_far(name: str) -> None:
    """Steps of a twentieth of half a unit in the last place of a bfloat16 weight near 1, in one direction."""
    moved = {}
    for dtype, constraint in ((torch.float32, None), (torch.bfloat16, "StochasticRounding()"), (torch.bfloat16, None)):
        weight = nn.Parameter(torch.full((64, 64), 1.5).to(dtype))
        bounds = {} if constraint is None else {"bounds": constraint}
        decay = {} if name == "scion" else {"weight_decay": 0.0}
        rate = 64e-4 if name in ("muon", "scion") else 1e-4  # the entries of the polar factor are 1 / 64
        optimizer = normopt.create(name, [{"params": [weight], **decay, **bounds}], lr=rate)
        for _ in range(1000):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[dtype, constraint] = float((weight.detach().float() - 1.5).mean())
    whole, rounded, nearest = moved.values()
    assert rounded / whole == pytest.approx(1, abs=0.1)
    assert abs(nearest) < 0.5 * abs(whole)


def test_wider_weights_are_not_rounded() -> None:
    params, twins = tensors(dtype=torch.float32), tensors(dtype=torch.float32)
    plain, rounded = normopt.zoo.Lion(params), normopt.zoo.Lion([{"params": twins, "bounds": "StochasticRounding()"}])
    run(plain, params, 2)
    run(rounded, twins, 2)
    assert all(map(torch.equal, params, twins))
