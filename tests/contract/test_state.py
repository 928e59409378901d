"""States: their version, what is checked when they are loaded, and those of torch.optim."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import normopt
from normopt import SteepestDescent, zoo
from normopt.engine.checkpoint import VERSION
from normopt.engine.plan import state_shapes
from normopt.rule import rule_of
from tests.support.models import Net
from tests.support.optimizers import EVERY, ZOO
from tests.support.steps import assert_equal, give_gradients, run, snapshot, tensors

Make = Callable[..., SteepestDescent]
ALL: dict[str, Make] = {**EVERY, "stormplus": partial(normopt.create, "stormplus")}
every = pytest.mark.parametrize("make", ALL.values(), ids=ALL)
NAMES = ["a", "b", "c", "d"]


def named(params: list[Tensor]) -> list[tuple[str, Tensor]]:
    return list(zip(NAMES, params, strict=True))


def trained(make: Make, steps: int = 2, **options: Any) -> tuple[list[Tensor], SteepestDescent]:
    params = tensors()
    optimizer = make(named(params), lr=0.1, **options)
    run(optimizer, params, steps)
    return params, optimizer


def versions(groups: list[dict[str, Any]]) -> set[Any]:
    return {group["state_version"] for group in groups}


def without_version(state: dict[str, Any]) -> dict[str, Any]:
    """As it was written before states had a version."""
    old = copy.deepcopy(state)
    for group in old["param_groups"]:
        del group["state_version"], group["nonfinite"]
    return old


# Versions --------------------------------------------------------------------------------------------------------


@every
def test_the_version_survives_every_way_of_saving(make: Make, tmp_path: Path) -> None:
    _, optimizer = trained(make)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    loaded = make(named(tensors()), lr=0.5)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for each in (optimizer, loaded, *copies):
        assert versions(each.state_dict()["param_groups"]) == {VERSION}


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("name", ["adamw", "muon", "prodigy", "soap"])
def test_the_version_survives_distributed_checkpoints(name: str, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, other = Net(), Net()
    first, second = normopt.create(name, model, nonfinite="skip"), normopt.create(name, other)
    run(first, list(model.parameters()), 2)
    saved = copy.deepcopy(get_optimizer_state_dict(model, first, options=options))
    set_optimizer_state_dict(other, second, saved, options=options)
    other.load_state_dict(model.state_dict())
    assert versions(second.param_groups) == {VERSION}
    assert {group["nonfinite"] for group in second.param_groups} == {"skip"}
    assert_equal(snapshot(second), snapshot(first))


@every
def test_states_without_a_version_are_loaded(make: Make) -> None:
    params, optimizer = trained(make)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    twin = make(named(others), lr=0.5)
    twin.load_state_dict(without_version(optimizer.state_dict()))
    assert_equal(snapshot(twin), snapshot(optimizer))
    run(optimizer, params, 1)
    run(twin, others, 1)
    assert_equal(snapshot(twin), snapshot(optimizer))


def test_optimizers_that_were_pickled_before_there_was_a_version() -> None:
    params, optimizer = trained(ZOO["adamw"])
    old = optimizer.__getstate__()
    old["param_groups"] = [dict(group) for group in old["param_groups"]]
    for group in old["param_groups"]:
        del group["state_version"], group["nonfinite"], group["capturable"], group["state_dtype"]
    old["defaults"] = {k: v for k, v in old["defaults"].items() if k not in ("nonfinite", "capturable", "state_dtype")}
    fresh = object.__new__(type(optimizer))
    fresh.__setstate__(old)
    run(fresh, params, 1)
    fresh.add_param_group({"params": [("added", tensors([(3, 3)])[0])]})
    assert versions(fresh.param_groups) == {VERSION}


def test_options_that_a_state_does_not_know_stay_what_they_are() -> None:
    _, optimizer = trained(ZOO["lion"])
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["state_version"], group["nonfinite"], group["capturable"], group["state_dtype"]
    fresh = ZOO["lion"](tensors(), capturable=True, state_dtype="bfloat16", nonfinite="skip")
    fresh.load_state_dict(state)
    group = fresh.param_groups[0]
    assert (group["capturable"], group["state_dtype"], group["nonfinite"]) == (True, "bfloat16", "skip")


# What is checked at load time ------------------------------------------------------------------------------------


def refuse(optimizer: SteepestDescent, state: dict[str, Any], message: str) -> None:
    before, saved = snapshot(optimizer), copy.deepcopy(state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_equal(snapshot(optimizer), before)
    assert_equal(state, saved)


@every
def test_states_of_other_shapes_are_refused_by_name(make: Make) -> None:
    """Wherever an optimizer keeps a state that has the parameter's size."""
    others = tensors([(6, 4), (4, 6), (4, 7), (2, 5, 3, 1)])
    other = make(named(others), lr=0.1)
    run(other, others, 2)
    _, optimizer = trained(make)
    if any(len(state) > 1 for state in other.state_dict()["state"].values()):
        refuse(optimizer, other.state_dict(), r"parameter 'c': the saved state '.*7.* where it needs .*another model")
    else:
        optimizer.load_state_dict(other.state_dict())


def test_states_of_every_other_optimizer_are_refused() -> None:
    """On the same model; what differs is an ingredient of a param group, or their number."""
    model = Net()
    optimizers = {name: normopt.create(name, model) for name in normopt.list_optimizers()}
    states = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
    differs = r"param group \d does not match the saved one: .* is .* here, .* in the saved state|param groups, this"
    for name, optimizer in optimizers.items():
        for other in states.keys() - {name}:
            with pytest.raises(ValueError, match=differs):
                optimizer.load_state_dict(states[other])


def spoiled(state: dict[str, Any], **group: Any) -> dict[str, Any]:
    state = copy.deepcopy(state)
    state["param_groups"][0].update(group)
    return state


def test_what_differs_is_named() -> None:
    _, optimizer = trained(ZOO["adamw"])
    good = optimizer.state_dict()
    refuse(optimizer, {"state": {}}, "a saved state has 'state' and 'param_groups', this one has .'state'.")
    refuse(
        optimizer, spoiled(good, state_version=VERSION + 1), f"state version {VERSION + 1}, this is {VERSION}; upgrade"
    )
    refuse(optimizer, spoiled(good, state_version="1"), "state version 1")
    refuse(optimizer, spoiled(good, lr=-1.0), "lr must be")
    refuse(optimizer, spoiled(good, betas=(0.9, 1.5)), "beta must lie in")
    refuse(optimizer, spoiled(good, nonfinite="never"), "unknown nonfinite 'never'")
    refuse(optimizer, spoiled(good, param_names=["b", "a", "c", "d"]), "another order, 'a' here where 'b' was")
    refuse(optimizer, spoiled(good, params=[0, 1, 2]), "4 parameters here, 3 there")
    for value in (0.5, None, "zeros"):
        broken = spoiled(good)
        broken["state"][1]["momentum"] = value
        refuse(optimizer, broken, "parameter 'b': the saved state 'momentum' has no shape")
    stepless = spoiled(good)
    del stepless["state"][3]["step"]
    refuse(optimizer, stepless, "parameter 'd': its saved state has no 'step'")
    several = ZOO["adamw"]([{"params": [p]} for p in tensors()]).state_dict()
    refuse(optimizer, several, "the saved state has 4 param groups, this optimizer 1")


@every
def test_what_a_saved_group_does_not_say_stays_what_it_is(make: Make) -> None:
    """Whatever has a default, ``maximize`` and ``lr`` among them; a count of steps may be a plain number."""
    params, optimizer = trained(make)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    twin = make(named(others), lr=0.1)
    state = optimizer.state_dict()
    found = {name for group in optimizer.param_groups for name in rule_of(group).step_size.init_shared()}
    keep = {"params", "param_names", "rule", *found}
    old = {
        "state": {key: {**held, "step": int(held["step"])} for key, held in state["state"].items()},
        "param_groups": [{k: v for k, v in group.items() if k in keep} for group in state["param_groups"]],
    }
    twin.load_state_dict(old)
    assert_equal(snapshot(twin), snapshot(optimizer))
    if not any(rule_of(group).momentum.looks_back for group in optimizer.param_groups):
        run(optimizer, params, 1)
        run(twin, others, 1)
        assert_equal(snapshot(twin), snapshot(optimizer))


def test_flattened_and_sharded_states_say_so() -> None:
    """FSDP and ZeRO keep vectors in place of matrices: one for several parameters, or one for each."""
    params, optimizer = trained(ZOO["adamw"])
    flat = {key: {name: x.flatten() if x.ndim else x for name, x in s.items()} for key, s in optimizer.state.items()}
    state = optimizer.state_dict()
    state["state"] = dict(enumerate(flat.values()))
    refuse(optimizer, state, "only vectors, for 4 parameters.*FSDP or ZeRO has flattened it.*full_state_dict=True")
    one = {name: torch.cat([s[name].flatten() for s in flat.values()]) for name in ("momentum", "second_moment")}
    state["state"] = {0: {"step": torch.tensor(2.0), **one}}
    state["param_groups"][0] |= {"params": [0], "param_names": ["_flat_param"]}
    refuse(optimizer, state, "only vectors, for 1 parameters, where this optimizer has 4 with matrices.*flattened")
    theirs = [nn.Parameter(torch.zeros(sum(p.numel() for p in params)))]
    reference = torch.optim.AdamW(theirs)
    run(reference, theirs, 1)
    with pytest.raises(ValueError, match="FSDP or ZeRO has flattened it"):
        normopt.from_torch_state(optimizer, reference.state_dict())
    DTensor = type("DTensor", (Tensor,), {})
    sharded = optimizer.state_dict()
    sharded["state"][1] = {**sharded["state"][1], "momentum": torch.zeros(4, 6).as_subclass(DTensor)}
    with pytest.raises(ValueError, match="'momentum' of parameter 1 is sharded, a DTensor"):
        optimizer.load_state_dict(sharded)
    refuse(optimizer, {"state.a.step": torch.tensor(1.0)}, "flatten_optimizer_state_dict=True")


def test_the_numbers_of_the_whole_optimizer_must_be_there() -> None:
    _, optimizer = trained(ZOO["prodigy"])
    refuse(optimizer, spoiled(optimizer.state_dict(), d=None), "d must be a tensor with one entry, got None")


def test_other_names_are_no_other_model() -> None:
    """Wrappers put prefixes before them."""
    _, optimizer = trained(ZOO["adamw"])
    optimizer.load_state_dict(spoiled(optimizer.state_dict(), param_names=[f"module.{name}" for name in NAMES]))


def test_state_that_is_not_there_begins_anew() -> None:
    """That of parameters which had no gradient, and that of options which were switched on later."""
    params, optimizer = trained(ZOO["adamw"])
    state = spoiled(optimizer.state_dict(), amsgrad=True)
    del state["state"][2]
    optimizer.load_state_dict(state)
    run(optimizer, params, 1)
    assert [optimizer.state[p]["step"].item() for p in params] == [3, 3, 1, 3]


def test_what_is_loaded_shares_no_memory() -> None:
    params, optimizer = trained(ZOO["prodigy"])
    others = [nn.Parameter(p.detach().clone()) for p in params]
    twin = ZOO["prodigy"](named(others))
    twin.load_state_dict(optimizer.state_dict())
    before = snapshot(twin)
    run(optimizer, params, 2)
    assert_equal(snapshot(twin), before)


def test_hooks_may_make_a_state_fit() -> None:
    _, optimizer = trained(ZOO["adamw"])
    state = optimizer.state_dict()
    state["param_groups"][0]["rule"] = "written by something else"

    def repair(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "rule": optimizer.param_groups[0]["rule"], "lr": 0.7} for group in given["param_groups"]]
        return {**given, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(repair)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.7


@every
@pytest.mark.parametrize("shape", [(3, 2), (2, 5), (4, 1), (2, 3, 2, 2), (0, 3)], ids=str)
def test_expected_shapes_are_those_of_the_state(make: Make, shape: tuple[int, ...]) -> None:
    p = tensors([shape])[0]
    optimizer = make([p], lr=0.1)
    run(optimizer, [p], 2)
    group = optimizer.param_groups[0]
    found = {name: tuple(value.shape) for name, value in optimizer.state[p].items() if name != "step"}
    assert state_shapes(p, rule_of(group).at(group)) == found


# States of torch.optim -------------------------------------------------------------------------------------------

MATRICES = [(6, 4), (4, 6), (5, 5)]
#: torch's class with its options, and ours.
SWITCHES: dict[str, tuple[type, dict[str, Any], Make, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"betas": (0.8, 0.95), "weight_decay": 0.2, "eps": 1e-6}, zoo.AdamW, {}),
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True}, zoo.AdamW, {}),
    "foreach": (torch.optim.AdamW, {"foreach": True, "maximize": True}, zoo.AdamW, {}),
    "fused": (torch.optim.AdamW, {"fused": True}, zoo.AdamW, {}),
    "capturable": (torch.optim.AdamW, {"lr": torch.tensor(0.01)}, zoo.AdamW, {}),
    "adam": (torch.optim.Adam, {"weight_decay": 0.1}, zoo.Adam, {}),
    "adam without decay": (torch.optim.Adam, {}, zoo.AdamW, {}),
    "sgd": (torch.optim.SGD, {}, zoo.SGD, {"momentum": 0.5}),
    "heavy ball": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}, zoo.SGD, {}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, zoo.SGD, {}),
    "momentum of 1": (torch.optim.SGD, {"momentum": 1.0}, zoo.SGD, {}),
    "muon": (torch.optim.Muon, {"momentum": 0.8}, zoo.Muon, {}),
    "moonlight": (torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw", "nesterov": False}, zoo.Muon, {}),
    "muon's steps": (torch.optim.Muon, {"ns_steps": 3}, zoo.Muon, {"ns_steps": 3}),
    "muon's iteration": (
        torch.optim.Muon,
        {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 8},
        zoo.Muon,
        {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 8},
    ),
}


def torch_steps(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: int, first: int = 0) -> None:
    for i in range(first, first + steps):
        give_gradients(params, i)
        optimizer.step()


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_run_goes_on_as_under_torch(switch: str, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five steps of torch, then five more of each."""
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)  # what torch.optim.Muon casts with
    cls, options, make, ours = SWITCHES[switch]
    dtype = torch.float32
    theirs = tensors(MATRICES, dtype)
    split = [{"params": theirs[:1], "lr": 0.03}, {"params": theirs[1:]}]
    reference = cls(split if groups == 2 else theirs, **{"lr": 0.01, **options})
    schedule = torch.optim.lr_scheduler.ExponentialLR(reference, 0.9)
    torch_steps(reference, theirs, 5)
    schedule.step()
    params = [nn.Parameter(p.detach().clone()) for p in theirs]
    extra = {"orthogonalize_dtype": "float32"} if cls is torch.optim.Muon else {}
    if "adjust_lr_fn" in options:
        extra["adjust_lr_fn"] = options["adjust_lr_fn"]
    optimizer = make([{"params": params[:1]}, {"params": params[1:]}] if groups == 2 else params, **ours, **extra)
    saved = reference.state_dict()
    kept = copy.deepcopy(saved)
    normopt.from_torch_state(optimizer, saved)
    assert_equal(saved, kept)
    torch_steps(reference, theirs, 5, first=5)
    torch_steps(optimizer, params, 5, first=5)
    assert_equal([p.detach() for p in params], [p.detach() for p in theirs], 1e-6)
    assert optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]
    assert optimizer.param_groups[0]["initial_lr"] == reference.param_groups[0]["initial_lr"]


def test_half_states_of_torch_become_float32() -> None:
    theirs = tensors(MATRICES, torch.bfloat16)
    reference = torch.optim.AdamW(theirs)
    torch_steps(reference, theirs, 2)
    params = [nn.Parameter(p.detach().clone()) for p in theirs]
    optimizer = zoo.AdamW(params)
    normopt.from_torch_state(optimizer, reference.state_dict())
    torch_steps(optimizer, params, 1, first=2)
    torch_steps(reference, theirs, 1, first=2)
    assert optimizer.state[params[0]]["momentum"].dtype == torch.float32
    assert_equal([p.detach() for p in params], [p.detach() for p in theirs], 1e-2)


def test_parameters_without_state_and_the_way_back_to_a_scheduler() -> None:
    theirs, params = tensors(), tensors()
    reference = torch.optim.AdamW(named(theirs), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(reference, 0.2, 10)
    torch_steps(reference, theirs[:2], 3)
    schedule.step()
    optimizer = zoo.AdamW(named(params))
    normopt.from_torch_state(optimizer, reference.state_dict())
    assert set(optimizer.state) == set(params[:2])
    again = torch.optim.lr_scheduler.OneCycleLR(zoo.AdamW(tensors()), 0.2, 10)
    again.optimizer = optimizer
    again.load_state_dict(schedule.state_dict())
    for each, steps in ((again, optimizer), (schedule, reference)):
        torch_steps(steps, params if steps is optimizer else theirs, 1)
        each.step()
    for key in ("lr", "betas", "max_lr", "base_momentum"):
        assert optimizer.param_groups[0][key] == reference.param_groups[0][key]


MISMATCHES: dict[str, tuple[Callable[[list[Tensor]], Any], Make, str]] = {
    "class": (torch.optim.RMSprop, zoo.RMSprop, "only states of torch.optim's AdamW, Adam, Muon and SGD"),
    "nadam": (torch.optim.NAdam, zoo.NAdam, "only states of"),
    "another rule": (torch.optim.AdamW, zoo.Lion, "norm is .* here, Smoothed"),
    "decay": (partial(torch.optim.Adam, weight_decay=0.1), zoo.AdamW, "constraint is .*WeightDecay.* here, .*L2"),
    "cautious": (torch.optim.AdamW, partial(zoo.AdamW, cautious=True), "cautious=True"),
    "scale": (partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"), zoo.Muon, "max1.* here, .*adamw"),
    "iteration": (partial(torch.optim.Muon, ns_steps=3), zoo.Muon, "steps=None.* here, .*steps=3"),
    "coefficients": (partial(torch.optim.Muon, ns_coefficients=(2.0, -1.5, 0.5)), zoo.Muon, "norm is"),
    "not spectral": (torch.optim.Muon, partial(SteepestDescent, norm="max", momentum=0.9), "norm is Max"),
    "groups": (lambda p: torch.optim.AdamW([{"params": [x]} for x in p]), zoo.AdamW, "cannot go to groups of"),
    "fewer": (lambda p: torch.optim.AdamW(p[:2]), zoo.AdamW, "build the optimizer on the same parameters"),
    "shapes": (lambda p: torch.optim.AdamW([*p[1:], p[0]]), zoo.AdamW, r"the saved state '.*' has shape \(4, 6\)"),
}


@pytest.mark.parametrize("kind", MISMATCHES)
def test_what_would_not_go_on_is_refused(kind: str) -> None:
    theirs, make, message = MISMATCHES[kind]
    old = tensors(MATRICES)
    reference = theirs(old)
    torch_steps(reference, old, 1)
    params = tensors(MATRICES)
    optimizer = make(params)
    run(optimizer, params, 1)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        normopt.from_torch_state(optimizer, reference.state_dict())
    assert_equal(snapshot(optimizer), before)


def test_names_must_agree_where_both_have_them() -> None:
    reference = torch.optim.AdamW(named(tensors()))
    optimizer = zoo.AdamW(list(zip("abdc", tensors(), strict=True)))
    with pytest.raises(ValueError, match="the parameter 'd' stands where the saved state has 'c'"):
        normopt.from_torch_state(optimizer, reference.state_dict())


def test_unknown_states_are_refused() -> None:
    old = tensors(MATRICES)
    reference = torch.optim.AdamW(old)
    torch_steps(reference, old, 1)
    state = reference.state_dict()
    state["state"][1]["exp_avg_cubed"] = torch.zeros(4, 6)
    with pytest.raises(ValueError, match="parameter 1 of its group has an unknown state 'exp_avg_cubed'"):
        normopt.from_torch_state(zoo.AdamW(tensors(MATRICES)), state)
