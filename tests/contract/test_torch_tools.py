"""torch's tools around an optimizer: hooks, copies, GradScaler, autocast, averaged models."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.models import Net
from tests.support.optimizers import ZOO, Make, every, everyone, whole, zoo
from tests.support.steps import assert_equal, run, snapshot, tensors


@zoo
def test_trains_a_whole_model(make: Make) -> None:
    model = Net()
    free = make in (ZOO["prodigy"], ZOO["dadaptadam"])  # which multiply lr by an estimate that begins at d0
    optimizer = make(model, lr=1.0, d0=0.01, growth_rate=1.02) if free else make(model, lr=0.02)
    held = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(held) == sorted(name for name, _ in model.named_parameters())
    before = model.loss().item()
    for _ in range(12):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
    assert model.loss().item() < before - 0.02


@everyone
def test_hooks(make: Make) -> None:
    params, calls = tensors(), []
    optimizer = make(params, lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    run(optimizer, params, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["pre", "post", "saved", "loaded"]


@every
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on_like_the_original_and_apart_from_it(make: Make, copied: Callable[[Any], Any]) -> None:
    params = tensors()
    optimizer = make(params, lr=0.1)
    run(optimizer, params, 2)
    twin = copied(optimizer)
    assert type(twin) is type(optimizer)
    others = [p for group in twin.param_groups for p in group["params"]]
    before = snapshot(twin)
    run(optimizer, params, 2, first=2)
    assert_equal(snapshot(twin), before)
    run(twin, others, 2, first=2)
    assert_equal(snapshot(twin), snapshot(optimizer))
    twin.add_param_group({"params": tensors([(3, 3)])})


@everyone
def test_repr_shows_the_rule_and_the_options(make: Make) -> None:
    optimizer = make(tensors(), lr=0.1)
    text = repr(optimizer)
    assert text.startswith(type(optimizer).__name__) and "lr: 0.1" in text and "rule: Rule(" in text


@zoo
def test_grad_scaler(make: Make) -> None:
    """Scaled losses give the same step, and a step with an overflow is skipped."""
    a, b = Net(), Net()
    b.load_state_dict(a.state_dict())
    first, second = make(a, lr=0.05), make(b, lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(a.loss()).backward()
    scaler.step(first)
    scaler.update()
    b.loss().backward()
    second.step()
    assert_equal([p.detach() for p in a.parameters()], [p.detach() for p in b.parameters()])
    before = snapshot(first)
    a.head.weight.grad[0, 0] = torch.inf
    scaler.scale(torch.zeros((), requires_grad=True)).backward()
    scaler.step(first)
    scaler.update()
    assert_equal(snapshot(first), before)
    assert scaler.get_scale() == 512.0


@whole
def test_averaged_models(make: Make) -> None:
    model = Net()
    optimizer = make(model, lr=0.05)
    utils = torch.optim.swa_utils
    mean = utils.AveragedModel(model, use_buffers=True)
    recent = utils.AveragedModel(model, multi_avg_fn=utils.get_ema_multi_avg_fn(0.5))
    points = []
    for i in range(2):
        run(optimizer, list(model.parameters()), 1, first=i)
        mean.update_parameters(model)
        recent.update_parameters(model)
        points.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    for average in (mean, recent):
        found = torch.nn.utils.parameters_to_vector(average.parameters())
        torch.testing.assert_close(found, (points[0] + points[1]) / 2)


@whole
def test_autocast(make: Make) -> None:
    """The losses of a model in bfloat16; weights, gradients and state stay float32. A step inside is the same."""
    a, b = Net(), Net()
    b.load_state_dict(a.state_dict())

    def closure(model: Net) -> None:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.loss()
        loss.backward()

    first, second = make(a, lr=0.05), make(b, lr=0.05)
    for _ in range(2):
        first.step(lambda: closure(a))
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):  # the cache would keep old weights
            second.step(lambda: closure(b))
    assert_equal(snapshot(first), snapshot(second))
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in a.parameters())
    assert all(x.dtype == torch.float32 for state in first.state.values() for x in state.values())
