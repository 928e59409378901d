"""Every optimizer of the zoo beside its reference, on the same gradients."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from normopt import zoo
from tests.paths import Make, as_model, assert_same_path

SHAPES = {"wide": (6, 10), "tall": (10, 6), "square": (8, 8), "vector": (7,)}
MATRICES = [shape for shape in SHAPES.values() if len(shape) == 2]


def case(name: str, reference: Any = None, **options: Any) -> Any:
    """The same arguments for the class of that name in the zoo and in torch.optim (or in ``reference``)."""
    options = dict(options)
    ours = getattr(zoo, name)
    theirs = reference or getattr(torch.optim, name)
    label = "-".join([name, *(f"{k}={v}" for k, v in options.items())])
    return pytest.param(lambda p: ours(p, **options), lambda p: theirs(p, **options), id=label)


TORCH = [
    case("SGD", lr=0.05),
    case("SGD", lr=0.05, momentum=0.9),
    case("SGD", lr=0.05, momentum=0.9, weight_decay=0.1, dampening=0.1),
    case("SGD", lr=0.05, momentum=0.9, nesterov=True),
    case("SGD", lr=0.05, momentum=0.9, nesterov=True, maximize=True),
    case("Adam", lr=0.02),
    case("Adam", lr=0.02, weight_decay=0.1),
    case("Adam", lr=0.02, weight_decay=0.1, decoupled_weight_decay=True),
    case("Adam", lr=0.02, amsgrad=True, betas=(0.8, 0.9)),
    case("Adam", lr=0.02, eps=0.1, maximize=True),
    case("RMSprop", lr=0.02),
    case("RMSprop", lr=0.02, alpha=0.9, momentum=0.8, weight_decay=0.1, eps=1e-3),
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
    assert_same_path(ours, reference, list(SHAPES.values()), 2e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sign_descent_is_pytorch_optimizers_signsgd(momentum: float) -> None:
    from pytorch_optimizer import SignSGD

    def ours(p: list[Tensor]) -> Optimizer:
        if momentum:
            return zoo.Signum(p, lr=0.02, momentum=momentum, weight_decay=0.1)
        return zoo.SignSGD(p, lr=0.02, weight_decay=0.1)

    assert_same_path(
        ours, lambda p: SignSGD(p, lr=0.02, momentum=momentum, weight_decay=0.1), list(SHAPES.values()), 2e-5
    )


LION: list[dict[str, Any]] = [
    {},
    {"lr": 0.02, "betas": (0.8, 0.9), "weight_decay": 0.1},
    {"lr": 0.02, "weight_decay": 0.002, "decoupled_weight_decay": True},
]


@pytest.mark.parametrize("options", LION, ids=str)
def test_lion_is_lion_pytorchs(options: dict[str, Any]) -> None:
    from lion_pytorch import Lion

    assert_same_path(lambda p: zoo.Lion(p, **options), lambda p: Lion(p, **options), list(SHAPES.values()), 2e-5)


MUON = [
    {"lr": 0.02},
    {"lr": 0.02, "nesterov": False, "momentum": 0.8, "weight_decay": 0.5},
    {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw"},
    {"lr": 0.02, "adjust_lr_fn": "original", "ns_steps": 3},
    {"lr": 0.02, "ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 8},
]


@pytest.mark.parametrize("options", MUON, ids=str)
def test_muon_is_torchs_in_bfloat16(options: dict[str, Any]) -> None:
    assert_same_path(lambda p: zoo.Muon(p, **options), lambda p: torch.optim.Muon(p, **options), MATRICES, 2e-2)


@pytest.mark.parametrize("options", MUON, ids=str)
def test_muon_is_torchs_in_float32(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.optim.Muon casts to bfloat16; with that cast taken out, the two agree to float32 rounding."""
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)
    assert_same_path(
        lambda p: zoo.Muon(p, orthogonalize_dtype=torch.float32, **options),
        lambda p: torch.optim.Muon(p, **options),
        MATRICES,
        2e-5,
    )


SCION = [("column", "COL", {}), ("row", "ROW", {}), ("euclidean", "BIAS", {}), ("Max(scale='fan_in')", "SIGN", {})]


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize(("norm", "theirs", "options"), SCION)
def test_scion_is_pytorch_optimizers(norm: str, theirs: str, options: dict[str, Any], constrained: bool) -> None:
    from pytorch_optimizer import SCION as Reference
    from pytorch_optimizer.optimizer.scion import LMONorm

    shapes: list[tuple[int, ...]] = [(7,)] if norm == "euclidean" else MATRICES
    assert_same_path(
        lambda p: zoo.Scion(p, lr=0.02, momentum=0.9, radius=3.0, constrained=constrained, norm=norm),
        lambda p: Reference(p, 0.02, 0.1, constrained, LMONorm[theirs], options, 3.0),
        shapes,
        2e-5,
    )


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float32, 2e-5)], ids=str)
def test_spectral_scion_is_pytorch_optimizers(
    constrained: bool, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytorch_optimizer import SCION as Reference
    from pytorch_optimizer.optimizer import scion

    newton_schulz = functools.partial(scion.zero_power_via_newton_schulz_5, dtype=dtype)
    monkeypatch.setattr(scion, "zero_power_via_newton_schulz_5", newton_schulz)
    spectral = {"orthogonalize": "newton-schulz", "orthogonalize_dtype": dtype}
    assert_same_path(
        lambda p: zoo.Scion(p, lr=0.02, radius=3.0, constrained=constrained, **spectral),
        lambda p: Reference(p, 0.02, 0.1, constrained, scion.LMONorm.SPECTRAL, scale=3.0),
        MATRICES,
        tolerance,
    )


def test_constrained_scion_is_muon_with_weight_decay() -> None:
    """A Frank-Wolfe step of rate lr in the ball of a radius is a step lr * radius with weight decay 1 / radius."""
    radius, exact = 5.0, {"orthogonalize": "exact", "orthogonalize_dtype": None}
    assert_same_path(
        lambda p: zoo.Scion(p, lr=0.01, radius=radius, constrained=True, **exact),
        lambda p: zoo.Muon(
            p, 0.01 * radius, 1 / radius, 0.9, nesterov=False, adjust_lr_fn="spectral_unclamped", **exact
        ),
        MATRICES,
        2e-5,
    )


@pytest.mark.parametrize("scale", [1e-3, 1e-5, 1e-9])
def test_adafactor_is_torchs_for_small_gradients(scale: float) -> None:
    """Where its least divisor counts, for the whole second moment of a vector and for the factors of a matrix."""
    assert_same_path(zoo.Adafactor, torch.optim.Adafactor, list(SHAPES.values()), 2e-5, scale=scale)


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
        list(SHAPES.values()),
        2e-5,
    )


def test_ademamix_without_the_slow_average_is_adamw() -> None:
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
    assert_same_path(
        lambda p: zoo.AdEMAMix(p, alpha=0.0, **options),
        lambda p: torch.optim.AdamW(p, **options),
        list(SHAPES.values()),
        2e-5,
    )


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


@pytest.mark.parametrize("options", LARS, ids=str)
def test_lars_is_pytorch_optimizers_on_a_model(options: dict[str, Any]) -> None:
    """Its vectors and scalars, too: plain SGD without decay."""
    from pytorch_optimizer import LARS as Reference

    options = {**options, "lr": 0.1}
    assert_same_path(
        lambda p: zoo.LARS(as_model(p), **options),
        lambda p: Reference(p, **options),
        [*SHAPES.values(), (), (4, 3, 2)],
        2e-5,
    )


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
        [*SHAPES.values(), ()],
        2e-5,
    )
