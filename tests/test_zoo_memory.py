"""Optimizers with memory against recurrences written out by hand, and what they become without memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from strategies import assert_close
from torch import Tensor, nn

import normopt
from normopt import SteepestDescent, TwoSpeed, WarmNesterov, zoo
from tests.paths import as_model

SHAPES: list[tuple[int, ...]] = [(4, 6), (6, 4), (5,), ()]
STEPS = 25


def weights(shapes: list[tuple[int, ...]] = SHAPES, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=noise, dtype=torch.float64).to(dtype)) for shape in shapes]


def stream(params: list[Tensor], sizes: tuple[float, ...] = (1.0,)) -> Iterator[list[Tensor]]:
    """Random gradients for ``params``, whose sizes change from step to step."""
    noise, step = torch.Generator().manual_seed(1), 0
    while True:
        size = sizes[step % len(sizes)]
        yield [size * torch.randn(p.shape, generator=noise, dtype=torch.float64) for p in params]
        step += 1


def move(optimizer: torch.optim.Optimizer, params: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """Take one step and return the changes."""
    before = [p.detach().clone() for p in params]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.to(p.dtype, copy=True)
    optimizer.step()
    return [p.detach() - w for p, w in zip(params, before, strict=True)]


# Two averages --------------------------------------------------------------------------------------------------------


def half_life_warmup(step: int, end: float, start: float, warmup: int) -> float:
    """apple/ml-ademamix: the slow beta's half-life, less one, grows linearly; 1e-8 is added inside the logarithm."""

    def f(beta: float) -> float:
        return math.log(0.5) / math.log(beta + 1e-8) - 1

    if step >= warmup:
        return end
    done = step / warmup
    return 0.5 ** (1 / ((1 - done) * f(start) + done * f(end) + 1))


@pytest.mark.parametrize(
    ("betas", "beta3_warmup", "alpha_warmup"),
    [
        ((0.9, 0.999, 0.9999), None, None),
        ((0.8, 0.9, 0.99), 10, 20),
        ((0.8, 0.9, 0.99), 40, None),
        ((0.0, 0.9, 0.9), 8, 1),
    ],
)
def test_ademamix_by_apples_recurrence(
    betas: tuple[float, float, float], beta3_warmup: int | None, alpha_warmup: int | None
) -> None:
    lr, alpha, eps, decay, (beta1, beta2, beta3) = 0.02, 3.0, 1e-3, 0.1, betas
    params = weights()
    optimizer = zoo.AdEMAMix(params, lr, betas, alpha, beta3_warmup, alpha_warmup, eps, decay)
    ws = [p.detach().clone() for p in params]
    fast, slow, v = ([torch.zeros_like(w) for w in ws] for _ in range(3))
    for t, gs in zip(range(1, STEPS + 1), stream(params), strict=False):
        move(optimizer, params, gs)
        b3 = half_life_warmup(t, beta3, beta1, beta3_warmup) if beta3_warmup else beta3
        a = min(t / alpha_warmup, 1.0) * alpha if alpha_warmup else alpha
        for i, g in enumerate(gs):
            fast[i] = beta1 * fast[i] + (1 - beta1) * g
            slow[i] = b3 * slow[i] + (1 - b3) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g**2
            mixed = fast[i] / (1 - beta1**t) + a * slow[i]
            ws[i] = ws[i] - lr * (mixed / ((v[i] / (1 - beta2**t)).sqrt() + eps) + decay * ws[i])
            assert_close(params[i].detach(), ws[i], 1e-12)


@pytest.mark.parametrize("name", ["slow_warmup", "alpha_warmup"])
@pytest.mark.parametrize("steps", [0, -1, 2.5, "many"])
def test_warmups_are_counts(name: str, steps: Any) -> None:
    with pytest.raises(ValueError, match=f"TwoSpeed: {name} must be a whole number"):
        TwoSpeed(**{name: steps})


# A momentum that grows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("decay", [0.0, 4e-3, 10.0])
@pytest.mark.parametrize("step", [1, 2, 50, 3000])
def test_nadams_correction_is_that_of_the_whole_product(beta: float, decay: float, step: int) -> None:
    """Up to a step where the product has long underflown."""
    mu = [beta * (1 - 0.5 * 0.96 ** (i * decay)) for i in range(1, step + 2)]
    g, m = torch.randn(2, 5, dtype=torch.float64)
    expected_m = beta * m + (1 - beta) * g
    ahead = mu[-1] / (1 - math.prod(mu)) * expected_m
    context: Any = type("At", (), {"step": float(step)})
    actual = WarmNesterov(beta, decay)(g, {"momentum": m.clone()}, context)
    assert_close(actual, (1 - mu[-2]) / (1 - math.prod(mu[:-1])) * g + ahead, 1e-13)


def test_adagrads_decay_is_a_step_size() -> None:
    assert zoo.Adagrad(weights(), lr_decay=0.1).param_groups[0]["lr_decay"] == 0.1
    zoo.Adagrad(weights(), step_size="constant")
    with pytest.raises(ValueError, match="Adagrad: lr_decay is a step size"):
        zoo.Adagrad(weights(), lr_decay=0.1, step_size="constant")
    with pytest.raises(ValueError, match="InverseTime: decay must lie in"):
        zoo.Adagrad(weights(), lr_decay=-0.1)


# Adafactor -----------------------------------------------------------------------------------------------------------


def test_adafactor_takes_a_single_row_for_a_vector() -> None:
    """torch factors it; where gradients are small, the least divisor of the factors then cuts the second moment."""
    ours, theirs = (weights([(1, 7), (7,)], dtype=torch.float32) for _ in range(2))
    for p in (ours, theirs):
        p[1].detach().copy_(p[0].detach().view(-1))
    first, second = zoo.Adafactor(ours), torch.optim.Adafactor(theirs)
    for _, (g, _) in zip(range(STEPS), stream(ours, (1e-5,)), strict=False):
        a, b = (move(o, p, [g, g.view(-1)]) for o, p in ((first, ours), (second, theirs)))
    assert_close(a[0].view(-1), b[1], 1e-5)
    assert_close(a[1], b[1], 1e-5)
    assert (b[0].view(-1) - b[1]).abs().max() > 0.01 * b[1].abs().max()


def test_adafactors_numbers_are_where_torch_has_them() -> None:
    ours, theirs = (cls(weights()).param_groups[0] for cls in (zoo.Adafactor, torch.optim.Adafactor))
    names = ("lr", "beta2_decay", "eps", "d", "weight_decay")
    assert [ours[name] for name in names] == [theirs[name] for name in names]
    with pytest.raises(ValueError, match="Factored: decay must lie in"):
        zoo.Adafactor(weights(), beta2_decay=0.1)
    with pytest.raises(ValueError, match="Relative: eps must lie in"):
        zoo.Adafactor(weights(), eps=(None, -1.0))


# Layers measured by their weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_by_hand_where_everything_adapts(nesterov: bool) -> None:
    """Vectors and scalars of bare parameters too; a weight that is 0 at first, a gradient that is 0 at times."""
    lr, momentum, trust, decay = 0.5, 0.8, 0.02, 0.1
    params = weights([*SHAPES, (3, 3), (3,)])
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
            g = ratio * (g + decay * ws[i])
            bs[i] = momentum * bs[i] + g
            ws[i] = ws[i] - lr * (g + momentum * bs[i] if nesterov else bs[i])
            assert_close(params[i].detach(), ws[i], 1e-12)


def test_on_a_model_lars_leaves_vectors_and_scalars_to_sgd() -> None:
    params, others = weights(), weights()
    optimizer = zoo.LARS(as_model(params), lr=0.1, weight_decay=0.1)
    sgd = torch.optim.SGD(others[2:], lr=0.1, momentum=0.9)
    for _, gs in zip(range(STEPS), stream(params), strict=False):
        changes = move(optimizer, params, gs)
        for change, expected in zip(changes[2:], move(sgd, others[2:], gs[2:]), strict=True):
            assert_close(change, expected, 1e-12)
    assert not torch.equal(params[0], others[0])


def test_a_trust_coefficient_of_0_stops_all_but_zeros() -> None:
    params = weights([(4, 3), (3, 4)])
    params[1].detach().zero_()
    change, moved = move(zoo.LARS(params, lr=0.1, trust_coefficient=0.0), params, [torch.ones(4, 3), torch.ones(3, 4)])
    assert not change.any() and (moved == -0.1).all()


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
    params = weights([*SHAPES, (3, 3), (4, 2)])
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


# Without memory ------------------------------------------------------------------------------------------------------


def sign(g: Tensor, w: Tensor) -> Tensor:
    return g.sign()


def rescaled(g: Tensor, w: Tensor) -> Tensor:
    """Each entry over the sizes of its row and of its column, times the size of all; a vector is one row."""
    if g.ndim < 2:
        return g.sign()
    return g * g.norm() / (g.norm(dim=1, keepdim=True) * g.norm(dim=0, keepdim=True))


def rms(w: Tensor) -> Tensor:
    return w.square().mean().sqrt()


NOTHING: dict[str, Any] = {"betas": (0.0, 0.0), "eps": 0.0}
LIMITS: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "adam": (NOTHING, sign),
    "nadam": (NOTHING, sign),
    "adamax": (NOTHING, sign),
    "ademamix": ({"betas": (0.0, 0.0, 0.0), "eps": 0.0, "alpha": 0.5}, lambda g, w: 1.5 * g.sign()),
    "adafactor": ({"beta2_decay": 0.0, "eps": (0.0, 0.0), "d": 1e9}, lambda g, w: rms(w) * rescaled(g, w)),
    "novograd": (NOTHING, lambda g, w: g / g.norm()),
    "lars": ({"momentum": 0.0, "trust_coefficient": 1.0}, lambda g, w: g * w.norm() / g.norm()),
    "lamb": (NOTHING | {"weight_decay": 0.0, "always_adapt": True}, lambda g, w: g.sign() * rms(w)),
}


@pytest.mark.parametrize("name", LIMITS)
def test_without_memory(name: str) -> None:
    """Sign descent, normalized descent, one step of a Sinkhorn iteration: only this step's gradient counts."""
    options, direction = LIMITS[name]
    params = weights()
    optimizer = normopt.create(name, params, lr=0.01, **options)
    for _, gs in zip(range(5), stream(params, (1.0, 1e-3, 1e3)), strict=False):
        before = [p.detach().clone() for p in params]
        for change, g, w in zip(move(optimizer, params, gs), gs, before, strict=True):
            assert_close(change, -0.01 * direction(g, w), 1e-12)


def test_adafactors_limit_is_no_duality_map() -> None:
    """A duality map's result has one norm for every gradient of full rank; this has another largest entry, row, column,
    singular value and root mean square for each.
    """
    norms = [normopt.Max(), normopt.Row(), normopt.Column(), normopt.Spectral(), normopt.Euclidean()]
    limits = [rescaled(g, g) for _, (g, *_) in zip(range(5), stream(weights()), strict=False)]
    for norm in norms:
        sizes = torch.stack([norm.norm(limit) for limit in limits])
        assert sizes.max() > 1.01 * sizes.min()


def test_every_optimizer_with_memory_is_registered() -> None:
    for name in ("nadam", "adamax", "ademamix", "adafactor", "lars", "lamb", "novograd"):
        optimizer = normopt.create(name, nn.Linear(4, 3))
        assert isinstance(optimizer, SteepestDescent) and type(optimizer).__name__ in zoo.__all__
