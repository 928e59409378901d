"""Options laid over one another: an optimizer's own, a geometry's, an override's, a param group's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import normopt
from normopt import EMA, Nesterov, Smoothed, SteepestDescent, View, zoo
from normopt.ingredient import parse
from normopt.rule import Rule


def gpt() -> nn.Module:
    return normopt.nn.GPT(vocab_size=50, d_model=16, n_layers=1, n_heads=2)


def group_of(optimizer: SteepestDescent, name: str) -> tuple[dict[str, object], Rule]:
    group = next(group for group in optimizer.param_groups if name in group["param_names"])
    rule = parse(group["rule"])
    assert isinstance(rule, Rule)
    return group, rule


@pytest.mark.parametrize(
    "given", [{"overrides": {"head.weight": {"lr": 3e-3}}}, {"geometry": {"unembedding": {"lr": 3e-3}}}]
)
def test_an_explicit_lr_replaces_the_ratio(given: dict[str, object]) -> None:
    optimizer = zoo.Muon(gpt(), lr=0.02, **given)
    assert group_of(optimizer, "head.weight")[0]["lr"] == 3e-3
    assert group_of(optimizer, "embed.weight")[0]["lr"] == 0.01


def test_a_number_for_momentum_keeps_the_kind_of_momentum() -> None:
    _, rule = group_of(zoo.Muon(gpt(), overrides={"head.weight": {"momentum": 0.5}}), "head.weight")
    assert rule.momentum == EMA(0.5, bias_correction=True)
    weights = [nn.Parameter(torch.randn(3, 3)) for _ in range(2)]
    groups = [{"params": weights[:1], "momentum": 0.5}, {"params": weights[1:]}]
    optimizer = SteepestDescent(groups, momentum=Nesterov(0.9))
    rules = [parse(group["rule"]) for group in optimizer.param_groups]
    assert [rule.momentum for rule in rules] == [Nesterov(0.5), Nesterov(0.9)]
    with pytest.raises(ValueError, match=r"momentum=0\.5 has no meaning for LionMomentum"):
        zoo.Lion([{"params": weights, "momentum": 0.5}])


def test_built_in_geometries_have_adams_memory() -> None:
    for geometry, name in (("adam", "blocks.0.mlp.up.weight"), ("muon", "head.weight")):
        _, rule = group_of(SteepestDescent(normopt.param_groups(gpt(), geometry)), name)
        assert isinstance(rule.norm, Smoothed) and rule.momentum == EMA(0.9, bias_correction=True)


def test_another_role_is_seen_as_that_role() -> None:
    roles = normopt.infer_roles(gpt(), {"embed.weight": "unembedding", "head.weight": {"role": "embedding"}})
    assert roles["embed.weight"].view == View() and roles["head.weight"].view == View(transpose=True)


def test_naming_the_head_demotes_what_was_taken_for_it() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 7), nn.Linear(4, 10))
    assert normopt.infer_roles(model)["2.weight"].name == "unembedding"
    roles = normopt.infer_roles(model, {"1.weight": "unembedding"})
    assert roles["1.weight"].name == "unembedding" and roles["2.weight"].name == "linear"


def test_a_layer_that_another_consumes_is_no_head() -> None:
    """A hidden width that equals the vocabulary, and a head tied by hand."""
    model = nn.Sequential(nn.Embedding(256, 64), nn.Linear(64, 256), nn.Linear(256, 64))
    names = [role.name for name, role in normopt.infer_roles(model).items() if name.endswith("weight")]
    assert names == ["embedding", "linear", "linear"]


def test_numbers_of_numpy_are_read_back() -> None:
    import numpy as np

    optimizer = SteepestDescent([nn.Parameter(torch.randn(3, 3))], momentum=EMA(np.float64(0.5)))
    assert parse(optimizer.param_groups[0]["rule"]).momentum == EMA(0.5)


@pytest.mark.usefixtures("registry")
def test_states_with_one_name_are_refused() -> None:
    weight = nn.Parameter(torch.randn(3, 3))
    weight.grad = torch.ones(3, 3)

    @dataclass(frozen=True)
    class Clash(normopt.Constant):
        def init_state(
            self, x: torch.Tensor, weights: Callable[[], torch.Tensor], direction: Any
        ) -> dict[str, torch.Tensor]:
            return {"momentum": weights().clone()}

    clashing = SteepestDescent([weight], norm="max", momentum=EMA(0.9), step_size=Clash())
    with pytest.raises(ValueError, match="two ingredients keep their state under one name"):
        clashing.step()


def test_a_state_saved_with_fewer_fields_loads() -> None:
    """Fields that are added later have defaults; a rule without them is the same rule."""
    weights = [nn.Parameter(torch.randn(3, 3)) for _ in range(2)]
    a, b = (SteepestDescent([w], momentum=0.9) for w in weights)
    weights[0].grad = torch.ones(3, 3)
    a.step()
    saved = a.state_dict()
    saved["param_groups"][0]["rule"] = saved["param_groups"][0]["rule"].replace(", nesterov=False", "")
    b.load_state_dict(saved)
    assert torch.equal(b.state[weights[1]]["momentum"], a.state[weights[0]]["momentum"])


def test_torchs_switches_are_taken() -> None:
    weight = nn.Parameter(torch.randn(3, 3))
    zoo.AdamW([weight], foreach=True, fused=False)
    zoo.Muon([weight], 1e-3, 0.1, 0.95, True, (3.4445, -4.775, 2.0315), 1e-7, 5, "original")
    with pytest.raises(ValueError, match="differentiable"):
        zoo.AdamW([weight], differentiable=True)
