"""The form and dtype of matrix products: measured once, kept with the state, the same in every process that resumes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normopt
from normopt.engine import products
from normopt.polar import choice, factor
from normopt.rule import rule_of
from tests.support.optimizers import ZOO, Make
from tests.support.paths import assert_same_path
from tests.support.steps import assert_equal, give_gradients, run, snapshot, tensors

#: Large enough to be measured.
SHAPES: list[tuple[int, ...]] = [(48, 96), (48, 48), (96, 48)]

Fast = Callable[[torch.dtype], None]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Fast:
    """``fast(dtype)`` makes this another process, on a machine on which products in that dtype are fast."""

    def become(dtype: torch.dtype) -> None:
        def seconds(short: int, long: int, dtypes: set[torch.dtype]) -> dict[torch.dtype, list[float]]:
            sizes = short**2 * long, short**3, short**2 * long
            return {each: [(1.0 if each == dtype else 9.0) * size for size in sizes] for each in dtypes}

        monkeypatch.setattr(choice, "_measured", {})
        monkeypatch.setattr(choice, "_seconds", seconds)

    monkeypatch.setattr(factor, "has_bfloat16", lambda kind: True)
    return become


def float32(shapes: list[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    return tensors(shapes, dtype=torch.float32)


def chosen(optimizer: Any) -> set[str]:
    return {group["products"] for group in optimizer.param_groups if rule_of(group).open_parts}


#: Every optimizer whose products are chosen.
OPEN = {name: make for name, make in ZOO.items() if chosen(make(tensors(), lr=0.1))}
each_open = pytest.mark.parametrize("make", OPEN.values(), ids=OPEN)


def test_which_products_are_chosen() -> None:
    names = {"muon", "muonh", "muonplus", "muonplusplus", "normuon", "adamuon", "scion", "spectraldescent", "swan"}
    assert names <= OPEN.keys() and not {"adamw", "shampoo", "muon+"} & OPEN.keys()


@each_open
def test_a_resumed_run_takes_the_same_products(make: Make, fast: Fast) -> None:
    fast(torch.bfloat16)
    params = float32()
    optimizer = make(params, lr=0.1)
    run(optimizer, params, 2)
    (text,) = chosen(optimizer)
    assert "48x48" in text and "bfloat16" in text and text == choice.to_text(choice.from_text(text))
    saved = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for p in params]
    run(optimizer, params, 2, first=2)
    fast(torch.float32)
    twins = [nn.Parameter(w) for w in weights]
    twin = make(twins, lr=0.7)
    twin.load_state_dict(saved)
    run(twin, twins, 2, first=2)
    assert_equal(snapshot(twin), snapshot(optimizer))
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert chosen(copied) == {text}


def test_a_loaded_state_goes_before_what_has_been_measured(fast: Fast) -> None:
    fast(torch.bfloat16)
    params, others = float32(), float32()
    optimizer, other = normopt.zoo.Muon(params, lr=0.1), normopt.zoo.Muon(others, lr=0.1)
    run(optimizer, params, 1)
    fast(torch.float32)
    run(other, others, 1)
    assert chosen(other) != chosen(optimizer)
    other.load_state_dict(optimizer.state_dict())
    assert chosen(other) == chosen(optimizer)
    run(other, others, 1, first=1)
    assert chosen(other) == chosen(optimizer)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoints_hold_the_choices(fast: Fast, tmp_path: Path) -> None:
    """Into a fresh optimizer, whose dry step has measured, and chosen otherwise."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, other = (nn.Sequential(nn.Linear(48, 96), nn.Linear(96, 48)) for _ in range(2))
    fast(torch.bfloat16)
    optimizer = normopt.create("muon", model, lr=0.1)
    run(optimizer, list(model.parameters()), 2)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(model.state_dict())
    fast(torch.float32)
    twin = normopt.create("muon", other, lr=0.7)
    loaded = {"optimizer": get_optimizer_state_dict(other, twin)}
    assert chosen(twin) != chosen(optimizer)
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(other, twin, loaded["optimizer"])
    assert chosen(twin) == chosen(optimizer) == {"48x96 newton-schulz: direct bfloat16"}
    run(optimizer, list(model.parameters()), 2, first=2)
    run(twin, list(other.parameters()), 2, first=2)
    assert_equal(snapshot(twin), snapshot(optimizer))


def test_a_state_from_before_there_were_choices(fast: Fast) -> None:
    fast(torch.float32)
    params = float32()
    optimizer = normopt.zoo.Muon(params, lr=0.1)
    run(optimizer, params, 1)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        del group["products"]
    twins = float32()
    twin = normopt.zoo.Muon(twins, lr=0.1)
    twin.load_state_dict(old)
    run(twin, twins, 1, first=1)
    assert chosen(twin) == chosen(optimizer)


@pytest.mark.parametrize("by_switch", [False, True])
def test_by_rule(by_switch: bool, fast: Fast) -> None:
    fast(torch.bfloat16)
    params = float32()
    optimizer = normopt.zoo.Muon(params, lr=0.1, deterministic=not by_switch)
    torch.use_deterministic_algorithms(by_switch)
    try:
        run(optimizer, params, 1)
    finally:
        torch.use_deterministic_algorithms(False)
    # Too small for bfloat16 by the rule; kept, so that the run goes on like this without the switch.
    assert chosen(optimizer) == {"48x48 newton-schulz: direct float32; 48x96 newton-schulz: gram float32"}
    assert choice._measured == {} and pickle.loads(pickle.dumps(optimizer)).is_deterministic != by_switch
    run(optimizer, params, 1, first=1)
    assert choice._measured == {}


def test_ranks_agree_on_what_one_of_them_has_measured(fast: Fast) -> None:
    fast(torch.bfloat16)
    params = float32()
    first = normopt.zoo.Muon([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)
    sent = products.choices(first.param_groups)
    wanted = {"48x48 newton-schulz": "direct bfloat16", "48x96 newton-schulz": "direct bfloat16"}
    assert sent == wanted and not first.state
    fast(torch.float32)
    others = float32()
    second = normopt.zoo.Muon([{"params": others[:1]}, {"params": others[1:]}], lr=0.1)
    products.adopt(second.param_groups, sent)
    assert chosen(first) == chosen(second)
    for optimizer, mine in ((first, params), (second, others)):
        run(optimizer, mine, 2)
    assert_equal(snapshot(second), snapshot(first))
    with pytest.raises(ValueError, match=r"products must be text like .*got '48x48 auto: fast'"):
        products.adopt(second.param_groups, {"48x48 auto": "fast"})


def test_choices_are_known_before_the_first_step_for_all_that_a_step_asks(fast: Fast) -> None:
    fast(torch.bfloat16)
    for make in OPEN.values():
        params = float32()
        optimizer = make(params, lr=0.1)
        sent = products.choices(optimizer.param_groups)
        run(optimizer, params, 2)
        assert products.choices(optimizer.param_groups) == sent


def test_products_that_cannot_be_read_are_refused_before_anything_moves() -> None:
    params = float32()
    optimizer = normopt.zoo.Muon(params, lr=0.1)
    run(optimizer, params, 1)
    bad = copy.deepcopy(optimizer.state_dict())
    bad["param_groups"][0]["products"] = "quick"
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"param group 0 .*products must be text like .*got 'quick'"):
        optimizer.load_state_dict(bad)
    with pytest.raises(ValueError, match=r"products must be text like .*got 3"):
        normopt.zoo.Muon([{"params": float32(), "products": 3}])
    assert_equal(snapshot(optimizer), before)


def test_reports_show_what_was_chosen(fast: Fast) -> None:
    fast(torch.float32)
    model = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 48), nn.Linear(48, 48), nn.Linear(48, 5))
    optimizer = normopt.create("muon", model, lr=0.1)
    assert "products" not in normopt.describe(optimizer)
    assert {row["products"] for row in normopt.summary(optimizer)} == {""}
    give_gradients(list(model.parameters()), 0)
    optimizer.step()
    rows = {row["parameter"]: row["products"] for row in normopt.summary(optimizer)}
    assert rows["0.weight"] == rows["2.weight"] == "gram float32" and rows["3.weight"] == "direct float32"
    assert rows["4.weight"] == rows["0.bias"] == ""
    line = "products    96x48: gram float32; 48x96: gram float32; 48x48: direct float32"
    assert line in normopt.describe(optimizer).splitlines()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_muon_is_torchs_within_bfloat16s_error_whatever_is_fastest(dtype: torch.dtype, fast: Fast) -> None:
    fast(dtype)
    options = {"lr": 0.02, "weight_decay": 0.1}
    theirs = lambda p: torch.optim.Muon(p, **options)  # noqa: E731
    assert_same_path(lambda p: normopt.zoo.Muon(p, **options), theirs, SHAPES, 2e-2)


def test_no_optimizer_takes_one_dtype_for_products_by_default() -> None:
    """The fastest of bfloat16's accuracy or better, or the gradients' own: any other is the slow one somewhere."""
    dtypes = {
        name: vars(cls).get("_arguments", {})["orthogonalize_dtype"].default
        for name, cls in normopt.SteepestDescent.registry.items()
        if "orthogonalize_dtype" in vars(cls).get("_arguments", {})
    }
    assert {"muon", "muon2", "olion", "muoneq"} <= {name for name, dtype in dtypes.items() if dtype == "auto"}
    assert {*dtypes.values()} == {"auto", None}


def test_a_step_leaves_random_numbers_alone() -> None:
    params = float32([(64, 80), (56, 56)])
    optimizer = normopt.zoo.Muon(params, lr=0.1)
    give_gradients(params, 0)
    before = torch.get_rng_state()
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)
