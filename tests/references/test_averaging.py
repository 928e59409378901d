"""Averaged iterates around any optimizer: beside schedulefree and torch, and by their recurrences."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from schedulefree import AdamWScheduleFree, SGDScheduleFree
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import normopt
from normopt import Averaged, FrobeniusSphere, RowBound, Stiefel, zoo
from tests.support.steps import give_gradients, run, tensors
from tests.support.written import polar

STEPS = 30
SHAPES: list[tuple[int, ...]] = [(6, 10), (10, 6), (7,)]


def target(params: list[Tensor], seed: int) -> list[Tensor]:
    """Noisy gradients of ``0.5 ||w - 1||^2``."""
    noises = tensors([tuple(p.shape) for p in params], seed=seed)
    return [p.detach() - 1 + 0.5 * n.detach().to(p.dtype) for p, n in zip(params, noises, strict=True)]


def descend(
    optimizer: Any, params: list[Tensor], steps: int, first: int = 0, then: Callable[[], Any] | None = None
) -> None:
    for i in range(first, first + steps):
        for p, g in zip(params, target(params, i), strict=True):
            p.grad = g
        optimizer.step()
        if then is not None:
            then()


def close(ours: list[Tensor], theirs: list[Tensor], start: list[Tensor], tolerance: float) -> None:
    for a, b, c in zip(ours, theirs, start, strict=True):
        assert (a - b).abs().max() <= tolerance * (b - c).norm(), (a - b).abs().max() / (b - c).norm()


ADAMW = {"betas": (0.0, 0.99), "weight_decay": 0.0}


@pytest.mark.parametrize(
    ("base", "reference", "options"),
    [
        (lambda p: zoo.AdamW(p, 0.05, **ADAMW), lambda p, **o: AdamWScheduleFree(p, 0.05, betas=(0.9, 0.99), **o), {}),
        (
            lambda p: zoo.AdamW(p, 0.05, **ADAMW),
            lambda p, **o: AdamWScheduleFree(p, 0.05, betas=(0.9, 0.99), warmup_steps=10, **o),
            {"weight_decay": 0.1, "r": 1.0},
        ),
        (lambda p: zoo.SGD(p, 0.1), lambda p, **o: SGDScheduleFree(p, 0.1, momentum=0.9, **o), {}),
        (
            lambda p: torch.optim.SGD(p, 0.1),
            lambda p, **o: SGDScheduleFree(p, 0.1, momentum=0.9, warmup_steps=10, **o),
            {"weight_decay": 0.1, "r": 2.0},
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_schedule_free(base: Any, reference: Any, options: dict[str, float], dtype: torch.dtype) -> None:
    ours, theirs, start = (tensors(SHAPES, dtype) for _ in range(3))
    mine, other = Averaged(base(ours), 0.9, **options), reference(theirs, foreach=False, **options)
    warmup = other.param_groups[0]["warmup_steps"] or 1
    schedule = torch.optim.lr_scheduler.LambdaLR(mine, lambda k: min(1.0, (k + 1) / warmup))
    other.train()
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    for i in range(STEPS):
        for p, q, g in zip(ours, theirs, target(ours, i), strict=True):
            p.grad, q.grad = g, g.clone()
        mine.step()
        other.step()
        schedule.step()
        close(ours, theirs, start, tolerance)
        if i % 7 == 3:
            mine.eval()
            other.eval()
            close(ours, theirs, start, tolerance)
            mine.train()
            other.train()


def test_tail_average_is_torchs_ema() -> None:
    model = nn.Linear(5, 4)
    twin = copy.deepcopy(model)
    averaged = Averaged(zoo.Muon(model, 0.1), 0.0, beta=0.9)
    plain, ema = zoo.Muon(twin, 0.1), AveragedModel(twin, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ema.update_parameters(twin)  # its first call copies the start
    for i in range(20):
        give_gradients([*model.parameters()], i)
        give_gradients([*twin.parameters()], i)
        averaged.step()
        plain.step()
        ema.update_parameters(twin)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    with averaged.evaluating():
        for p, q in zip(model.parameters(), ema.module.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_a_tail_starts_late_and_is_mixed_in() -> None:
    (w,) = tensors([(4, 3)])
    averaged = Averaged(torch.optim.SGD([w], 0.1), 0.0, beta=0.8, start=6, share=0.6)
    seen: list[Tensor] = []
    descend(averaged, [w], 12, then=lambda: seen.append(w.detach().clone()))
    x = seen[4]
    for z in seen[5:]:
        x = 0.8 * x + 0.2 * z
    averaged.eval()
    torch.testing.assert_close(w.detach(), 0.4 * seen[-1] + 0.6 * x)


def test_ema_nesterov_by_its_recurrence() -> None:
    (w,), (theta,) = tensors([(4, 3)]), tensors([(4, 3)])
    beta, gamma = 0.6, 0.9
    averaged = Averaged(torch.optim.SGD([w], 0.1), -beta * (1 - gamma) / gamma, beta=gamma, share=0.0, leap=True)
    theta, m = theta.detach(), torch.zeros(4, 3, dtype=torch.float64)
    for i in range(20):
        descend(averaged, [w], 1, i)
        y = theta + beta * m
        moved = y - 0.1 * target([y], i)[0]
        theta, m = moved, gamma * m + (1 - gamma) * (moved - theta)
        torch.testing.assert_close(w.detach(), theta + beta * m)
    averaged.eval()
    torch.testing.assert_close(w.detach(), theta)


@pytest.mark.parametrize("rise", [None, (5, 0.7)])
def test_amuse_and_generalized_primal_averaging_by_their_recurrences(rise: tuple[int, float] | None) -> None:
    """Around Muon with the mean of all steps and a share that rises, and with an exponential average."""
    (w,) = tensors([(4, 3)])
    z = x = w.detach().clone()
    m = torch.zeros_like(z)
    exact: dict[str, Any] = {"orthogonalize": "exact", "orthogonalize_dtype": None, "adjust_lr_fn": "original"}
    muon = zoo.Muon([w], 0.05, momentum=0.8, nesterov=False, weight_decay=0.1, **exact)
    averaged = Averaged(muon, 0.7, power=0.0, rise=rise) if rise else Averaged(muon, 0.7, beta=0.9)
    for k in range(1, 20):
        share = 1 - (4 / (k - 1)) ** 0.7 * 0.3 if rise and k >= 5 else 0.7
        y = (1 - share) * z + share * x
        torch.testing.assert_close(w.detach(), y)
        m = 0.8 * m + 0.2 * target([y], k)[0]
        z = (1 - 0.005) * z - 0.05 * (4 / 3) ** 0.5 * polar(m)
        x = x + (z - x) * (1 / k if rise else 0.1)
        descend(averaged, [w], 1, k)
    averaged.eval()
    torch.testing.assert_close(w.detach(), x)


# What holds around every optimizer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in normopt.list_optimizers() if n != "stormplus"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_every_optimizer_resumes_to_the_bit_in_either_mode(name: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)).to(dtype)
    params = [*model.parameters()]
    averaged = Averaged(normopt.create(name, model, lr=0.01))
    run(averaged, params, 3)
    for mode in ("train", "eval"):
        getattr(averaged, mode)()
        buffer = io.BytesIO()
        torch.save(averaged.state_dict(), buffer)
        buffer.seek(0)
        other = copy.deepcopy(model)
        twin = Averaged(normopt.create(name, other, lr=0.01))
        twin.load_state_dict(torch.load(buffer, weights_only=True))
        assert twin.is_training == (mode == "train")
        assert all(torch.equal(p, q) for p, q in zip(params, other.parameters(), strict=True))
        for each in (averaged, twin):
            each.train()
        run(averaged, params, 2, 3)
        run(twin, [*other.parameters()], 2, 3)
        assert all(torch.equal(p, q) for p, q in zip(params, other.parameters(), strict=True))
        assert all(p.isfinite().all() for p in params)


def test_half_precision_averages_in_float32_and_keeps_kahans_sum() -> None:
    (w,) = tensors([(6, 5)], torch.bfloat16)
    (v,) = tensors([(6, 5)], torch.float32)
    v.data.copy_(w)
    kahan = Averaged(normopt.SteepestDescent([w], 1e-4, "max", constraint="KahanSum()"), 0.0, beta=0.9)
    exact = Averaged(normopt.SteepestDescent([v], 1e-4, "max"), 0.0, beta=0.9)
    for _ in range(50):
        w.grad, v.grad = torch.ones_like(w), torch.ones_like(v)
        kahan.step()
        exact.step()
    state = kahan.state[w]
    assert state["base"].dtype == torch.bfloat16 and state["average"].dtype == torch.float32
    torch.testing.assert_close(state["average"], exact.state[v]["average"], rtol=8e-3, atol=0)
    assert torch.equal(w, state["base"]) and (w != tensors([(6, 5)], torch.bfloat16)[0]).any()


@pytest.mark.parametrize("bound", [RowBound(0.7), FrobeniusSphere(), FrobeniusSphere(0.5), Stiefel(method="exact")])
@pytest.mark.parametrize("transpose", [False, True])
def test_bounds_hold_for_what_is_evaluated(bound: normopt.Constraint, transpose: bool) -> None:
    w = nn.Parameter(nn.init.orthogonal_(torch.empty(6, 4, dtype=torch.float64)) / 3)
    length = w.detach().norm()
    group = {"params": [w], "bounds": bound, "view": normopt.View(transpose=transpose)}
    averaged = Averaged(normopt.SteepestDescent([group], 0.2, "max", 0.5), 0.5)
    descend(averaged, [w], 8)
    training = w.detach().clone()
    with averaged.evaluating():
        if isinstance(bound, RowBound):
            assert (w.norm(dim=1) <= 0.7 + 1e-12).all()
        elif isinstance(bound, FrobeniusSphere):
            torch.testing.assert_close(w.detach().norm(), length if bound.radius is None else 0.5 * length / length)
        else:
            torch.testing.assert_close(w.mT @ w, torch.eye(4, dtype=torch.float64))
    assert torch.equal(w, training)


def test_copies_schedules_groups_and_closures() -> None:
    params = tensors(SHAPES)
    averaged = Averaged(zoo.AdamW(params[:2], 0.01))
    schedule = torch.optim.lr_scheduler.StepLR(averaged, 1, 0.5)
    averaged.add_param_group({"params": [params[2]], "lr": 0.1})
    assert averaged.step(lambda: (give_gradients(params, 0), 7.0)[1]) == 7.0
    schedule.step()
    assert [group["lr"] for group in averaged.optimizer.param_groups] == [0.005, 0.05]
    twin = copy.deepcopy(averaged)
    others = [p for group in twin.param_groups for p in group["params"]]
    assert twin.param_groups is twin.optimizer.param_groups and others[0] is not params[0]
    run(averaged, params, 2, 1)
    run(twin, others, 2, 1)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    averaged.zero_grad()
    assert all(p.grad is None for p in params)


def test_what_is_refused_changes_nothing() -> None:
    (w,) = tensors([(4, 3)])
    averaged = Averaged(zoo.Muon([w], 0.1))
    descend(averaged, [w], 3)
    before, state = w.detach().clone(), copy.deepcopy(averaged.state_dict())
    w.grad = torch.full_like(w, float("nan"))
    with pytest.raises(ValueError, match=r"not finite|NaN"):
        averaged.step()
    assert torch.equal(w, before) and torch.equal(averaged.state[w]["base"], state["state"][0]["base"])
    averaged.eval()
    with pytest.raises(RuntimeError, match=r"call train\(\)"):
        averaged.step()
    with pytest.raises(ValueError, match="has no averages"):
        averaged.load_state_dict(averaged.optimizer.state_dict())
    for options, message in [
        ({"interpolation": 1.5}, "interpolation must lie in"),
        ({"beta": 1.0}, "beta must lie in"),
        ({"share": -0.1}, "share must lie in"),
        ({"start": 0}, "start must be a whole number"),
        ({"power": -1.0}, "power must lie in"),
    ]:
        with pytest.raises(ValueError, match=message):
            Averaged(zoo.Muon([w], 0.1), **options)
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got list"):
        Averaged([w])
    with pytest.raises(ValueError, match="compares gradients at two weights"):
        Averaged(zoo.STORMPlus([w], 0.1))
