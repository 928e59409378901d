"""What a step does with gradients, present and absent, and with the numbers of its param groups."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.support.models import Net
from tests.support.optimizers import Make, every, everyone, local_at_once, whole
from tests.support.steps import SHAPES, assert_equal, give_gradients, run, snapshot, tensors


@every
def test_learns(make: Make) -> None:
    """Half a squared distance falls, to points that are no farther from 0 than the start."""
    params = tensors()
    targets = [t.detach() * p.detach().norm() / t.detach().norm() for p, t in zip(params, tensors(seed=1), strict=True)]

    def gaps() -> list[Tensor]:
        return [p.detach() - t for p, t in zip(params, targets, strict=True)]

    optimizer = make(params, lr=1e-3)
    before = torch.cat([gap.flatten() for gap in gaps()]).norm()
    for _ in range(20):
        for p, gap in zip(params, gaps(), strict=True):
            p.grad = gap
        optimizer.step()
    assert torch.cat([gap.flatten() for gap in gaps()]).norm() < before


@everyone
@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_lr(make: Make, shape: tuple[int, ...]) -> None:
    a, b = tensors(), tensors()
    first, second = make(a, lr=torch.full(shape, 0.125)), make(b, lr=0.125)
    for lr in (0.125, 0.0625, 0.0):
        first.param_groups[0]["lr"].fill_(lr)
        second.param_groups[0]["lr"] = lr
        run(first, a, 1)
        run(second, b, 1)
    assert_equal(a, b, 1e-6)  # the tensor is a float32


@every
def test_maximize_is_minimize_with_the_other_sign(make: Make) -> None:
    a, b = tensors(), tensors()
    up, down = make(a, lr=0.1, maximize=True), make(b, lr=0.1)
    for i in range(3):
        give_gradients(a, i)
        for p, q in zip(a, b, strict=True):
            q.grad = -p.grad
        up.step()
        down.step()
    assert_equal(a, b)


@every
def test_closure_runs_once_with_gradients_enabled(make: Make) -> None:
    params, calls = tensors(), []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    optimizer, before = make(params, lr=0.1), [p.detach().clone() for p in params]
    loss = optimizer.step(closure)
    assert calls == [True] and loss.item() == sum(float(p.square().sum()) for p in before)
    with torch.no_grad():
        optimizer.step(closure)
    assert calls == [True, True] and all((p != q).any() for p, q in zip(params, before, strict=True))
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    assert optimizer.step() is None


@every
def test_without_gradients_nothing_happens(make: Make) -> None:
    optimizer = make(tensors(), lr=0.1)
    before = snapshot(optimizer)
    optimizer.step()
    assert_equal(snapshot(optimizer), before)


@local_at_once
def test_parameters_appear_and_disappear(make: Make) -> None:
    """Each moves as in an optimizer of its own that only steps when it has a gradient."""
    present = [(1, 1, 1, 1), (0, 1, 1, 1), (1, 0, 1, 0), (0, 0, 0, 0), (1, 1, 1, 1), (1, 1, 0, 1)]
    together, apart = tensors(), tensors()
    optimizer, alone = make(together, lr=0.1), [make([p], lr=0.1) for p in apart]
    for i, there in enumerate(present):
        give_gradients(together, i)
        give_gradients(apart, i)
        for p, here, single in zip(together, there, alone, strict=True):
            if here:
                single.step()
            else:
                p.grad = None
        optimizer.step()
    states = [optimizer.state_dict()["state"][i] for i in range(len(together))]
    loose = 1e-2 if "bfloat16" in optimizer.param_groups[0]["rule"] else 1e-12
    assert_equal(together, apart, loose)
    assert_equal(states, [single.state_dict()["state"][0] for single in alone], 1e-12)


@whole
def test_what_has_no_gradient_stays(make: Make) -> None:
    """Weights, state and the number of steps; first one, then all, then none of them. Also when frozen in between."""
    params = tensors()
    optimizer = make(params, lr=0.1)
    run(optimizer, params, 2)
    for i, missing in enumerate((params[:1], params)):
        before, states = [p.detach().clone() for p in missing], [copy.deepcopy(optimizer.state[p]) for p in missing]

        def closure(seed: int = i + 2, missing: list[Tensor] = missing) -> None:
            give_gradients(params, seed)
            for p in missing:
                p.requires_grad_(False).grad = None

        optimizer.step(closure)
        assert_equal([p.detach() for p in missing], before)
        assert_equal([optimizer.state[p] for p in missing], states)
        for p in params:
            p.requires_grad_(True)
    before = [p.detach().clone() for p in params]
    run(optimizer, params, 1, first=4)
    assert all((p != q).any() for p, q in zip(params, before, strict=True))
    assert [optimizer.state[p]["step"] - optimizer.state[params[0]]["step"] for p in params] == [0, 1, 1, 1]


@every
def test_frozen_for_a_while(make: Make) -> None:
    params = tensors()
    optimizer = make(params, lr=0.1)
    run(optimizer, params, 1)
    params[0].requires_grad_(False)
    params[0].grad = None
    before = params[0].detach().clone()
    give_gradients(params[1:], 1)
    optimizer.step()
    assert torch.equal(params[0], before)
    params[0].requires_grad_(True)
    run(optimizer, params, 1)
    assert not torch.equal(params[0], before)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_and_bystanders_are_never_modified(make: Make, dtype: torch.dtype) -> None:
    for shapes in ([(6, 4)], SHAPES):  # a batch of one may share memory with its gradient
        params = tensors([*shapes, (3, 3)], dtype)
        optimizer, bystander = make(params[:-1], lr=0.1), params[-1].detach().clone()
        for i in range(3):
            give_gradients(params, i)
            gradients = [p.grad.clone() for p in params]
            optimizer.step()
            assert_equal([p.grad for p in params], gradients)
        assert torch.equal(params[-1], bystander)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_state_shares_no_memory_with_weights_and_gradients(make: Make, dtype: torch.dtype) -> None:
    for shapes in ([(6, 4)], SHAPES):  # a batch of one may share memory with its gradient
        params = tensors(shapes, dtype=dtype)
        optimizer = make(params, lr=0.1)
        run(optimizer, params, 2)
        before = copy.deepcopy(optimizer.state_dict()["state"])
        for p in params:
            p.detach().zero_()
            p.grad.zero_()
        assert_equal(optimizer.state_dict()["state"], before)


@everyone
def test_the_same_run_twice_is_equal_to_the_bit(make: Make) -> None:
    results = []
    for _ in range(2):
        params = tensors(dtype=torch.float32)
        optimizer = make(params, lr=0.1)
        run(optimizer, params, 3)
        results.append(snapshot(optimizer))
    assert_equal(*results)


@everyone
def test_lr_zero_stops(make: Make) -> None:
    params = tensors()
    optimizer = make(params, lr=0.1)
    run(optimizer, params, 2)
    before = [p.detach().clone() for p in params]
    for zero in (0.0, 0, torch.tensor(0.0)):
        optimizer.param_groups[0]["lr"] = zero
        run(optimizer, params, 1)
    assert_equal([p.detach() for p in params], before)


@whole
def test_options_may_change_between_steps(make: Make) -> None:
    """Momentum from and to zero, AMSGrad switched on: state comes when it is needed."""
    params = tensors()
    optimizer = make(params, lr=0.1)
    changes = {"momentum": (0.0, 0.5), "betas": ((0.0, 0.5, 0.6), (0.5, 0.9, 0.99)), "amsgrad": (False, True)}
    for i in range(4):
        optimizer.param_groups[0].update({k: v[i % 2] for k, v in changes.items() if k in optimizer.param_groups[0]})
        run(optimizer, params, 2, first=i)
    assert all(torch.isfinite(p).all() for p in params)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, params, 1)


@whole
def test_gradients_may_be_accumulated(make: Make) -> None:
    """Over two halves of the loss, whose sum is exact, whatever ``zero_grad`` leaves behind."""
    a, b = Net(), Net()
    b.load_state_dict(a.state_dict())
    first, second = make(a, lr=0.05), make(b, lr=0.05)

    def at_once() -> None:
        first.zero_grad()
        a.loss().backward()

    def in_halves() -> None:
        second.zero_grad(set_to_none=False)
        for _ in range(2):
            (b.loss() / 2).backward()

    for _ in range(3):
        first.step(at_once)
        second.step(in_halves)
    assert_equal([p.detach() for p in a.parameters()], [p.detach() for p in b.parameters()])


@whole
def test_tied_parameters_move_once(make: Make) -> None:
    """And by the gradient of both places; they stay tied, in copies of model and optimizer too."""
    model = Net()
    model.head.weight = model.embed.weight
    before = model.embed.weight.detach().clone()
    optimizer = make(model, lr=0.05)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert sum(p is model.embed.weight for p in held) == 1 and len(held) == len(list(model.parameters()))
    model, optimizer = copy.deepcopy((model, optimizer))

    def closure() -> None:
        optimizer.zero_grad()
        model.loss().backward()

    for _ in range(2):
        optimizer.step(closure)
    assert model.head.weight is model.embed.weight and (model.head.weight != before).any()
    assert optimizer.state[model.head.weight]["step"] == 2
