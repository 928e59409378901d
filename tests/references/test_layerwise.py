"""LARS, LAMB and NovoGrad: layers measured by their weights or by their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from normopt import zoo
from tests.support.paths import MATRICES, SHAPES, as_model, assert_same_path
from tests.support.strategies import assert_close
from tests.support.streams import SMALL, STEPS, assert_without_memory, move, stream, weights
from tests.support.written import rms

# LARS ----------------------------------------------------------------------------------------------------------------

LARS = [
    {"lr": 1.0},
    {"lr": 1.0, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1, "trust_coefficient": 0.02},
    {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.1, "trust_coefficient": 0.02},
    {"lr": 1.0, "nesterov": True, "weight_decay": 0.1, "trust_coefficient": 0.02, "maximize": True},
]


@pytest.mark.parametrize("options", LARS, ids=str)
@pytest.mark.parametrize("start", [1.0, 0.0], ids=["", "from 0"])
def test_lars_is_pytorch_optimizers(options: dict[str, Any], start: float) -> None:
    """Matrices from random weights, and from 0, where nothing is rescaled."""
    from pytorch_optimizer import LARS as Reference

    def scaled(p: list[Tensor]) -> list[Tensor]:
        for w in p:
            w.detach().mul_(start)
        return p

    assert_same_path(
        lambda p: zoo.LARS(scaled(p), **options), lambda p: Reference(scaled(p), **options), MATRICES, 2e-5
    )


@pytest.mark.parametrize("given", [as_model, list], ids=["model", "parameters"])
@pytest.mark.parametrize("options", LARS, ids=str)
def test_lars_is_pytorch_optimizers_on_vectors(options: dict[str, Any], given: Callable[[list[Tensor]], Any]) -> None:
    """Vectors and scalars, of a model or by themselves, move by plain SGD without decay."""
    from pytorch_optimizer import LARS as Reference

    options = {**options, "lr": 0.1}
    assert_same_path(
        lambda p: zoo.LARS(given(p), **options),
        lambda p: Reference(p, **options),
        [*SHAPES, (), (4, 3, 2)],
        2e-5,
    )


@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_by_hand(nesterov: bool) -> None:
    """All but vectors and scalars adapt; a weight that is 0 at first, a gradient that is 0 at times."""
    lr, momentum, trust, decay = 0.5, 0.8, 0.02, 0.1
    params = weights([*SMALL, (3, 3), (3,)])
    params[-1].detach().zero_()
    params[-2].detach().zero_()
    optimizer = zoo.LARS(params, lr, decay, momentum, trust_coefficient=trust, nesterov=nesterov)
    ws = [p.detach().clone() for p in params]
    bs = [torch.zeros_like(w) for w in ws]
    for t, gs in zip(range(STEPS), stream(params), strict=False):
        gs[t % len(gs)].zero_()
        move(optimizer, params, gs)
        for i, g in enumerate(gs):
            size, slope = ws[i].norm(), g.norm()
            ratio = trust * size / (slope + decay * size) if size > 0 else 1.0
            g = ratio * (g + decay * ws[i]) if g.ndim > 1 else g
            bs[i] = momentum * bs[i] + g
            ws[i] = ws[i] - lr * (g + momentum * bs[i] if nesterov else bs[i])
            assert_close(params[i].detach(), ws[i], 1e-12)


def test_lars_on_a_model_leaves_vectors_and_scalars_to_sgd() -> None:
    params, others = weights(), weights()
    optimizer = zoo.LARS(as_model(params), lr=0.1, weight_decay=0.1)
    sgd = torch.optim.SGD(others[2:], lr=0.1, momentum=0.9)
    for _, gs in zip(range(STEPS), stream(params), strict=False):
        changes = move(optimizer, params, gs)
        for change, expected in zip(changes[2:], move(sgd, others[2:], gs[2:]), strict=True):
            assert_close(change, expected, 1e-12)
    assert not torch.equal(params[0], others[0])


def test_lars_trust_coefficient_of_0_stops_all_but_zeros() -> None:
    params = weights([(4, 3), (3, 4)])
    params[1].detach().zero_()
    change, moved = move(zoo.LARS(params, lr=0.1, trust_coefficient=0.0), params, [torch.ones(4, 3), torch.ones(3, 4)])
    assert not change.any() and (moved == -0.1).all()


# LAMB ----------------------------------------------------------------------------------------------------------------

LAMB: list[dict[str, Any]] = [
    {},
    {"max_grad_norm": 0.1},
    {"max_grad_norm": None},
    {"always_adapt": True},
    {"trust_clip": True, "always_adapt": True},
    {"bias_correction": False, "betas": (0.8, 0.9), "eps": 1e-2},
]


@pytest.mark.parametrize("options", LAMB, ids=str)
def test_lamb_by_hand(options: dict[str, Any]) -> None:
    """timm's recurrence over two groups, one without decay; the gradients are far above and far below the norm 1."""
    o = {"betas": (0.9, 0.999), "eps": 1e-6, "max_grad_norm": 1.0, "bias_correction": True}
    o = {"always_adapt": False, "trust_clip": False, **o, **options}
    (beta1, beta2), eps, most = o["betas"], o["eps"], o["max_grad_norm"]
    params = weights([*SMALL, (3, 3), (4, 2)])
    params[4].detach().zero_()
    params[1].detach().mul_(0.1)  # shorter than its update: what trust_clip leaves alone
    rates, decays = (0.02, 0.02, 0.02, 0.05, 0.05, 0.05), (0.1, 0.1, 0.1, 0.0, 0.0, 0.0)
    groups = [{"params": params[:3], "weight_decay": 0.1}, {"params": params[3:], "weight_decay": 0.0, "lr": 0.05}]
    optimizer = zoo.LAMB(groups, lr=0.02, **options)
    ws = [p.detach().clone() for p in params]
    ms, vs = ([torch.zeros_like(w) for w in ws] for _ in range(2))
    for t, gs in zip(range(1, STEPS + 1), stream(params, (100.0, 1e-3, 0.3, 7.0)), strict=False):
        gs[5].zero_()
        move(optimizer, params, gs)
        total = math.sqrt(sum(float(g.square().sum()) for g in gs))
        shrink = 1.0 if most is None else min(1.0, most / total)
        corrections = (1 - beta1**t, 1 - beta2**t) if o["bias_correction"] else (1.0, 1.0)
        for i, (g, lr, decay) in enumerate(zip(gs, rates, decays, strict=True)):
            ms[i] = beta1 * ms[i] + (1 - beta1) * shrink * g
            vs[i] = beta2 * vs[i] + (1 - beta2) * (shrink * g) ** 2
            u = ms[i] / corrections[0] / ((vs[i] / corrections[1]).sqrt() + eps) + decay * ws[i]
            size, length = ws[i].norm(), u.norm()
            ratio = size / length if size > 0 and length > 0 else torch.ones_like(size)
            ratio = ratio.clamp(max=1.0) if o["trust_clip"] else ratio
            ws[i] = ws[i] - lr * (ratio if decay or o["always_adapt"] else 1.0) * u
            assert_close(params[i].detach(), ws[i], 1e-12)


def test_lamb_is_not_pytorch_optimizers_on_purpose() -> None:
    """Theirs corrects the step for bias after the trust ratio, so that it begins ten times as long; takes weights for
    no longer than 10; decays first, beside the trust ratio; and corrects no second moment. Ours, as timm's, is as long
    as ``lr ||w||`` at every step, decay included.
    """
    from pytorch_optimizer import Lamb

    lr, decay, shapes = 1e-2, 0.1, [(4, 6), (30, 30)]
    ours, theirs, twins = (weights(shapes, dtype=torch.float32) for _ in range(3))
    first, second = zoo.LAMB(ours, lr, weight_decay=decay), Lamb(theirs, lr, weight_decay=decay, eps=1e-12)
    bare: dict[str, Any] = {"eps": 1e-12, "weight_decay": 0.0, "always_adapt": True, "max_grad_norm": None}
    uncorrected = zoo.LAMB(twins, lr, bias_correction=False, **bare)
    for t, gs in zip(range(1, STEPS + 1), stream(ours), strict=False):
        sizes = [float(w.detach().norm()) for w in ours]
        for change, size in zip(move(first, ours, gs), sizes, strict=True):
            assert float(change.norm()) == pytest.approx(lr * size, rel=1e-4)
        for twin, w in zip(twins, theirs, strict=True):
            twin.detach().copy_((1 - lr * decay) * w.detach())
        sizes = [float(twin.detach().norm()) for twin in twins]
        starts = [w.detach().clone() for w in theirs]
        changes = zip(move(uncorrected, twins, gs), move(second, theirs, gs), starts, sizes, strict=True)
        for change, other, w, size in changes:
            longer = min(size, 10.0) / size / (1 - 0.9**t)
            assert_close(other, longer * change - lr * decay * w, 1e-4)
        assert sizes[0] < 10 < sizes[1]


# NovoGrad ------------------------------------------------------------------------------------------------------------

NOVOGRAD = [
    {},
    {"betas": (0.8, 0.9), "weight_decay": 0.1},
    {"grad_averaging": True},
    {"grad_averaging": True, "weight_decay": 0.1, "eps": 0.1, "maximize": True},
    {"weight_decay": 0.1, "weight_decouple": True},
]


@pytest.mark.parametrize("options", NOVOGRAD, ids=str)
def test_novograd_is_pytorch_optimizers(options: dict[str, Any]) -> None:
    from pytorch_optimizer import NovoGrad

    assert_same_path(
        lambda p: zoo.NovoGrad(p, lr=0.02, **options),
        lambda p: NovoGrad(p, lr=0.02, **options),
        [*SHAPES, ()],
        2e-5,
    )


# Without memory ------------------------------------------------------------------------------------------------------

NOTHING: dict[str, Any] = {"betas": (0.0, 0.0), "eps": 0.0}
LIMITS: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "novograd": (NOTHING, lambda g, w: g / g.norm()),
    "lars": ({"momentum": 0.0, "trust_coefficient": 1.0}, lambda g, w: g * w.norm() / g.norm() if g.ndim > 1 else g),
    "lamb": (NOTHING | {"weight_decay": 0.0, "always_adapt": True}, lambda g, w: g.sign() * rms(w)),
}


@pytest.mark.parametrize("name", LIMITS)
def test_without_memory(name: str) -> None:
    """Normalized descent, and sign descent as long as the weights: only this step's gradient counts."""
    tolerance = 1e-10 if name == "lars" else 1e-12  # its gradients of vectors are not rescaled, and are small at times
    assert_without_memory(name, *LIMITS[name], tolerance)
