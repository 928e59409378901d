"""Scion beside its reference, and the spheres on which it begins."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from normopt import Max, Smoothed, zoo
from normopt.ingredient import parse
from tests.support.models import gpt
from tests.support.paths import MATRICES, assert_same_path

# References ----------------------------------------------------------------------------------------------------------

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


# Spheres -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("constrained", [False, True])
def test_scion_puts_every_tensor_of_a_gpt_on_its_sphere(constrained: bool, dtype: torch.dtype) -> None:
    model = gpt().to(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = zoo.Scion(model, constrained=constrained)
    optimizer.initialize(torch.Generator().manual_seed(0))
    held = 0
    for group in optimizer.param_groups:
        rule = parse(group["rule"]).resolve(group)
        for p in group["params"]:
            sizes = rule.norm.norm(rule.view.apply(p.detach().double()))
            torch.testing.assert_close(
                sizes, torch.full_like(sizes, group["radius"]), rtol=torch.finfo(dtype).eps * 50, atol=0
            )
            held += 1
    assert held == len(before)
    assert {group["radius"] for group in optimizer.param_groups} == ({50.0, 3000.0} if constrained else {1.0, 60.0})
    for p, old in zip(model.parameters(), before, strict=True):
        if p.ndim > 1:
            assert (p.detach() != old).any(dim=1).all()
        else:
            assert (p.detach() > 0).all()  # gains keep their signs


def test_scions_initialization_is_determined_by_the_generator() -> None:
    models = [gpt() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.manual_seed(hash(id(model)) % 1000)  # the global generator has no part in it
        zoo.Scion(model).initialize(torch.Generator().manual_seed(seed))
    first, same, other = ([p.detach() for p in model.parameters()] for model in models)
    assert all(map(torch.equal, first, same))
    assert not any(torch.equal(p, q) for p, q in zip(first, other, strict=True) if p.ndim > 1)


def test_scions_initialization_keeps_zeros_and_refuses_what_has_no_ball() -> None:
    layer = nn.Linear(4, 4)
    layer.bias.detach().zero_()
    model = nn.Sequential(layer, nn.Linear(4, 4))
    optimizer = zoo.Scion(model)
    optimizer.initialize()
    assert (layer.bias == 0).all()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="before the first step"):
        optimizer.initialize()
    with pytest.raises(ValueError, match="no ball"):
        zoo.Scion(model, geometry={"vector": Smoothed(Max())}).initialize()
