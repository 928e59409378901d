"""Saving and loading, to the bit."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normopt
from tests.support.models import Net
from tests.support.optimizers import ALL, Make, everyone, whole
from tests.support.steps import assert_equal, run, snapshot, tensors


def plain(x: Any) -> bool:
    if isinstance(x, dict):
        return all(isinstance(k, (str, int)) and plain(v) for k, v in x.items())
    if isinstance(x, (list, tuple)):
        return all(map(plain, x))
    return x is None or type(x) in (Tensor, int, float, str, bool)


@everyone
def test_state_dicts_are_plain_data(make: Make) -> None:
    params = tensors()
    optimizer = make(params, lr=0.1)
    run(optimizer, params, 1)
    assert plain(optimizer.state_dict())
    assert all(g["rule"] == repr(normopt.ingredient.parse(g["rule"])) for g in optimizer.param_groups)


@everyone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loading_restores_every_bit(make: Make, dtype: torch.dtype, tmp_path: Path) -> None:
    params = tensors(dtype=dtype)
    optimizer = make(params, lr=0.1)
    run(optimizer, params, 3)
    torch.save([[p.detach() for p in params], optimizer.state_dict()], tmp_path / "saved.pt")
    weights, state = torch.load(tmp_path / "saved.pt", weights_only=True)
    others = [nn.Parameter(w) for w in weights]
    twin = make(others, lr=0.7)
    twin.load_state_dict(state)
    assert_equal(snapshot(twin), snapshot(optimizer))
    floating = [v for s in twin.state_dict()["state"].values() for v in s.values() if v.is_floating_point()]
    assert all(v.dtype == torch.float32 for v in floating)
    run(optimizer, params, 2, first=3)
    run(twin, others, 2, first=3)
    assert_equal(snapshot(twin), snapshot(optimizer))
    run(twin, others, 1)
    assert_equal(optimizer.state_dict()["state"][0]["step"], torch.tensor(5.0))  # no memory is shared


def resume(path: str) -> None:
    """In a new process: load every optimizer's checkpoint, take two more steps, save."""
    saved = torch.load(path, weights_only=True)
    for name, (kind, weights, state) in saved.items():
        params = [nn.Parameter(w) for w in weights]
        optimizer = ALL[name](params, lr=0.7)
        optimizer.load_state_dict(state)
        run(optimizer, params, 2, first=2)
        saved[name] = kind, [p.detach() for p in params], optimizer.state_dict()
    torch.save(saved, path)


def test_resume_in_a_new_process_is_exact(tmp_path: Path) -> None:
    assert {*normopt.list_optimizers()} <= ALL.keys()
    path, saved, expected = tmp_path / "all.pt", {}, {}
    for i, (name, make) in enumerate(ALL.items()):
        params = tensors(dtype=(torch.float32, torch.bfloat16)[i % 2])
        optimizer = make(params, lr=0.1)
        run(optimizer, params, 2)
        saved[name] = copy.deepcopy((type(optimizer).__name__, [p.detach() for p in params], optimizer.state_dict()))
        run(optimizer, params, 2, first=2)
        expected[name] = type(optimizer).__name__, [p.detach() for p in params], optimizer.state_dict()
    torch.save(saved, path)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, __file__, str(path)], check=True, cwd=root, env=environment)
    assert_equal(torch.load(path, weights_only=True), expected)


@everyone
def test_loading_other_ingredients_names_them_and_changes_nothing(make: Make) -> None:
    params = tensors()
    optimizer = make(params, lr=0.1)
    run(optimizer, params, 2)
    before = snapshot(optimizer)
    other = make([{"params": tensors(), "norm": "Nuclear(2.5)", "constraint": "WeightDecay(0.25)"}], lr=0.2)
    with pytest.raises(ValueError, match=r"constraint is .*0\.25.*norm is .* here, Nuclear\(scale=2\.5"):
        optimizer.load_state_dict(other.state_dict())
    foreign = torch.optim.SGD(tensors(), lr=0.2)
    with pytest.raises(ValueError, match="another library"):
        optimizer.load_state_dict(foreign.state_dict())
    with pytest.raises(ValueError, match="group"):
        optimizer.load_state_dict(make([{"params": [p]} for p in tensors()], lr=0.2).state_dict())
    with pytest.raises(ValueError, match="group"):
        optimizer.load_state_dict(make(tensors()[:3], lr=0.2).state_dict())
    assert_equal(snapshot(optimizer), before)


@pytest.mark.parametrize("weights_first", [False, True])
@whole
def test_distributed_checkpoints_round_trip_by_name(make: Make, weights_first: bool) -> None:
    """Into a fresh optimizer, whose dry step with lr 0 and zero gradients leaves weights and later steps alone."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, other = Net(), Net()
    optimizer = make(model, lr=0.05)
    run(optimizer, list(model.parameters()), 2)
    if weights_first:
        other.load_state_dict(model.state_dict())
    twin = make(other, lr=0.7)
    weights = copy.deepcopy(other.state_dict())
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    assert set(saved["state"]) == {name for name, _ in model.named_parameters()}
    set_optimizer_state_dict(other, twin, saved)
    assert_equal(copy.deepcopy(dict(other.state_dict())), dict(weights))
    other.load_state_dict(model.state_dict())
    assert_equal(snapshot(twin), snapshot(optimizer))
    run(optimizer, list(model.parameters()), 2, first=2)
    run(twin, list(other.parameters()), 2, first=2)
    assert_equal(snapshot(twin), snapshot(optimizer))


if __name__ == "__main__":
    resume(sys.argv[1])
