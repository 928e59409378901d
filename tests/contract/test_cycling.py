"""Schedulers that cycle momentum reach all groups of all optimizers, whatever the groups call theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import normopt
from normopt import SteepestDescent
from normopt.ingredient import Option
from normopt.momentum.base import Momentum
from normopt.rule import rule_of
from tests.support.models import Net
from tests.support.steps import assert_equal, give_gradients, snapshot

SCHEDULERS = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 6, base_momentum=0.3, max_momentum=0.6),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, base_momentum=0.3, max_momentum=0.6),
}
WITHOUT = {"signsgd", "adagrad", "adafactor", "stormplus"}


def weight(group: dict[str, Any]) -> float | None:
    """The weight of the past that the group's options hold, where its rule reads one."""
    read = {option.name for option in _options(rule_of(group))}
    for name in ("momentum", "mu", "betas"):
        if name in read:
            return group[name][0] if name == "betas" else group[name]
    return None


def _options(value: Any) -> list[Option]:
    if isinstance(value, Option):
        return [value]
    parts = value if isinstance(value, tuple) else getattr(value, "__dict__", {}).values()
    return [option for part in parts for option in _options(part)]


def train(optimizer: SteepestDescent, model: Net, step: int) -> None:
    optimizer.step(lambda: give_gradients(list(model.parameters()), step))


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("name", sorted(normopt.list_optimizers()))
def test_every_group_is_cycled(name: str, scheduler: Any) -> None:
    """After each step each group's own option is what the scheduler has set, and the step was taken with it."""
    model = Net()
    optimizer = normopt.create(name, model, lr=0.05)
    if name in WITHOUT:
        with pytest.raises(ValueError, match="momentum"):
            scheduler(optimizer)
        return
    schedule = scheduler(optimizer)
    seen = []
    for i in range(5):
        group = optimizer.param_groups[0]
        seen.append(group["betas"][0] if "betas" in optimizer.defaults else group["momentum"])
        train(optimizer, model, i)
        weights = [weight(group) for group in optimizer.param_groups]
        assert {w for w in weights if w is not None} == {seen[-1]}
        schedule.step()
    assert max(seen) > min(seen) + 0.1


@pytest.mark.parametrize("name", ["muon", "dion", "swan"])
def test_a_cycled_step_is_the_step_with_that_momentum(name: str) -> None:
    """AdamW's groups take the same steps as in an optimizer whose betas are set by hand."""
    model, other = Net(), Net()
    other.load_state_dict(model.state_dict())
    first, second = normopt.create(name, model, lr=0.05), normopt.create(name, other, lr=0.05)
    schedule = SCHEDULERS["OneCycleLR"](first)
    for i in range(4):
        for a, b in zip(first.param_groups, second.param_groups, strict=True):
            value = a["momentum"]
            ours = {"momentum": value, "mu": value, "betas": (value, *b.get("betas", ())[1:])}
            b.update({k: v for k, v in ours.items() if k in b}, lr=a["lr"])
        train(first, model, i)
        train(second, other, i)
        schedule.step()
    assert_equal([p.detach() for p in model.parameters()], [p.detach() for p in other.parameters()])
    assert_equal(snapshot(first)[1]["state"], snapshot(second)[1]["state"])


def test_without_a_scheduler_betas_are_left_alone() -> None:
    model = Net()
    optimizer = normopt.create("muon", model, lr=0.05, aux_betas=(0.7, 0.9))
    train(optimizer, model, 0)
    assert {group["betas"] for group in optimizer.param_groups if "betas" in group} == {(0.7, 0.9)}


def test_cycling_survives_a_checkpoint() -> None:
    model, other = Net(), Net()
    other.load_state_dict(model.state_dict())
    first, second = normopt.create("muon", model, lr=0.05), normopt.create("muon", other, lr=0.05)
    schedule = SCHEDULERS["OneCycleLR"](first)
    train(first, model, 0)
    schedule.step()
    twin = SCHEDULERS["OneCycleLR"](second)
    other.load_state_dict(model.state_dict())
    second.load_state_dict(first.state_dict())
    twin.load_state_dict(schedule.state_dict())
    for i in range(1, 4):
        for optimizer, net, each in ((first, model, schedule), (second, other, twin)):
            train(optimizer, net, i)
            each.step()
    assert_equal(snapshot(first), snapshot(second))


def test_momenta_with_numbers_of_their_own_stay() -> None:
    model = Net()
    optimizer = normopt.create("adamw", model, overrides={"head.weight": {"momentum": "EMA(0.25)"}})
    SCHEDULERS["OneCycleLR"](optimizer)
    train(optimizer, model, 0)
    momenta: list[Momentum] = [rule_of(group).at(group).momentum for group in optimizer.param_groups]
    assert {momentum.beta for momentum in momenta} == {0.25, 0.6}


def test_the_first_weight_is_torchs_default() -> None:
    assert normopt.create("swan", Net()).defaults["momentum"] == 0.9
    assert "momentum" not in normopt.create("swan", [torch.nn.Parameter(torch.ones(2, 2))]).defaults
