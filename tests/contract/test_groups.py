"""Param groups: their options, their names, their order, and how they are batched."""

from __future__ import annotations

import copy
import inspect
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import normopt
from normopt import SteepestDescent
from normopt.engine import plan
from normopt.rule import rule_of
from tests.support.models import Net
from tests.support.optimizers import LOCAL, Make, everyone, everyone_at_once, local_at_once, whole, whole_at_once
from tests.support.steps import assert_equal, give_gradients, run, snapshot, tensors


@local_at_once
def test_groups_have_their_own_options_and_ingredients(make: Make) -> None:
    """Each group moves as it would in an optimizer of its own."""
    ingredients = {"norm": "max", "momentum": "EMA(beta=0.5)", "lr": 0.03}
    own = [{"lr": 0.2}, ingredients, {"constraint": "WeightDecay(0.5)"}, {}]
    together, apart = tensors(), tensors()
    optimizer = make([{"params": [p], **o} for p, o in zip(together, own, strict=True)], lr=0.1)
    alone = [make([{"params": [p], **o}], lr=0.1) for p, o in zip(apart, own, strict=True)]
    for i in range(4):
        give_gradients(together, i)
        give_gradients(apart, i)
        optimizer.step()
        for single in alone:
            single.step()
    assert_equal(together, apart)


@whole_at_once
def test_groups_that_agree_are_one_group(make: Make) -> None:
    """Also where all tensors are looked at before one moves."""
    together, apart = tensors(), tensors()
    one, several = make(together, lr=0.1), make([{"params": apart[:1]}, {"params": apart[1:]}], lr=0.1)
    run(one, together, 3)
    run(several, apart, 3)
    assert_equal(together, apart, 1e-2 if "bfloat16" in one.param_groups[0]["rule"] else 1e-12)


@whole
def test_a_group_has_a_learning_rate_of_its_own(make: Make) -> None:
    params = tensors()
    optimizer = make([{"params": params[:2], "lr": 0.0}, {"params": params[2:]}], lr=0.1)
    before = [p.detach().clone() for p in params]
    run(optimizer, params, 3)
    assert_equal([p.detach() for p in params[:2]], before[:2])
    assert all((p != q).any() for p, q in zip(params[2:], before[2:], strict=True))


@everyone
def test_add_param_group_in_mid_run(make: Make) -> None:
    params = tensors()
    optimizer = make(params[:2], lr=0.1)
    run(optimizer, params[:2], 3)
    optimizer.add_param_group({"params": params[2:], "lr": 0.0})
    before = [p.detach().clone() for p in params]
    run(optimizer, params, 1, first=3)
    assert_equal([p.detach() for p in params[2:]], before[2:])
    assert all((p.detach() != q).any() for p, q in zip(params[:2], before[:2], strict=True))
    assert optimizer.state_dict()["state"][2]["step"] == 1


@everyone
def test_duplicates_and_empty_lists_are_refused(make: Make) -> None:
    w = tensors()[0]
    with pytest.raises(ValueError, match="empty parameter list"):
        make([], lr=0.1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        make([{"params": [w]}, {"params": [w]}], lr=0.1)
    optimizer = make([w], lr=0.1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [w]})
    assert len(optimizer.param_groups) == 1


@everyone
def test_names_are_kept_in_state_dicts(make: Make) -> None:
    names = ["a", "b", "c", "d"]
    optimizer = make(list(zip(names, tensors(), strict=True)), lr=0.1)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names


@everyone_at_once
def test_the_order_of_groups_does_not_matter(make: Make) -> None:
    a, b = tensors(), tensors()
    first = make([{"params": a[:2]}, {"params": a[2:], "lr": 0.03}], lr=0.1)
    second = make([{"params": b[2:], "lr": 0.03}, {"params": b[:2]}], lr=0.1)
    run(first, a, 3)
    run(second, b, 3)
    assert_equal(a, b, 0.0 if make in LOCAL.values() else 1e-12)


@everyone
def test_the_size_of_batches_does_not_matter(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for limit in (1 << 22, 50, 1):
        monkeypatch.setattr(plan, "MAX_ENTRIES", limit)
        params = tensors()
        optimizer = make(params, lr=0.1)
        run(optimizer, params, 3)
        results.append(snapshot(optimizer))
    loose = 1e-2 if "bfloat16" in optimizer.param_groups[0]["rule"] else 1e-12
    assert_equal(results[1], results[0], loose)
    assert_equal(results[2], results[0], loose)


# Entries of other libraries ------------------------------------------------------------------------------------------

THEIR_OWN = {
    "rho": 0.05,
    "adaptive": True,
    "layer_id": 3,
    "lr_scale": 0.5,
    "group_name": "head",
    "weight_decay_mult": 2,
}
OF_TORCH = {"foreach": True, "fused": None, "differentiable": False}


@everyone
def test_entries_that_nothing_reads_are_kept(make: Make) -> None:
    """As torch keeps them, in checkpoints too; steps are those without."""
    params, twins = tensors(), tensors()
    optimizer, plain = make([{"params": params, **THEIR_OWN, **OF_TORCH}], lr=0.1), make(twins, lr=0.1)
    run(optimizer, params, 2)
    run(plain, twins, 2)
    assert_equal(params, twins)
    saved = optimizer.state_dict()["param_groups"][0]
    assert {name: saved[name] for name in THEIR_OWN | OF_TORCH} == THEIR_OWN | OF_TORCH


@everyone
@pytest.mark.parametrize(
    "slip", ["lrr", "lr_ration", "maximise", "capturabel", "learning_rate", "learnrate", "nrom", "sate_dtype"]
)
def test_near_misses_are_refused(make: Make, slip: str) -> None:
    with pytest.raises(TypeError, match=f"reads '{slip}'; did you mean"):
        make([{"params": tensors(), slip: 0.1}], lr=0.1)


@everyone
def test_differentiable_groups_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="differentiable=True is not supported"):
        make([{"params": tensors(), "differentiable": True}], lr=0.1)


@pytest.mark.parametrize("of_model", [False, True], ids=["parameters", "model"])
@whole
def test_an_optimizer_is_made_anew_from_its_groups(make: Make, of_model: bool) -> None:
    """As wrappers make one around it: the same rules, rates and names, and a state of its own."""
    model = Net()
    params = [*model.parameters()] if of_model else tensors()
    optimizer = make(model if of_model else params, lr=0.1)
    run(optimizer, params, 1)
    options = {"base": "adam"} if isinstance(optimizer, normopt.zoo.NaP) else {}
    again = type(optimizer)(optimizer.param_groups, **options)
    own = [{*rule_of(group).step_size.init_shared()} for group in optimizer.param_groups]
    for old, new, skipped in zip(optimizer.param_groups, again.param_groups, own, strict=True):
        assert {name: new[name] for name in old.keys() - skipped} == {name: old[name] for name in old.keys() - skipped}
        assert all(new[name] is not old[name] for name in skipped)
    assert not again.state
    run(again, params, 1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
        ("nadam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
        ("muon", {"ns_steps": 3}),
        ("muon", {"ns_coefficients": (2.0, -1.5, 0.5)}),
        ("muon", {"adjust_lr_fn": "match_rms_adamw", "eps": 1e-6}),
        ("soap", {"precondition_frequency": 2}),
        ("prodigy", {"use_bias_correction": True}),
        ("nap", {"decoupled_weight_decay": True}),
    ],
    ids=str,
)
def test_a_group_names_arguments_of_the_rule(name: str, said: dict[str, Any]) -> None:
    """Its rule is that of an optimizer with these arguments, also of groups that are added to one from a pickle."""
    make = partial(normopt.create, name, lr=0.1)
    expected = make(tensors(), **said).param_groups[0]["rule"]
    optimizer = make([{"params": tensors(), **said}])
    later = pickle.loads(pickle.dumps(make(tensors())))
    later.add_param_group({"params": tensors(), **said})
    assert optimizer.param_groups[0]["rule"] == later.param_groups[1]["rule"] == expected
    assert later.param_groups[0]["rule"] == make(tensors()).param_groups[0]["rule"]


def test_arguments_of_the_rule_are_checked_in_groups() -> None:
    w = tensors()[:1]
    for name, said, message in [
        ("muon", {"ns_steps": 0}, "steps must be a whole number"),
        ("muon", {"ns_step": 3}, "did you mean 'ns_steps'"),
        ("muon", {"adjust_lr_fn": "match_rms_adam"}, "did you mean 'match_rms_adamw'"),
        ("adamw", {"decoupled_weight_decay": False}, "decoupled_weight_decay=False is not supported; leave"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            normopt.create(name, [{"params": w, **said}])
    normopt.create("adamw", [{"params": w, "decoupled_weight_decay": True}])


# Groups that come to a model -----------------------------------------------------------------------------------------


class Backbone(nn.Module):
    """Two linear layers, of which the last one is no head, and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(5, 4), nn.Linear(4, 6), nn.Linear(6, 4)


@whole
def test_a_module_is_added_by_role(make: Make) -> None:
    """Each tensor gets what it would get in a model, the last linear layer that of hidden ones."""
    model, backbone = Net(), Backbone()
    optimizer, alone = make(model, lr=0.1), make(nn.ModuleDict({"backbone": backbone, "head": nn.Linear(4, 5)}), lr=0.1)
    optimizer.add_param_group({"params": backbone})
    added, expected = by_name(optimizer), by_name(alone)
    for name in dict(backbone.named_parameters()):
        want = expected[f"backbone.{name}"]
        got = added[name]
        assert (got["rule"], got["role"], got["lr"]) == (want["rule"], want["role"], want["lr"])
    assert added["down.weight"]["role"] == "linear"
    run(optimizer, [*model.parameters(), *backbone.parameters()], 2)


@whole
def test_parameters_without_names_are_added_by_shape(make: Make) -> None:
    """To an optimizer of a model, with a warning; matrices come last, where callbacks look for the group."""
    model, backbone = Net(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 6), nn.LayerNorm(6))
    optimizer = make(model, lr=0.1)
    hidden = by_name(optimizer)["up.weight"]
    count = len(optimizer.param_groups)
    with pytest.warns(UserWarning, match=r"6 parameters.* roles by their shapes: 4 vector, 1 linear, 1 conv"):
        optimizer.add_param_group({"params": [*backbone.parameters()], "lr": 0.01})
    added = optimizer.param_groups[count:]
    assert added[0]["role"] == "vector" and added[-1]["role"] in ("linear", "conv")
    linear = next(group for group in added if group["role"] == "linear")
    assert linear["rule"] == hidden["rule"] and linear["lr"] == pytest.approx(hidden["lr"] / 10)
    assert all("its shape" in reason for group in added for reason in group["reasons"])
    run(optimizer, [*model.parameters(), *backbone.parameters()], 2)
    normopt.describe(optimizer)


def test_the_users_geometry_holds_for_what_is_added() -> None:
    optimizer = normopt.create("adamw", Net(), geometry={"linear": {"norm": "column"}})
    optimizer.add_param_group({"params": nn.Linear(4, 6)})
    assert by_name(optimizer)["weight"]["rule"].startswith("Rule(norm=Column(")


def test_names_of_what_is_added_differ_from_all_others() -> None:
    optimizer = normopt.create("muon", nn.Linear(4, 4))
    for _ in range(2):
        optimizer.add_param_group({"params": nn.Linear(4, 4)})
        with pytest.warns(UserWarning, match="by their shapes"):
            optimizer.add_param_group({"params": tensors([(3, 3), (3,)])})
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert len(names) == len({*names}) == 10


def test_a_group_that_is_refused_leaves_none_of_its_roles() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = normopt.create("muon", model)
    count = len(optimizer.param_groups)
    module = nn.Sequential(nn.Linear(3, 3))
    module[0].weight = model[0].weight  # is in the optimizer already; the bias is not
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": module})
    assert len(optimizer.param_groups) == count
    with pytest.raises(ValueError, match="no parameter of the module ReLU requires a gradient"):
        optimizer.add_param_group({"params": nn.ReLU()})


def test_a_module_comes_to_an_optimizer_of_parameters() -> None:
    optimizer = normopt.create("muon", tensors()[:1])
    optimizer.add_param_group({"params": Backbone()})
    assert [group.get("role") for group in optimizer.param_groups] == [None, "embedding", "linear", "vector"]


def by_name(optimizer: normopt.SteepestDescent) -> dict[str, dict[str, Any]]:
    return {name: group for group in optimizer.param_groups for name in group["param_names"]}


def test_what_a_model_never_had_is_no_hindrance() -> None:
    """A role of the user's in the geometry, groups that name their rule, what is no tensor."""
    geometry, overrides = {"expert": "max"}, {"up.weight": {"role": "expert"}}
    optimizer = normopt.create("muon", Net(), geometry=geometry, overrides=overrides)
    optimizer.add_param_group({"params": nn.Linear(3, 3)})
    optimizer.add_param_group({"params": [("own", nn.Parameter(torch.ones(3)))], "norm": "max"})
    assert "role" not in optimizer.param_groups[-1]
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        optimizer.add_param_group({"params": [3]})
    with pytest.raises(ValueError, match="lr_ratio must be a finite number"):
        optimizer.add_param_group({"params": nn.Linear(3, 3), "lr_ratio": "much"})


def test_modules_come_to_copies_of_a_bare_optimizer() -> None:
    for made in (normopt.SteepestDescent(Net()), normopt.create("soap", Net())):
        for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            copied.add_param_group({"params": nn.Linear(3, 3)})
            assert by_name(copied)["weight"]["rule"] == by_name(made)["up.weight"]["rule"]


# Rates ---------------------------------------------------------------------------------------------------------------


@whole
def test_a_tensor_as_rate_is_one_for_each_group(make: Make) -> None:
    """The first group keeps the user's; also after a checkpoint, and where the user gives one tensor to two groups."""
    rate = torch.tensor(0.1, dtype=torch.float64)
    optimizer = make(Net(), lr=rate)
    shared = make([{"params": tensors(), "lr": rate}, {"params": tensors(), "lr": rate}], lr=0.1)
    for each in (optimizer, shared):
        if len({group["lr"] for group in each.param_groups if isinstance(group["lr"], torch.Tensor)}) == 0:
            continue
        saved = each.state_dict()
        for group in saved["param_groups"]:
            group["lr"] = rate
        for _ in range(2):
            rates = [group["lr"] for group in each.param_groups if isinstance(group["lr"], torch.Tensor)]
            assert len({*map(id, rates)}) == len(rates)
            each.load_state_dict(saved)


@pytest.mark.parametrize("name", normopt.list_optimizers())
def test_a_ratio_is_relative_to_the_roles_own_rate(name: str) -> None:
    """Layer-wise decay halves what every role has, whether it has a rate or a ratio of its own or neither."""
    several: list[dict[str, float]] = [{"lr": 0.02}]
    if "aux_lr" in inspect.signature(SteepestDescent.registry[name]).parameters:
        several.append({"lr": 0.02, "aux_lr": 1e-3})
    for options in several:
        plain = by_name(normopt.create(name, Net(), **options))
        # of two patterns the later wins
        overrides = {"*": {"lr_ratio": 0.1}, "*[a-z]*": {"lr_ratio": 0.5}}
        halved = by_name(normopt.create(name, Net(), **options, overrides=overrides))
        assert {options["lr"], options.get("aux_lr", options["lr"])} <= {group["lr"] for group in plain.values()}
        for key, group in halved.items():
            assert group["lr"] == pytest.approx(plain[key]["lr"] / 2)
            assert group["lr_ratio"] == pytest.approx(group["lr"] / 0.02)


def test_a_rate_in_overrides_stands_for_itself() -> None:
    overrides = {"*": {"lr": 0.1}, "head.*": {"lr": 0.2, "lr_ratio": 0.5}}
    for key, group in by_name(normopt.create("muon", Net(), lr=0.02, overrides=overrides)).items():
        assert group["lr"] == pytest.approx(0.1), key
    with pytest.raises(ValueError, match="lr_ratio must be a finite number"):
        normopt.create("muon", Net(), overrides={"*": {"lr_ratio": "much"}})


def test_a_ratio_beside_a_rate_multiplies_it() -> None:
    a, b, c = tensors()[:3]
    groups = [{"params": [a], "lr": 1e-3, "lr_ratio": 0.5}, {"params": [b], "lr_ratio": 0.5}, {"params": [c]}]
    optimizer = normopt.create("adamw", groups, lr=1e-2)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 5e-3, 1e-2]
    assert [group["lr_ratio"] for group in optimizer.param_groups] == [0.05, 0.5, 1.0]
    for bad in (-1.0, float("nan"), "much"):
        with pytest.raises(ValueError, match="lr_ratio must be a finite number"):
            optimizer.add_param_group({"params": tensors(), "lr_ratio": bad})
