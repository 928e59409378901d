"""Muon's relatives beside their references, and what each of them promises."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normopt import EMA, Chain, Constant, CoshScaled, Euclidean, LowRank, Max, Smoothed, Spectral, SteepestDescent, zoo
from normopt.report import state_bytes
from tests.support.paths import MATRICES, assert_same_path
from tests.support.strategies import assert_close, from_spectrum
from tests.support.written import EXACT, FLOAT32, State, Written, average, gaussian, newton_schulz, polar, single

# NorMuon -------------------------------------------------------------------------------------------------------------

NORMUON = [{}, {"momentum": 0.8, "beta2": 0.7, "weight_decay": 0.1}, {"nesterov": False, "ns_steps": 4}]


@pytest.mark.parametrize("options", NORMUON, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float32, 2e-5)], ids=str)
def test_normuon_is_pytorch_optimizers(
    options: dict[str, Any], dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytorch_optimizer import NorMuon
    from pytorch_optimizer.optimizer.muon import normuon
    from pytorch_optimizer.optimizer.muon.normuon import zero_power_via_newton_schulz_5

    partial = functools.partial(zero_power_via_newton_schulz_5, dtype=dtype)
    monkeypatch.setattr(normuon, "zero_power_via_newton_schulz_5", partial)
    assert_same_path(
        lambda p: zoo.NorMuon(p, orthogonalize_dtype=dtype, **options),
        lambda p: NorMuon([{"params": p, "use_muon": True}], foreach=False, **options),
        MATRICES,
        tolerance,
    )


@pytest.mark.parametrize(("m", "n"), MATRICES)
def test_normuon_keeps_the_polar_factors_length_and_evens_out_its_rows(m: int, n: int) -> None:
    """||polar||_F = sqrt(min(m, n)); at the first step v = (1 - beta2) mean(o^2), so that all rows become equal."""
    update = single(zoo.NorMuon, gaussian(m, n), **EXACT)
    assert_close(update.norm(), torch.tensor(max(1, m / n) ** 0.5 * min(m, n) ** 0.5, dtype=torch.float64), 1e-9)
    assert_close(update.norm(dim=1), update.norm(dim=1).mean().expand(m), 1e-7)


# AdaMuon -------------------------------------------------------------------------------------------------------------

ADAMUON = [{}, {"momentum": 0.8, "weight_decay": 0.1, "eps": 0.1}, {"nesterov": False, "ns_steps": 4}]


@pytest.mark.parametrize("options", ADAMUON, ids=str)
def test_adamuon_by_its_recurrence(options: dict[str, Any]) -> None:
    """Chongjie-Si/AdaMuon, whose class needs a GPU; its second moment is bfloat16, here float32."""
    settings = {"momentum": 0.95, "eps": 1e-8, "nesterov": True, "ns_steps": 5, "weight_decay": 0.01, **options}
    beta, lr = settings["momentum"], 0.02

    def update(g: Tensor, state: State, step: int) -> Tensor:
        o = newton_schulz(average(g, state, beta, settings["nesterov"]).sign(), settings["ns_steps"])
        v = state.setdefault("v", torch.zeros_like(g))
        v.mul_(beta).add_((1 - beta) * o**2)
        d = o / (v.sqrt() + settings["eps"])
        return lr * 0.2 * math.sqrt(g.numel()) / d.norm() * d

    assert_same_path(
        lambda p: zoo.AdaMuon(p, **FLOAT32, **options),
        lambda p: Written(p, update, lr * settings["weight_decay"]),
        MATRICES,
        2e-5,
    )


def test_adamuon_of_pytorch_optimizer_is_another_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no sign before the polar factor, no Nesterov, a second beta, and corrects the second moment's bias.

    Its first update is the sign of a polar factor, which bfloat16 does not know of small entries: float32 only.
    """
    from pytorch_optimizer import AdaMuon
    from pytorch_optimizer.optimizer.muon import adamuon
    from pytorch_optimizer.optimizer.muon.adamuon import zero_power_via_newton_schulz_5

    partial = functools.partial(zero_power_via_newton_schulz_5, dtype=torch.float32)
    monkeypatch.setattr(adamuon, "zero_power_via_newton_schulz_5", partial)
    chain = Chain(Spectral("unit", "newton-schulz"), Smoothed(Max(), 0.95, 1e-10), Euclidean())
    assert_same_path(
        lambda p: SteepestDescent(p, 0.02, chain, EMA(0.9), Constant(0.2)),
        lambda p: AdaMuon([{"params": p, "use_muon": True}], lr=0.02),
        MATRICES,
        2e-5,
    )


@pytest.mark.parametrize(("m", "n"), [(6, 10), (10, 6)])
def test_adamuon_moves_every_entry_equally_at_first(m: int, n: int) -> None:
    """v = (1 - beta) o^2, so that o / sqrt(v) is a sign over sqrt(1 - beta); the length makes it 0.2 sign."""
    g = gaussian(m, n)
    assert_close(single(zoo.AdaMuon, g, **EXACT), 0.2 * polar(g.sign()).sign(), 1e-5)


# Muon+ ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["none", "row", "col", "row_col", "col_row"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.8, "nesterov": False, "weight_decay": 0.5}], ids=str)
def test_muonplus_by_its_recurrence(normalize: str, options: dict[str, Any]) -> None:
    """K1seki221/MuonPlus: a sum of gradients, and 1e-7 under the roots, which does not show."""
    lr, beta = 0.02, options.get("momentum", 0.95)

    def update(g: Tensor, state: State, step: int) -> Tensor:
        b = state.setdefault("b", torch.zeros_like(g))
        b.mul_(beta).add_(g)
        u = newton_schulz(g + beta * b if options.get("nesterov", True) else b)
        for side in normalize.removeprefix("none").split("_") if normalize != "none" else []:
            u = u / (u.square().sum(dim={"row": 1, "col": 0}[side], keepdim=True) + 1e-7).sqrt()
        return lr * math.sqrt(g.shape[0] / g.shape[1]) * u

    assert_same_path(
        lambda p: zoo.MuonPlus(p, lr, normalize=normalize, **FLOAT32, **options),
        lambda p: Written(p, update, lr * options.get("weight_decay", 0.1)),
        MATRICES,
        2e-5,
    )


def test_muonplus_without_normalization_is_muon() -> None:
    assert_same_path(
        lambda p: zoo.MuonPlus(p, 0.02, normalize="none"),
        lambda p: zoo.Muon(p, 0.02, adjust_lr_fn="spectral_unclamped"),
        MATRICES,
        1e-7,
    )


def test_muonplus_normalizes_what_a_polar_factor_has_not_normalized_already() -> None:
    """Rows of a wide U V^T are unit vectors, as U V^T V U^T = 1: only its columns are left to do; tall, its rows."""
    wide = gaussian(6, 10)
    for g, idle, active, dim in (wide, "row", "col", 0), (wide.mT, "col", "row", 1):
        plain = single(zoo.MuonPlus, g, normalize="none", **EXACT)
        assert_close(single(zoo.MuonPlus, g, normalize=idle, **EXACT), plain, 1e-9)
        update = single(zoo.MuonPlus, g, normalize=active, **EXACT)
        sizes = update.norm(dim=dim)
        assert_close(sizes, torch.full_like(sizes, math.sqrt(g.shape[0] / g.shape[1])), 1e-9)
        assert (update - plain).abs().max() > 0.01


def test_muonplus_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="did you mean 'row_col'"):
        zoo.MuonPlus([nn.Parameter(torch.zeros(2, 2))], normalize="row-col")


# PolarGrad -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"momentum": 0.8, "weight_decay": 0.1}], ids=str)
def test_polargrad_by_its_recurrence(options: dict[str, Any]) -> None:
    """timlautk/polargrad with a converged polar factor: U and the sum of the singular values."""
    lr = 0.02

    def update(g: Tensor, state: State, step: int) -> Tensor:
        m = average(g, state, options.get("momentum", 0.95), nesterov=False)
        return lr * torch.linalg.svdvals(m).sum() * polar(m)

    assert_same_path(
        lambda p: zoo.PolarGrad(p, lr, **EXACT, **options),
        lambda p: Written(p, update, lr * options.get("weight_decay", 0.0)),
        MATRICES,
        2e-5,
    )


@pytest.mark.parametrize(("m", "n"), MATRICES)
def test_polargrad_is_steepest_descent(m: int, n: int) -> None:
    """``d = ||g|| polar(g)`` has <g, d> = ||g||^2 = ||d||^2 in nuclear and spectral norm, and is as long as g is."""
    g = gaussian(m, n)
    d, dual = single(zoo.PolarGrad, g, momentum=0.0, **EXACT), torch.linalg.svdvals(g).sum()
    assert_close((g * d).sum(), dual**2, 1e-9)
    assert_close(torch.linalg.svdvals(d).max(), dual, 1e-9)
    assert_close(single(zoo.PolarGrad, 3 * g, momentum=0.0, **EXACT), 3 * d, 1e-9)


# Dion ----------------------------------------------------------------------------------------------------------------

DION = [{}, {"rank_fraction": 0.5}, {"rank_fraction": 0.3, "mu": 0.7, "weight_decay": 0.1}, {"mu": 0.0}]


@pytest.mark.parametrize("options", DION, ids=str)
def test_dion_by_its_recurrence(options: dict[str, Any]) -> None:
    """microsoft/dion on one device, with Householder's QR, from the same Q."""
    lr, mu, fraction = 0.02, options.get("mu", 0.95), options.get("rank_fraction", 1.0)

    def update(g: Tensor, state: State, step: int) -> Tensor:
        m, n = g.shape
        if not state:
            state["M"], state["Q"] = torch.zeros_like(g), LowRank(fraction).init_state(g)["basis"]
            assert state["Q"].shape == (min(m, n), math.ceil(fraction * min(m, n)))
        state["M"] += g
        tall = state["M"] if m >= n else state["M"].mT
        p = torch.linalg.qr(tall @ state["Q"]).Q
        r = tall.mT @ p
        tall -= (1 - mu) * p @ r.mT
        state["Q"] = r / (r.norm(dim=0) + 1e-8)
        product = p @ state["Q"].mT
        return lr * math.sqrt(m / n) * (product if m >= n else product.mT)

    assert_same_path(
        lambda p: zoo.Dion(p, lr, **options),
        lambda p: Written(p, update, lr * options.get("weight_decay", 0.01)),
        MATRICES,
        2e-5,
    )


@pytest.mark.parametrize(("m", "n"), MATRICES)
def test_dion_at_full_rank_takes_the_whole_gradient_and_tends_to_the_polar_factor(m: int, n: int) -> None:
    """With mu = 0, ``M <- M - P P^T M``, which is 0 where P spans the range of M: as wide as the shorter side, it does.

    Fed the same gradient, each step is one of a power iteration, ``Q <- M^T QR(M Q)``: P and Q become the singular
    vectors, at the rate of the ratio of neighbouring singular values squared, here 1/4, and ``P Q^T`` the polar factor.
    """
    g = from_spectrum(m, n, 2.0 ** -torch.arange(6, dtype=torch.float64))
    low_rank = LowRank(1.0, 0.0)
    state = low_rank.init_state(g)
    for _ in range(60):
        update = low_rank(g, state, None) / math.sqrt(m / n)  # type: ignore[arg-type]
        assert state["buffer"].abs().max() < 1e-12
        left = update if m >= n else update.mT
        assert_close(left @ torch.linalg.pinv(left) @ (g if m >= n else g.mT), g if m >= n else g.mT, 1e-8)
    assert_close(update, Spectral("unit", "exact").dualize(g), 1e-8)


@pytest.mark.parametrize(("m", "n"), MATRICES)
@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.1])
def test_dion_has_one_length_and_loses_nothing(m: int, n: int, fraction: float) -> None:
    """``||P Q^T||_F^2 = tr(Q^T Q)``, the rank, for P has orthonormal columns and Q columns of length 1.

    What leaves M is ``(1 - mu) P P^T M``, of that rank; at full rank ``(1 - mu) M``, which makes M a heavy ball.
    Whatever the rank, M and what has left it add up to the sum of all gradients.
    """
    mu, rank = 0.6, math.ceil(fraction * min(m, n))
    w = nn.Parameter(torch.zeros(m, n, dtype=torch.float64))
    optimizer = zoo.Dion([w], 1.0, mu, 0.0, fraction)
    total, left = torch.zeros_like(w), torch.zeros_like(w)
    for _ in range(5):
        before = w.detach().clone()
        w.grad = gaussian(m, n)
        total += w.grad
        held = optimizer.state[w]["buffer"] + w.grad if optimizer.state[w] else w.grad.clone()
        optimizer.step()
        update = before - w.detach()
        assert_close(update.norm(), torch.tensor(math.sqrt(rank * m / n), dtype=torch.float64), 1e-9)
        lost = held - optimizer.state[w]["buffer"]
        left += lost
        assert torch.linalg.matrix_rank(lost) == rank
        assert rank < min(m, n) or torch.allclose(lost, (1 - mu) * held, atol=1e-9)
    assert_close(left + optimizer.state[w]["buffer"], total, 1e-9)


@pytest.mark.parametrize(("m", "n"), MATRICES)
def test_dion_stays_in_the_range_of_the_gradient_and_survives_its_absence(m: int, n: int) -> None:
    """QR fills up what a rank-deficient M has not got; normalized, rounding errors would be as large as the rest.

    In microsoft/dion they are; and without its guard a gradient of 0 leaves ``Q = 0``, from which nothing recovers.
    """
    u, v = torch.linalg.qr(gaussian(m, 2)).Q, torch.linalg.qr(gaussian(n, 2)).Q
    low_rank = LowRank()
    zero = torch.zeros(m, n, dtype=torch.float64)
    state = low_rank.init_state(zero)
    basis = state["basis"].clone()
    assert not low_rank(zero, state, None).any() and torch.equal(state["basis"], basis)  # type: ignore[arg-type]
    for _ in range(3):
        update = low_rank(u @ torch.diag(torch.rand(2).double() + 1) @ v.mT, state, None)  # type: ignore[arg-type]
        assert_close(u @ u.mT @ update @ v @ v.mT, update, 1e-9)
        assert_close(update.norm(), torch.tensor(math.sqrt(2 * m / n), dtype=torch.float64), 1e-9)


def test_dion_keeps_less_than_adam() -> None:
    w = nn.Parameter(torch.zeros(32, 64))
    w.grad = torch.randn(32, 64)
    optimizer = zoo.Dion([w], rank_fraction=0.25)
    optimizer.step()
    assert state_bytes(optimizer.state[w]) == 4 * (32 * 64 + 8 * 32 + 1)


# AuON ----------------------------------------------------------------------------------------------------------------

AUON = [{}, {"momentum": 0.8, "weight_decay": 0.1, "gamma": 4.0}]


def auon(lr: float, momentum: float = 0.95, gamma: float = 1.5, polar_steps: int = 0, **_: Any) -> Any:
    """ryyzn9/AuON, with its 1e-7 and 1e-8."""

    def update(g: Tensor, state: State, step: int) -> Tensor:
        u = average(g, state, momentum, nesterov=True)
        u = newton_schulz(u, polar_steps) if polar_steps else u
        x = gamma * u / (u.norm() + 1e-7)
        return lr * u / (x.cosh().square().mean().sqrt() + 1e-8)

    return update


@pytest.mark.parametrize("options", AUON, ids=str)
def test_auon_by_its_recurrence(options: dict[str, Any]) -> None:
    decay = 0.2 * options.get("weight_decay", 0.0)
    assert_same_path(
        lambda p: zoo.AuON(p, 0.2, **options),
        lambda p: Written(p, auon(0.2, **options), decay),
        [*MATRICES, (7,)],
        2e-5,
    )


@pytest.mark.parametrize("options", [*AUON, {"ns_steps": 3}], ids=str)
def test_hybrid_auon_by_its_recurrence(options: dict[str, Any]) -> None:
    decay = 0.05 * options.get("weight_decay", 0.0)
    rule = auon(0.05, polar_steps=options.get("ns_steps", 5), **options)
    assert_same_path(lambda p: zoo.HybridAuON(p, 0.05, **options), lambda p: Written(p, rule, decay), MATRICES, 2e-5)


@pytest.mark.parametrize("gamma", [0.0, 1.5, 4.0])
@pytest.mark.parametrize("size", [4, 32, 256])
def test_auons_brake_is_nearly_inert(gamma: float, size: int) -> None:
    """What is divided by is r with r^2 = mean(cosh^2 x) = 1 + mean(sinh^2 x) and ||x|| = gamma.

    sinh(t)^2 / t^2 grows with |t| <= gamma from 1, so that gamma^2 / size^2 <= r^2 - 1 <= sinh(gamma)^2 / size^2; the
    upper bound is reached where a single entry is not 0.
    """
    one = torch.zeros(size, size, dtype=torch.float64)
    one[0, 0] = 5.0
    for g in gaussian(size, size), one:
        braked = CoshScaled(gamma)(g, {}, None)  # type: ignore[arg-type]
        excess = (g.norm() / braked.norm()) ** 2 - 1
        assert gamma**2 / size**2 - 1e-12 <= excess <= math.sinh(gamma) ** 2 / size**2 + 1e-12
        assert_close(braked * (1 + excess) ** 0.5, g, 1e-9)
    assert excess == pytest.approx(math.sinh(gamma) ** 2 / size**2, abs=1e-12)


def test_auon_is_sgd_with_averaged_gradients() -> None:
    """On a (256 x 256) matrix the brake of 1 + 2e-5 cannot be told from none within 1e-4 of the way."""
    assert_same_path(
        lambda p: zoo.AuON(p, 0.1),
        lambda p: SteepestDescent(p, 0.1, "identity", EMA(0.95, nesterov=True)),
        [(256, 256)],
        1e-4,
        steps=25,
    )
