"""What torch.optim asks of its optimizers, asked of every optimizer in the registry and of bare combinations."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import normopt
from normopt import SteepestDescent

Make = Callable[..., SteepestDescent]

#: Settings under which an optimizer keeps more state than by default.
MORE = {
    "sgd": {"momentum": 0.9, "weight_decay": 0.1},
    "adamw": {"amsgrad": True},
    "muon": {"orthogonalize": "exact", "orthogonalize_dtype": None},
    "scion": {"constrained": True, "radius": 1.0},
    "rmsprop": {"centered": True, "momentum": 0.3, "alpha": 0.9},
    "ademamix": {"beta3_warmup": 3, "alpha_warmup": 2, "weight_decay": 0.1},
    "novograd": {"grad_averaging": True, "weight_decay": 0.1},
    "lamb": {"max_grad_norm": None, "always_adapt": True, "trust_clip": True},
    "lion": {"cautious": True, "weight_decay": 0.1},
    "adamp": {"delta": 5.0, "weight_decay": 0.1, "nesterov": True},
    "sgdp": {"delta": 1.5, "weight_decay": 0.1, "momentum": 0.5},
    "muonplusplus": {"protect": 2, "power_iterations": None, "orthogonalize": "exact"},
}
BARE = {
    "shampoo": {"norm": "Smoothed(Spectral(), 0.9, 1e-6)", "momentum": 0.9},
    "chain": {"norm": "Chain(Row(), Spectral(method='exact'), EMA(0.5))", "step_size": "sharp"},
    "grafted": {"norm": "Grafted(Smoothed(Column()), Euclidean())", "momentum": "nesterov"},
    "l2": {"norm": "max", "constraint": "L2(0.1)", "momentum": "heavy-ball"},
}
JOINT = {
    "dual": {"norm": "Spectral(method='exact')", "step_size": "dual"},
    "free": {"norm": "Smoothed(Max())", "step_size": "prodigy"},
}
#: Those that need a closure; tests/test_zoo_constraints.py asks the same of them.
LOOK_BACK = {"stormplus"}
NAMES = [name for name in normopt.list_optimizers() if name not in LOOK_BACK]
ZOO: dict[str, Make] = {name: partial(normopt.create, name) for name in NAMES}
ZOO |= {f"{name}+": partial(ZOO[name], **options) for name, options in MORE.items()}
#: Those that look at all tensors before they move one.
COUPLED = {"lamb", "prodigy", "dadaptadam"}
LOCAL = {name: make for name, make in ZOO.items() if name not in COUPLED}
LOCAL |= {name: partial(SteepestDescent, **options) for name, options in BARE.items()}
EVERY = ZOO | LOCAL | {name: partial(SteepestDescent, **options) for name, options in JOINT.items()}
SHAPES = [(6, 4), (4, 6), (4, 6), (2, 5, 3, 1)]

#: What trains a whole model.
CHECKPOINTED = ZOO | {name: partial(normopt.create, name) for name in LOOK_BACK}

zoo = pytest.mark.parametrize("make", ZOO.values(), ids=ZOO)
local = pytest.mark.parametrize("make", LOCAL.values(), ids=LOCAL)
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
#: Tests that give a closure, so that those which look back can take them too.
whole = pytest.mark.parametrize("make", CHECKPOINTED.values(), ids=CHECKPOINTED)


class Net(nn.Module):
    """Something for every role."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)
        self.gain = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(6, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.conv(self.embed(tokens).mT).mT
        return self.head(self.gain * self.down(self.up(self.norm(h)).relu()))

    def loss(self) -> Tensor:
        tokens = torch.arange(22).reshape(2, 11) % 11
        return nn.functional.cross_entropy(self(tokens).flatten(0, 1), tokens.flatten())


def tensors(shapes: list[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=noise, dtype=torch.float64).to(dtype)) for s in shapes]


def give_gradients(params: list[Tensor], seed: int) -> None:
    for p, g in zip(params, tensors([tuple(p.shape) for p in params], seed=seed + 1000), strict=True):
        p.grad = g.detach().to(p.dtype)


def run(optimizer: SteepestDescent, params: list[Tensor], steps: int, first: int = 0) -> None:
    for i in range(first, first + steps):
        optimizer.step(partial(give_gradients, params, i))


def assert_goes_on(
    optimizer: SteepestDescent, params: list[Tensor], twin: SteepestDescent, twins: list[Tensor]
) -> None:
    """After two steps, from its checkpoint, another one takes the same next two."""
    run(optimizer, params, 2)
    twin.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        torch._foreach_copy_(twins, params)
    run(optimizer, params, 2, first=2)
    run(twin, twins, 2, first=2)
    assert_equal(snapshot(twin), snapshot(optimizer))


def snapshot(optimizer: SteepestDescent) -> Any:
    """Everything that a step may change."""
    weights = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return weights, copy.deepcopy(optimizer.state_dict())


def assert_equal(a: Any, b: Any, tolerance: float = 0.0) -> None:
    """Nested dicts, lists and tensors, by default to the bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_equal(a[name], b[name], tolerance)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y, tolerance)
    elif isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    else:
        assert a == b


# Param groups -----------------------------------------------------------------------------------------------------


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


@local
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


@whole
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


@every
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


@every
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


@every
def test_names_are_kept_in_state_dicts(make: Make) -> None:
    names = ["a", "b", "c", "d"]
    optimizer = make(list(zip(names, tensors(), strict=True)), lr=0.1)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names


@every
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


# Gradients and parameters ------------------------------------------------------------------------------------------


@every
def test_without_gradients_nothing_happens(make: Make) -> None:
    optimizer = make(tensors(), lr=0.1)
    before = snapshot(optimizer)
    optimizer.step()
    assert_equal(snapshot(optimizer), before)


@local
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
    params = tensors(dtype=dtype)
    optimizer = make(params, lr=0.1)
    run(optimizer, params, 2)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    for p in params:
        p.detach().zero_()
        p.grad.zero_()
    assert_equal(optimizer.state_dict()["state"], before)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_parameters_move_as_their_float32_copies(make: Make, dtype: torch.dtype) -> None:
    """State and arithmetic are float32: after each step the weights are the float32 result, rounded once.

    Those that have one of torch's kernels take it for the float32 copies alone.
    """
    params = tensors(dtype=dtype)
    twins = [nn.Parameter(p.detach().float()) for p in params]
    optimizer, twin = make(params, lr=0.1), make(twins, lr=0.1)
    for i in range(4):
        give_gradients(params, i)
        for p, q in zip(params, twins, strict=True):
            q.detach().copy_(p.detach())
            q.grad = p.grad.float()
        optimizer.step()
        twin.step()
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p.detach().float(), q.detach(), rtol=torch.finfo(dtype).eps * 0.501, atol=1e-6)
    has_kernel = any(batch.kernel for batches in twin._batches_of.values() for batch in batches)
    assert_equal(optimizer.state_dict()["state"], twin.state_dict()["state"], 1e-6 if has_kernel else 0.0)


@pytest.mark.parametrize("make", (EVERY | CHECKPOINTED).values(), ids=EVERY | CHECKPOINTED)
def test_memory_formats_do_not_matter(make: Make) -> None:
    shapes = [(6, 4), (5, 4, 3, 2), (4, 3, 2, 2, 3)]
    plain, strided = tensors(shapes), tensors(shapes)
    strided[0].data = strided[0].detach().mT.contiguous().mT
    strided[1].data = strided[1].detach().contiguous(memory_format=torch.channels_last)
    strided[2].data = torch.randn(*shapes[2], 2, dtype=torch.float64)[..., 0].copy_(strided[2].detach())
    first, second = make(plain, lr=0.1), make(strided, lr=0.1)
    for i in range(3):
        give_gradients(plain, i)
        for p, q in zip(plain, strided, strict=True):
            q.grad = torch.empty_like(q).copy_(p.grad)
        first.step(lambda: None)
        second.step(lambda: None)
    assert not any(p.is_contiguous() for p in strided)
    assert_equal([p.detach() for p in plain], [p.detach() for p in strided], 1e-13)  # sums run in another order


@every
@pytest.mark.parametrize("shape", [(), (3,), (3, 2), (2, 3, 4), (2, 3, 2, 4), (2, 2, 3, 2, 4)], ids=str)
def test_any_number_of_dimensions(make: Make, shape: tuple[int, ...]) -> None:
    for view in "View()", "View(flatten=True)", "View(flatten=False)":
        params = tensors([shape, shape])
        try:
            optimizer = make([{"params": params, "view": view}], lr=0.1)
        except ValueError as error:
            refusal = {0: "norm of matrices", 1: "norm of matrices", 3: "in two ways"}[len(shape)]
            assert refusal in str(error) and (len(shape) < 2 or view == "View()")
            continue
        before = [p.detach().clone() for p in params]
        run(optimizer, params, 3)
        assert all(torch.isfinite(p).all() and (p != q).any() for p, q in zip(params, before, strict=True))


@every
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (0, 0), (2, 0, 3), (0, 2, 3)], ids=str)
def test_empty_tensors_pass(make: Make, shape: tuple[int, ...]) -> None:
    params = tensors([shape, (4, 3), shape])
    try:
        optimizer = make([{"params": params, "view": "View(flatten=False)"}], lr=0.1)
    except ValueError as error:
        assert len(shape) < 2 and "norm of matrices" in str(error)
        return
    run(optimizer, params, 3)
    assert torch.isfinite(params[1]).all()
    optimizer.load_state_dict(optimizer.state_dict())
    run(optimizer, params, 1)


@every
def test_several_dtypes_in_one_group(make: Make) -> None:
    mixed = [p for dtype in (torch.float32, torch.bfloat16, torch.float64) for p in tensors(dtype=dtype)]
    pure = [tensors(dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    optimizer = make(mixed, lr=0.1)
    for i in range(2):
        for group in pure:
            give_gradients(group, i)
        for p, q in zip(mixed, [q for group in pure for q in group], strict=True):
            p.grad = q.grad.clone()
        optimizer.step()
    if make in LOCAL.values():
        for group in pure:
            run(make(group, lr=0.1), group, 2)
        assert_equal(mixed, [q for group in pure for q in group])


#: What reads numbers to know what to do: sums over all tensors, singular values, first gradients.
READS_NUMBERS = COUPLED | LOOK_BACK | {"asgo", "shampoo", "klshampoo", "soap", "muon+", "muonplusplus+"}


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_several_devices_and_dtypes_in_one_group(name: str) -> None:
    """Tensors without data are counted, and keep nothing else from moving."""
    make = CHECKPOINTED[name]
    kinds = [("cpu", torch.float32), ("meta", torch.float32), ("meta", torch.bfloat16), ("cpu", torch.bfloat16)]
    params = [nn.Parameter(p.detach().to(*kind)) for p, kind in zip(tensors([(6, 4)] * 4), kinds, strict=True)]
    optimizer = make(params, lr=0.1)
    before = [p.detach().clone() for p in params]

    def closure() -> None:
        for p in params:
            p.grad = torch.ones_like(p)

    if name in READS_NUMBERS:
        with pytest.raises((RuntimeError, NotImplementedError), match="meta tensor"):
            optimizer.step(closure)
        return
    for _ in range(3):
        optimizer.step(closure)
    assert all(torch.isfinite(params[i]).all() and (params[i] != before[i]).any() for i in (0, 3))
    assert all(x.is_meta for i in (1, 2) for name, x in optimizer.state[params[i]].items() if name != "step")


@every
def test_the_same_run_twice_is_equal_to_the_bit(make: Make) -> None:
    results = []
    for _ in range(2):
        params = tensors(dtype=torch.float32)
        optimizer = make(params, lr=0.1)
        run(optimizer, params, 3)
        results.append(snapshot(optimizer))
    assert_equal(*results)


@every
def test_the_order_of_groups_does_not_matter(make: Make) -> None:
    a, b = tensors(), tensors()
    first = make([{"params": a[:2]}, {"params": a[2:], "lr": 0.03}], lr=0.1)
    second = make([{"params": b[2:], "lr": 0.03}, {"params": b[:2]}], lr=0.1)
    run(first, a, 3)
    run(second, b, 3)
    assert_equal(a, b, 0.0 if make in LOCAL.values() else 1e-12)


@every
def test_the_size_of_batches_does_not_matter(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for limit in (1 << 22, 50, 1):
        monkeypatch.setattr(normopt.batch, "MAX_ENTRIES", limit)
        params = tensors()
        optimizer = make(params, lr=0.1)
        run(optimizer, params, 3)
        results.append(snapshot(optimizer))
    loose = 1e-2 if "bfloat16" in optimizer.param_groups[0]["rule"] else 1e-12
    assert_equal(results[1], results[0], loose)
    assert_equal(results[2], results[0], loose)


# torch's tools -------------------------------------------------------------------------------------------------------


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


@every
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


@every
def test_repr_shows_the_rule_and_the_options(make: Make) -> None:
    optimizer = make(tensors(), lr=0.1)
    text = repr(optimizer)
    assert text.startswith(type(optimizer).__name__) and "lr: 0.1" in text and "rule: Rule(" in text


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda i: 0.5**i),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda i: 0.5),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.1),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.1),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3),
    "CyclicLR-fixed-momentum": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 6),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, 1.0, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.03, 3),
}
#: Those that the fast tests ask of every optimizer.
QUICK = {"LambdaLR", "OneCycleLR", "SequentialLR"}
TWINS: dict[str, tuple[type, dict[str, Any], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}, {}),
    "adam": (torch.optim.Adam, {}, {}),
    "adamw": (torch.optim.AdamW, {}, {}),
    "muon": (torch.optim.Muon, {}, {"orthogonalize_dtype": torch.float32}),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("name", TWINS)
def test_schedulers_drive_ours_as_torchs(
    name: str, scheduler: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same path as the twin in torch.optim, whose learning rate, betas and momentum the same scheduler changes."""
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)  # what torch.optim.Muon casts with
    a, b = (tensors(SHAPES[:3], torch.float32) for _ in range(2))
    twin, options, ours = TWINS[name]
    first, second = normopt.create(name, a, lr=0.05, **options, **ours), twin(b, lr=0.05, **options)
    schedules = scheduler(first), scheduler(second)
    for i in range(5):
        run(first, a, 1, first=i)
        give_gradients(b, i)
        second.step()
        for schedule in schedules:
            schedule.step()
        for key in {"lr", "betas", "momentum"} & second.param_groups[0].keys():
            assert first.param_groups[0][key] == second.param_groups[0][key]
    assert_equal(a, b, 2e-6)


def test_every_scheduler_of_torch_is_here() -> None:
    theirs = {name for name, cls in vars(lr_scheduler).items() if isinstance(cls, type) and name[0] != "_"}
    theirs = {name for name in theirs if issubclass(getattr(lr_scheduler, name), lr_scheduler.LRScheduler)}
    assert theirs - {"LRScheduler", "ReduceLROnPlateau"} <= SCHEDULERS.keys()


@whole
@pytest.mark.parametrize(
    "scheduler",
    [s if name in QUICK else pytest.param(s, marks=pytest.mark.slow) for name, s in SCHEDULERS.items()],
    ids=SCHEDULERS,
)
def test_schedulers_reach_every_group(make: Make, scheduler: Callable[[Any], Any]) -> None:
    model = Net()
    optimizer = make(model, lr=0.05)
    if not {"momentum", "betas"} & optimizer.defaults.keys() and "fixed" not in str(scheduler):
        optimizer.defaults["momentum"] = 0.0  # what these two schedulers ask for
    schedule = scheduler(optimizer)
    for i in range(4):
        run(optimizer, list(model.parameters()), 1, first=i)
        schedule.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())


@whole
def test_plateau(make: Make) -> None:
    model = Net()
    optimizer = make(model, lr=0.1)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        run(optimizer, list(model.parameters()), 1)
        schedule.step(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate / 100 for rate in rates])


@every
def test_lr_zero_stops(make: Make) -> None:
    params = tensors()
    optimizer = make(params, lr=0.1)
    run(optimizer, params, 2)
    before = [p.detach().clone() for p in params]
    for zero in (0.0, 0, torch.tensor(0.0)):
        optimizer.param_groups[0]["lr"] = zero
        run(optimizer, params, 1)
    assert_equal([p.detach() for p in params], before)


@zoo
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


@zoo
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


# Saving and loading ------------------------------------------------------------------------------------------------


def plain(x: Any) -> bool:
    if isinstance(x, dict):
        return all(isinstance(k, (str, int)) and plain(v) for k, v in x.items())
    if isinstance(x, (list, tuple)):
        return all(map(plain, x))
    return x is None or type(x) in (Tensor, int, float, str, bool)


@every
def test_state_dicts_are_plain_data(make: Make) -> None:
    params = tensors()
    optimizer = make(params, lr=0.1)
    run(optimizer, params, 1)
    assert plain(optimizer.state_dict())
    assert all(g["rule"] == repr(normopt.ingredient.parse(g["rule"])) for g in optimizer.param_groups)


@every
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


#: Every optimizer of the registry, every setting and every bare combination.
SAVED = EVERY | CHECKPOINTED


def resume(path: str) -> None:
    """In a new process: load every optimizer's checkpoint, take two more steps, save."""
    saved = torch.load(path, weights_only=True)
    for name, (kind, weights, state) in saved.items():
        params = [nn.Parameter(w) for w in weights]
        optimizer = SAVED[name](params, lr=0.7)
        optimizer.load_state_dict(state)
        run(optimizer, params, 2, first=2)
        saved[name] = kind, [p.detach() for p in params], optimizer.state_dict()
    torch.save(saved, path)


def test_resume_in_a_new_process_is_exact(tmp_path: Path) -> None:
    assert {*normopt.list_optimizers()} <= SAVED.keys()
    path, saved, expected = tmp_path / "all.pt", {}, {}
    for i, (name, make) in enumerate(SAVED.items()):
        params = tensors(dtype=(torch.float32, torch.bfloat16)[i % 2])
        optimizer = make(params, lr=0.1)
        run(optimizer, params, 2)
        saved[name] = copy.deepcopy((type(optimizer).__name__, [p.detach() for p in params], optimizer.state_dict()))
        run(optimizer, params, 2, first=2)
        expected[name] = type(optimizer).__name__, [p.detach() for p in params], optimizer.state_dict()
    torch.save(saved, path)
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, __file__, str(path)], check=True, cwd=root, env=environment)
    assert_equal(torch.load(path, weights_only=True), expected)


@every
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
@pytest.mark.parametrize("make", CHECKPOINTED.values(), ids=CHECKPOINTED)
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


# Bad input -----------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("lr", [-1, -1e-3, float("nan"), True, "0.1", None, torch.ones(2)], ids=str)
def test_bad_learning_rates_are_refused(make: Make, lr: Any) -> None:
    with pytest.raises(ValueError, match="lr must be"):
        make(tensors(), lr=lr)
    with pytest.raises(ValueError, match="lr must be"):
        make([{"params": tensors(), "lr": lr}])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sgd", {"momentum": 1.0}, r"HeavyBall: beta must lie in \[0, 1\), got 1.0"),
        ("sgd", {"momentum": -0.1}, "HeavyBall: beta"),
        ("sgd", {"nesterov": True}, "nesterov needs beta > 0"),
        ("sgd", {"momentum": 0.9, "dampening": 0.1, "nesterov": True}, "nesterov needs"),
        ("sgd", {"weight_decay": -1}, "L2: weight_decay must lie in"),
        ("signum", {"momentum": 1.5}, "EMA: beta must lie in"),
        ("signum", {"momentum": "high"}, "EMA: beta must be a number, got 'high'"),
        ("signum", {"weight_decay": None}, "WeightDecay: weight_decay must be a number, got None"),
        ("signsgd", {"weight_decay": -0.1}, "WeightDecay: weight_decay must lie in"),
        ("adam", {"betas": (1.0, 0.9)}, "EMA: beta must lie in"),
        ("adam", {"betas": (0.9, 1.0)}, "Smoothed: beta must lie in"),
        ("adamw", {"betas": (0.9, -0.1)}, "Smoothed: beta must lie in"),
        ("adamw", {"betas": 0.9}, "betas must be a tuple"),
        ("adamw", {"betas": (0.9,)}, "betas must be a tuple"),
        ("adamw", {"eps": -1e-8}, "Smoothed: eps must lie in"),
        ("adamw", {"weight_decay": float("nan")}, "WeightDecay: weight_decay"),
        ("muon", {"momentum": 1.0}, "EMA: beta must lie in"),
        ("muon", {"weight_decay": -1.0}, "WeightDecay: weight_decay"),
        ("muon", {"ns_steps": 0}, "steps must be positive"),
        ("muon", {"adjust_lr_fn": "match_rms_adam"}, "did you mean 'match_rms_adamw'"),
        ("muon", {"orthogonalize": "polar-expres"}, "did you mean 'polar-express'"),
        ("muon", {"orthogonalize_dtype": "bfloat61"}, "name of a torch dtype"),
        ("muon", {"orthogonalize": "exact", "ns_coefficients": (3.0, -3.0, 1.0)}, "ns_coefficients need"),
        ("scion", {"radius": -1.0}, "Constant: radius must lie in"),
        ("scion", {"norm": "colum"}, "did you mean 'column'"),
        ("scion", {"momentum": 1.0}, "EMA: beta must lie in"),
    ],
)
def test_bad_numbers_are_refused_by_name(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        normopt.create(name, tensors(), lr=0.1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "spektral"}, "unknown direction 'spektral'; did you mean 'spectral'"),
        ({"momentum": "heavyball"}, "did you mean 'heavy-ball'"),
        ({"momentum": True}, "beta must lie in"),
        ({"momentum": 1.0}, "EMA: beta must lie in"),
        ({"step_size": "duel"}, "did you mean 'dual'"),
        ({"constraint": "weight-decoy"}, "did you mean 'weight-decay'"),
        ({"constraint": ["L2(0.1)", "frank-wolf"]}, "did you mean 'frank-wolfe'"),
        ({"norm": "Max("}, "cannot read the ingredient"),
        ({"norm": "EMA(0.9)"}, "expected a Direction"),
        ({"norm": "__import__('os')()"}, "cannot read|unknown|malformed"),
        ({"norm": 3}, "expected a Direction"),
        ({"options": {"betas": (0.9, 0.9)}}, "reads 'betas'"),
        ({"norm": "Smoothed(Max(), Option('betas', 1))", "options": {"beta": (0.9, 0.9)}}, "did you mean 'betas'"),
        ({"norm": "Smoothed(Max(), Option('betas', 1))"}, "option 'betas' is missing"),
        ({"norm": "Smoothed(Nuclear())"}, "has no second moment"),
        ({"norm": "Smoothed(Spectral(), maximum=True)"}, "of which none is the largest"),
        ({"norm": "Chain()"}, "needs one or more"),
        ({"geometry": "scion"}, "whole model"),
        ({"overrides": {"*": "max"}}, "whole model"),
    ],
)
def test_bad_ingredients_are_refused_with_a_hint(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        SteepestDescent(tensors(), **{"lr": 0.1, **options})


@every
def test_typos_are_refused(make: Make) -> None:
    with pytest.raises(TypeError, match="weigth_decay"):
        make(tensors(), weigth_decay=0.1)
    with pytest.raises(TypeError, match="reads 'nrom'"):
        make([{"params": tensors(), "nrom": "max"}], lr=0.1)
    optimizer = make(tensors(), lr=0.1)
    for bad in ({"learning_rate": 0.1}, {"norm": "maxx"}, {"lr": -1.0}, {"momentum": 2.0}):
        with pytest.raises((TypeError, ValueError)):
            optimizer.add_param_group({"params": tensors([(3, 3)]), **bad})
    assert len(optimizer.param_groups) == 1


def test_a_vector_under_the_spectral_norm_is_refused() -> None:
    w, b = tensors([(4, 3), (3,)])
    for params, name in ([w, b], "parameter 1 of its group"), ([("w", w), ("b", b)], "parameter 'b'"):
        with pytest.raises(ValueError, match=rf"{name} has shape \(3,\).*norm='max'.*pass the model"):
            normopt.create("muon", params)
    optimizer = normopt.create("muon", [w])
    with pytest.raises(ValueError, match="norm of matrices"):
        optimizer.add_param_group({"params": [b]})
    optimizer.add_param_group({"params": [b], "norm": "max"})
    run(optimizer, [w, b], 2)


@every
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_parameters_that_are_no_real_numbers_are_refused(make: Make, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="only real floating-point"):
        make([nn.Parameter(torch.zeros(3, 3, dtype=dtype), requires_grad=False)], lr=0.1)


@every
@pytest.mark.parametrize("kind", ["sparse", "complex"])
@pytest.mark.parametrize("culprit", [0, 3])
def test_bad_gradients_are_refused_before_anything_moves(make: Make, kind: str, culprit: int) -> None:
    params = tensors()
    optimizer = make([{"params": params[:2]}, {"params": params[2:]}], lr=0.1)
    run(optimizer, params, 2)
    give_gradients(params, 2)
    g = params[culprit].grad
    params[culprit].grad = None
    params[culprit].grad_dtype = None
    params[culprit].grad = g.to_sparse() if kind == "sparse" else g.to(torch.complex128)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"parameter {culprit % 2} of its group has a {kind} gradient"):
        optimizer.step()
    assert_equal(snapshot(optimizer), before)


if __name__ == "__main__":
    resume(sys.argv[1])
