"""States of torch.optim that another optimizer takes over by name, on a whole model in the middle of a run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normopt
from normopt import zoo
from normopt.engine.plan import state_shapes
from normopt.nn.gpt import GPT
from normopt.rule import rule_of
from tests.support.steps import assert_equal, give_gradients

Make = Callable[..., torch.optim.Optimizer]
THEIRS: dict[str, Make] = {
    "adamw": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0),
    "adam": partial(torch.optim.Adam, lr=1e-3),
    "sgd": partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
}


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return GPT(11, 8, 2, 2)


def matrices(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if p.ndim == 2]


def trained(make: Make, named: bool = True) -> tuple[nn.Module, Any]:
    model = gpt()
    optimizer = make(model.named_parameters() if named else model.parameters())
    go_on(model, optimizer, 3)
    return model, optimizer


def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for i in range(first, first + steps):
        give_gradients(list(model.parameters()), i)
        optimizer.step()


def held(optimizer: normopt.SteepestDescent, model: nn.Module) -> dict[str, Any]:
    return {name: optimizer.state.get(p, {}) for name, p in model.named_parameters()}


@pytest.mark.parametrize("named", [True, False])
def test_adamw_goes_on_as_adamw_whatever_the_groups(named: bool) -> None:
    model, theirs = trained(THEIRS["adamw"], named)
    other = copy.deepcopy(model)
    ours = zoo.AdamW(other, lr=1e-3, weight_decay=0.0)
    assert normopt.from_torch_state(ours, theirs.state_dict(), other) == {}
    go_on(model, theirs, 3, first=3)
    go_on(other, ours, 3, first=3)
    assert_equal([p.detach() for p in other.parameters()], [p.detach() for p in model.parameters()], 1e-6)


@pytest.mark.parametrize("name", ["muon", "scion", "lion", "signum"])
def test_averages_of_gradients_are_carried_by_name(name: str) -> None:
    """Nothing starts anew where averages are all that the new optimizer keeps; Muon's AdamW tensors get both."""
    model, theirs = trained(THEIRS["adamw"])
    ours = normopt.create(name, model)
    saved = theirs.state_dict()
    kept = copy.deepcopy(saved)
    assert normopt.from_torch_state(ours, saved, model) == {}
    assert_equal(saved, kept)
    for p in model.parameters():
        state = ours.state[p]
        assert_equal(state["momentum"], theirs.state[p]["exp_avg"])
        assert state["step"] == 3
        if "second_moment" in state:
            assert_equal(state["second_moment"], theirs.state[p]["exp_avg_sq"])
    go_on(model, ours, 1, first=3)
    assert all(ours.state[p]["step"] == 4 for p in model.parameters())


def test_what_starts_anew_is_said_with_its_reason() -> None:
    """NorMuon's row sizes are not in the state of AdamW; its momentum is, and counts its steps from 0."""
    model, theirs = trained(THEIRS["adamw"])
    ours = normopt.create("normuon", model)
    anew = normopt.from_torch_state(ours, theirs.state_dict(), model)
    moved_by_norm = {name for group in ours.param_groups if group["role"] == "linear" for name in group["param_names"]}
    assert anew.keys() == moved_by_norm
    for name, p in model.named_parameters():
        assert_equal(ours.state[p]["momentum"], theirs.state[p]["exp_avg"])
        assert ours.state[p]["step"] == (0 if name in anew else 3)
    go_on(model, ours, 1, first=3)


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("name", [name for name in normopt.list_optimizers() if name != "stormplus"])
def test_every_optimizer_takes_over_and_says_what_starts_anew(name: str, kind: str) -> None:
    """What is not said to start anew is there; steps stay finite, and no longer than ten times those of a fresh one."""
    model, theirs = trained(THEIRS[kind])
    fresh_model = copy.deepcopy(model)
    ours, fresh = normopt.create(name, model), normopt.create(name, fresh_model)
    anew = normopt.from_torch_state(ours, theirs.state_dict(), model)
    for group in ours.param_groups:
        for p, label in zip(group["params"], group["param_names"], strict=True):
            missing = state_shapes(p, rule_of(group).at(group)).keys() - ours.state.get(p, {}).keys()
            assert bool(missing) == (label in anew)
            assert all(each in anew[label] for each in missing)
    before = [p.detach().clone() for p in model.parameters()]
    go_on(model, ours, 2, first=3)
    go_on(fresh_model, fresh, 2, first=3)
    for p, q, start in zip(model.parameters(), fresh_model.parameters(), before, strict=True):
        assert p.isfinite().all()
        assert (p - start).norm() <= 10 * (q - start).norm() + 1e-6


def test_heavy_balls_and_averages_are_turned_into_each_other() -> None:
    model, theirs = trained(partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.5))
    ours = zoo.SGD(model, lr=0.1, momentum=0.8)
    assert normopt.from_torch_state(ours, theirs.state_dict(), model) == {}
    for p in model.parameters():
        torch.testing.assert_close(ours.state[p]["momentum"], theirs.state[p]["momentum_buffer"] * 0.1 / 0.5 / 0.2)
    upwards = zoo.SGD(model, lr=0.1, momentum=0.9, dampening=0.5, maximize=True)
    normopt.from_torch_state(upwards, theirs.state_dict(), model)
    for p in model.parameters():
        torch.testing.assert_close(upwards.state[p]["momentum"], -theirs.state[p]["momentum_buffer"])


def test_averages_of_other_gradients_start_anew() -> None:
    model, theirs = trained(partial(torch.optim.Adam, weight_decay=0.1))
    anew = normopt.from_torch_state(zoo.Muon(model), theirs.state_dict(), model)
    assert anew.keys() == dict(model.named_parameters()).keys()
    assert all("L2 decay 0.1" in reason for reason in anew.values())
    model, theirs = trained(partial(torch.optim.SGD, lr=0.1, momentum=1.0))
    assert "no averages in the same sense" in str(normopt.from_torch_state(zoo.Lion(model), theirs.state_dict(), model))


def test_muons_state_goes_to_a_whole_model() -> None:
    model = gpt()
    theirs = torch.optim.Muon(matrices(model))
    give_gradients([p for _, p in matrices(model)], 0)
    theirs.step()
    ours = zoo.Muon(model)
    anew = normopt.from_torch_state(ours, theirs.state_dict(), model)
    hidden = {name for group in ours.param_groups if group["role"] == "linear" for name in group["param_names"]}
    assert anew.keys() == dict(model.named_parameters()).keys() - hidden
    for name, p in model.named_parameters():
        if name in hidden:
            assert_equal(ours.state[p]["momentum"], theirs.state[p]["momentum_buffer"])
    assert "nothing for it" in anew[next(name for name, p in model.named_parameters() if p.ndim == 1)]


def test_wrappers_put_prefixes_before_names() -> None:
    model, theirs = trained(THEIRS["adamw"])
    saved = theirs.state_dict()
    group = saved["param_groups"][0]
    group["param_names"] = [f"module._orig_mod.{name}" for name in group["param_names"]]
    assert normopt.from_torch_state(zoo.Muon(model), saved, model) == {}


def test_states_that_cannot_be_matched_are_refused() -> None:
    model = gpt()
    split = [{"params": [p for p in model.parameters() if p.ndim == n]} for n in (1, 2)]
    theirs = torch.optim.AdamW(split)
    go_on(model, theirs, 1)
    ours = zoo.Muon(model)
    with pytest.raises(ValueError, match=r"has no names for its .* parameters.*named_parameters"):
        normopt.from_torch_state(ours, theirs.state_dict(), model)
    other = torch.optim.AdamW([("elsewhere", nn.Parameter(torch.zeros(2, 2)))])
    with pytest.raises(ValueError, match=r"no parameter of the saved state is one of the model's.*elsewhere"):
        normopt.from_torch_state(ours, other.state_dict(), model)
    with pytest.raises(ValueError, match="is no parameter of the model"):
        normopt.from_torch_state(zoo.Muon(gpt()), trained(THEIRS["adamw"])[1].state_dict(), model)
    assert not ours.state
