"""Adam and its relatives beside their references, and what becomes of them without memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import normopt
from normopt import TwoSpeed, WarmNesterov, zoo
from tests.support.paths import SHAPES, Make, assert_same_path, case
from tests.support.strategies import assert_close
from tests.support.streams import STEPS, assert_without_memory, move, stream, weights
from tests.support.written import rms

# torch.optim ---------------------------------------------------------------------------------------------------------

TORCH = [
    case("Adam", lr=0.02),
    case("Adam", lr=0.02, weight_decay=0.1),
    case("Adam", lr=0.02, weight_decay=0.1, decoupled_weight_decay=True),
    case("Adam", lr=0.02, amsgrad=True, betas=(0.8, 0.9)),
    case("Adam", lr=0.02, eps=0.1, maximize=True),
    case("RMSprop", lr=0.02),
    case("RMSprop", lr=0.02, alpha=0.9, momentum=0.8, weight_decay=0.1, eps=1e-3),
    case("RMSprop", lr=0.02, momentum=1.0),
    case("RMSprop", lr=0.02, centered=True),
    case("RMSprop", lr=0.02, alpha=0.9, momentum=0.8, weight_decay=0.1, centered=True, eps=1e-3),
    case("Adagrad", lr=0.1),
    case("Adagrad", lr=0.1, weight_decay=0.1, initial_accumulator_value=0.3, eps=1e-3),
    case("Adagrad", lr=0.1, lr_decay=0.1),
    case("NAdam", lr=0.02),
    case("NAdam", lr=0.02, weight_decay=0.1, betas=(0.8, 0.9), momentum_decay=0.1),
    case("NAdam", lr=0.02, weight_decay=0.1, decoupled_weight_decay=True, eps=1e-3, maximize=True),
    case("Adamax", lr=0.02),
    case("Adamax", lr=0.02, weight_decay=0.1, betas=(0.8, 0.9), eps=0.1),
    case("Adafactor"),
    case("Adafactor", lr=0.5, weight_decay=0.1, beta2_decay=-0.5, eps=(0.5, 2.0), d=2.0),
    case("AdamW", lr=0.02),
    case("AdamW", lr=0.02, weight_decay=0.5, betas=(0.9, 0.95), eps=1e-6),
    case("AdamW", lr=0.02, amsgrad=True, betas=(0.8, 0.9)),
]


@pytest.mark.parametrize(("ours", "reference"), TORCH)
def test_torch_optim(ours: Make, reference: Make) -> None:
    assert_same_path(ours, reference, SHAPES, 2e-5)


# AdEMAMix ------------------------------------------------------------------------------------------------------------

ADEMAMIX = [
    {},
    {"betas": (0.8, 0.9, 0.99), "alpha": 5.0, "weight_decay": 0.1},
    {"betas": (0.8, 0.9, 0.99), "alpha": 5.0, "warmup": 60},
    {"betas": (0.9, 0.999, 0.9999), "alpha": 8.0, "warmup": 20, "maximize": True},
]


@pytest.mark.parametrize("options", ADEMAMIX, ids=str)
def test_ademamix_is_pytorch_optimizers(options: dict[str, Any]) -> None:
    """Its half-lives are interpolated without apple's 1e-8, of which nothing is seen here."""
    from pytorch_optimizer import AdEMAMix

    options = {"lr": 0.02, "alpha": 2.0, **options}
    warmup = options.pop("warmup", None)
    assert_same_path(
        lambda p: zoo.AdEMAMix(p, beta3_warmup=warmup, alpha_warmup=warmup, **options),
        lambda p: AdEMAMix(p, t_alpha_beta3=warmup, weight_decouple=True, **options),
        SHAPES,
        2e-5,
    )


def test_ademamix_without_the_slow_average_is_adamw() -> None:
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
    assert_same_path(
        lambda p: zoo.AdEMAMix(p, alpha=0.0, **options),
        lambda p: torch.optim.AdamW(p, **options),
        SHAPES,
        2e-5,
    )


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
def test_ademamix_warmups_are_counts(name: str, steps: Any) -> None:
    with pytest.raises(ValueError, match=f"TwoSpeed: {name} must be a whole number"):
        TwoSpeed(**{name: steps})


# NAdam and Adagrad ---------------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="InverseTime: lr_decay must lie in"):
        zoo.Adagrad(weights(), lr_decay=-0.1)


# Adafactor -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1e-5, 1e-9])
def test_adafactor_is_torchs_for_small_gradients(scale: float) -> None:
    """Where its least divisor counts, for the whole second moment of a vector and for the factors of a matrix."""
    assert_same_path(zoo.Adafactor, torch.optim.Adafactor, SHAPES, 2e-5, scale=scale)


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
    with pytest.raises(ValueError, match="Factored: exponent must lie in"):
        zoo.Adafactor(weights(), beta2_decay=0.1)
    with pytest.raises(ValueError, match="Relative: eps must lie in"):
        zoo.Adafactor(weights(), eps=(None, -1.0))


# Without memory ------------------------------------------------------------------------------------------------------


def sign(g: Tensor, w: Tensor) -> Tensor:
    return g.sign()


def rescaled(g: Tensor, w: Tensor) -> Tensor:
    """Each entry over the sizes of its row and of its column, times the size of all; a vector is one row."""
    if g.ndim < 2:
        return g.sign()
    return g * g.norm() / (g.norm(dim=1, keepdim=True) * g.norm(dim=0, keepdim=True))


NOTHING: dict[str, Any] = {"betas": (0.0, 0.0), "eps": 0.0}
LIMITS: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "adam": (NOTHING, sign),
    "nadam": (NOTHING, sign),
    "adamax": (NOTHING, sign),
    "ademamix": ({"betas": (0.0, 0.0, 0.0), "eps": 0.0, "alpha": 0.5}, lambda g, w: 1.5 * g.sign()),
    "adafactor": ({"beta2_decay": 0.0, "eps": (0.0, 0.0), "d": 1e9}, lambda g, w: rms(w) * rescaled(g, w)),
}


@pytest.mark.parametrize("name", LIMITS)
def test_without_memory(name: str) -> None:
    """Sign descent, one step of a Sinkhorn iteration: only this step's gradient counts."""
    assert_without_memory(name, *LIMITS[name])


def test_adafactors_limit_is_no_duality_map() -> None:
    """A duality map's result has one norm for every gradient of full rank; this has another largest entry, row, column,
    singular value and root mean square for each.
    """
    norms = [normopt.Max(), normopt.Row(), normopt.Column(), normopt.Spectral(), normopt.Euclidean()]
    limits = [rescaled(g, g) for _, (g, *_) in zip(range(5), stream(weights()), strict=False)]
    for norm in norms:
        sizes = torch.stack([norm.norm(limit) for limit in limits])
        assert sizes.max() > 1.01 * sizes.min()
