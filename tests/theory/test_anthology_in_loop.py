"""The Anthology's equivalences (Bernstein & Newhouse, arXiv 2409.20325) through the optimizers themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from normopt import EMA, Max, Prodigy, Smoothed, Spectral, SteepestDescent, zoo
from normopt.engine import batch
from tests.support.paths import assert_same_path

SHAPES = [(5, 9), (9, 5), (6, 6)]


def step(optimizer_of: object, shape: tuple[int, ...], steps: int = 1) -> tuple[Tensor, Tensor]:
    """The last update and its gradient, in float64."""
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
    optimizer = optimizer_of([w])  # type: ignore[operator]
    for _ in range(steps):
        before = w.detach().clone()
        w.grad = torch.randn_like(w)
        optimizer.step()
    return w.detach() - before, w.grad


@pytest.mark.parametrize("shape", [*SHAPES, (7,), ()])
def test_adam_without_memory_is_sign_descent(shape: tuple[int, ...]) -> None:
    for cls in (zoo.Adam, zoo.AdamW):
        update, g = step(lambda p, cls=cls: cls(p, lr=0.1, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0), shape, steps=3)
        torch.testing.assert_close(update, -0.1 * g.sign(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_shampoo_without_memory_is_the_polar_factor(shape: tuple[int, ...]) -> None:
    norm = Spectral(scale="unit", method="exact")
    shampoo = Smoothed(norm, beta=0.0, eps=0.0)
    update, g = step(lambda p: SteepestDescent(p, 0.1, shampoo), shape, steps=3)
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    torch.testing.assert_close(update, -0.1 * u @ vh, rtol=0, atol=1e-8)
    # (the roots of the Gram matrices square the condition number: 1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_without_momentum_is_spectral_descent(shape: tuple[int, ...]) -> None:
    options = {"momentum": 0.0, "weight_decay": 0.0, "adjust_lr_fn": "spectral_unclamped"}
    update, g = step(lambda p: zoo.Muon(p, 0.1, orthogonalize="exact", orthogonalize_dtype=None, **options), shape)
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    torch.testing.assert_close(update, -0.1 * (shape[0] / shape[1]) ** 0.5 * u @ vh, rtol=0, atol=1e-12)


def test_prodigy_without_averages_is_sign_descent_at_escape_velocity() -> None:
    """eta <- max(eta, <g, w_0 - w> / ||g||_1), w <- w - eta sign(g) with the eta from before (section 3.3)."""
    torch.manual_seed(0)
    start, target = torch.randn(50, dtype=torch.float64), 3 * torch.randn(50, dtype=torch.float64)
    w = torch.nn.Parameter(start.clone())
    optimizer = SteepestDescent([w], 1.0, Max(), step_size=Prodigy(beta3=0.0))
    expected, eta, etas = start.clone(), 1e-6, [1e-6]
    for _ in range(40):
        g = expected - target
        w.grad = w.detach() - target
        optimizer.step()
        grown = max(eta, (g @ (start - expected) / g.abs().sum()).item())
        expected, eta = expected - eta * g.sign(), grown
        etas.append(eta)
        torch.testing.assert_close(w.detach(), expected, rtol=1e-5, atol=1e-8)  # d is kept in float32
    assert optimizer.param_groups[0]["d"].item() == pytest.approx(eta, rel=1e-5)
    assert etas[12] > 100 * etas[0], "the step size should grow exponentially at first"
    assert max(etas) < 10 * (target - start).abs().max(), "and stop at the scale of the distance"


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_prodigy_under_adam_is_prodigyopt(scale: float) -> None:
    """With Adam's memory, momentum and eps, which must follow d: gradients of 1e-3 times d0 are far below it."""
    from prodigyopt import Prodigy as Reference

    adam = Smoothed(Max(), bias_correction=False)
    assert_same_path(
        lambda p: SteepestDescent(p, 1.0, adam, EMA(0.9), Prodigy()),
        Reference,
        [(6, 10), (10, 6), (7,)],
        2e-5,
        steps=60,
        scale=scale,
    )


def test_prodigy_of_many_batches_concludes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the parameters are cut into batches and groups, all share one d."""
    estimates = []
    for entries in (1 << 22, 1):
        monkeypatch.setattr(batch, "MAX_ENTRIES", entries)
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(4, 6)) for _ in range(3)]
        groups = [{"params": params[:1]}, {"params": params[1:]}] if entries == 1 else params
        optimizer = SteepestDescent(groups, 1.0, "max", step_size=Prodigy(d0=1e-3))
        for _ in range(20):
            for p in params:
                p.grad = p.detach() - 1
            optimizer.step()
        estimates += [group["d"].item() for group in optimizer.param_groups]
    assert estimates == pytest.approx(estimates[:1] * 3, rel=1e-5)
    assert estimates[0] > 1e-2
