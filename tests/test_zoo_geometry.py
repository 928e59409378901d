"""Muon's relatives, stateless optimizers and bare norms beside their references, and what each of them promises."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from strategies import assert_close, from_spectrum, spectrum
from torch import Tensor, nn
from torch.optim import Optimizer

import normopt
from normopt import (
    EMA,
    Aligned,
    Chain,
    Column,
    Constant,
    CoshScaled,
    Euclidean,
    LowRank,
    Max,
    Nuclear,
    Row,
    Sinkhorn,
    Smoothed,
    Spectral,
    SteepestDescent,
    zoo,
)
from normopt.report import state_bytes
from tests.paths import assert_same_path

MATRICES: list[tuple[int, ...]] = [(6, 10), (10, 6), (8, 8)]
FLOAT32 = {"orthogonalize": "newton-schulz", "orthogonalize_dtype": None}
EXACT = {"orthogonalize": "exact", "orthogonalize_dtype": None}
State = dict[str, Tensor]


# Published rules, written out for one tensor -------------------------------------------------------------------------


class Written(Optimizer):
    """``w <- (1 - lr decay) w - update(g, state, step)`` for each tensor by itself."""

    def __init__(self, params: Any, update: Callable[[Tensor, State, int], Tensor], decay: float = 0.0) -> None:
        super().__init__(params, {"update": update, "decay": decay})
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                change = group["update"](p.grad, self.state[p], self.steps)
                p.mul_(1 - group["decay"]).sub_(change)


def average(g: Tensor, state: State, beta: float, nesterov: bool) -> Tensor:
    m = state.setdefault("m", torch.zeros_like(g))
    m.mul_(beta).add_((1 - beta) * g)
    return beta * m + (1 - beta) * g if nesterov else m


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    x = (g.mT if g.shape[0] > g.shape[1] else g) / g.norm()
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if g.shape[0] > g.shape[1] else x


def polar(g: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    return u @ vh


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def single(make: Callable[..., SteepestDescent], g: Tensor, **options: Any) -> Tensor:
    """The update ``(w before - w after) / lr`` of the first step."""
    w = nn.Parameter(torch.zeros_like(g))
    optimizer = make([w], lr=1.0, **options)
    w.grad = g.clone()
    optimizer.step()
    return -w.detach()


def gaussian(m: int, n: int) -> Tensor:
    return torch.randn(m, n, dtype=torch.float64)


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


# SCALE ---------------------------------------------------------------------------------------------------------------


class Language(nn.Module):
    """An embedding, a hidden layer, a vector and a head, of the tensors that are handed in."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__()
        (vocabulary, d), (hidden, _) = params[0].shape, params[1].shape
        self.embed = nn.Embedding(vocabulary, d)
        self.hidden = nn.Linear(d, hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)
        self.embed.weight, self.hidden.weight, self.hidden.bias, self.head.weight = params  # type: ignore[assignment]


LANGUAGE: list[tuple[int, ...]] = [(9, 6), (8, 6), (8,), (9, 8)]


@pytest.mark.parametrize("options", [{}, {"momentum": 0.7, "weight_decay": 0.1, "aux_lr": 0.01}], ids=str)
def test_scale_by_its_recurrence(options: dict[str, Any]) -> None:
    """OptimAI-Lab/Minimalist_LLM_Pretraining: embed_tokens over the vocabulary, the rest over inputs; AdamW in 1-D."""
    lr, beta = 0.02, options.get("momentum", 0.9)

    def over(dim: int, momentum: bool = False) -> Callable[[Tensor, State, int], Tensor]:
        def update(g: Tensor, state: State, step: int) -> Tensor:
            g = average(g, state, beta, nesterov=False) if momentum else g
            return lr * g / g.square().mean(dim=dim, keepdim=True).sqrt().clamp(min=1e-8)

        return update

    def adam(g: Tensor, state: State, step: int) -> Tensor:
        m = average(g, state, 0.9, nesterov=False) / (1 - 0.9**step)
        v = state.setdefault("v", torch.zeros_like(g))
        v.mul_(0.999).add_(0.001 * g**2)
        return options.get("aux_lr", lr) * m / ((v / (1 - 0.999**step)).sqrt() + 1e-8)

    def reference(p: list[Tensor]) -> Optimizer:
        decay = lr * options.get("weight_decay", 0.0)
        rules = [over(0), over(1), adam, over(1, momentum=True)]
        decays = [decay, decay, 0.0, decay]
        groups = [{"params": [w], "update": u, "decay": d} for w, u, d in zip(p, rules, decays, strict=True)]
        return Written(groups, adam)

    assert_same_path(lambda p: zoo.SCALE(Language(p), lr, **options), reference, LANGUAGE, 2e-5)


def test_scale_ignores_the_size_of_each_row() -> None:
    """Each output's row has a root mean square of 1 whatever its gradient's size; one of zeros stays where it is."""
    g = gaussian(6, 10)
    update = single(zoo.SCALE, g)
    assert_close(update.square().mean(dim=1), torch.ones(6, dtype=torch.float64), 1e-9)
    sizes = torch.tensor([1e-6, 1.0, 1e6, 2.0, 3.0, 0.0], dtype=torch.float64)[:, None]
    assert_close(single(zoo.SCALE, sizes * g), update * (sizes > 0), 1e-9)


def test_scale_keeps_less_than_half_of_adams_state() -> None:
    """A head of V d numbers, against 2 (2 V d + the rest): here a tenth; at a large vocabulary at most a quarter."""

    def state_of(name: str) -> int:
        model = normopt.nn.GPT(64, d_model=32, n_layers=2, n_heads=2)
        optimizer = normopt.create(name, model)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        return sum(state_bytes(optimizer.state[p]) for p in model.parameters())

    head = 4 * 64 * 32
    assert head < state_of("scale") < 1.3 * head
    assert state_of("scale") < 0.5 * state_of("adamw")
    assert state_of("sinkgd") < 0.5 * state_of("adamw")


# SWAN and SinkGD -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "lr_ratio": 0.5}], ids=str)
def test_swan_by_its_formula(options: dict[str, Any]) -> None:
    lr, ratio = 0.5, options.get("lr_ratio", 0.05)

    def update(g: Tensor, state: State, step: int) -> Tensor:
        rows = g / g.square().mean(dim=1, keepdim=True).sqrt()
        whitened = polar(rows)
        return lr * ratio * rows.norm() / whitened.norm() * whitened

    assert_same_path(
        lambda p: zoo.SWAN(p, lr, **EXACT, **options),
        lambda p: Written(p, update, lr * options.get("weight_decay", 0.0)),
        MATRICES,
        2e-5,
    )


@pytest.mark.parametrize(("m", "n"), MATRICES)
def test_swan_whitens_rows_of_one_size(m: int, n: int) -> None:
    """The wide update is ``sqrt(n) polar(h)``: its rows are orthogonal, and ||h||_F = sqrt(m n) of rms 1 for any shape.

    Rows of another size change nothing, for they are normalized first.
    """
    g = gaussian(m, n)
    update = single(zoo.SWAN, g, lr_ratio=1.0, **EXACT)
    assert_close(rms(update), torch.ones((), dtype=torch.float64), 1e-9)
    short = update @ update.mT if m <= n else update.mT @ update
    assert_close(short, max(m, n) * torch.eye(min(m, n), dtype=torch.float64), 1e-9)
    assert_close(single(zoo.SWAN, torch.logspace(-3, 3, m).double()[:, None] * g, lr_ratio=1.0, **EXACT), update, 1e-8)


def test_swans_own_polar_factor_is_near_the_exact_one() -> None:
    """Four steps bring singular values above 1e-2 of the largest into [0.77, 1.06]."""
    g = gaussian(16, 64)
    update, exact = single(zoo.SWAN, g), single(zoo.SWAN, g, **EXACT)
    assert (update - exact).norm() < 0.23 * exact.norm()
    ratios = torch.linalg.svdvals(update) / torch.linalg.svdvals(exact)
    assert ratios.max() / ratios.min() <= 1.06 / 0.77  # both updates are scaled to one length


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "lr_ratio": 0.5, "iterations": 1}], ids=str)
def test_sinkgd_by_its_formula(options: dict[str, Any]) -> None:
    """Rows to length sqrt(n), then columns to sqrt(m), L times."""
    lr = 0.5

    def update(g: Tensor, state: State, step: int) -> Tensor:
        m, n = g.shape
        for _ in range(options.get("iterations", 5)):
            g = math.sqrt(n) * g / g.norm(dim=1, keepdim=True)
            g = math.sqrt(m) * g / g.norm(dim=0, keepdim=True)
        return lr * options.get("lr_ratio", 0.05) * g

    assert_same_path(
        lambda p: zoo.SinkGD(p, lr, **options),
        lambda p: Written(p, update, lr * options.get("weight_decay", 0.0)),
        MATRICES,
        2e-5,
    )


def sinkhorn(g: Tensor, iterations: int) -> Tensor:
    return Sinkhorn(iterations)(g, {}, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("m", "n"), [(6, 10), (10, 6), (8, 8), (16, 64)])
def test_sinkhorns_limit_has_rows_and_columns_of_one_size(m: int, n: int) -> None:
    """The fixed point ``D1 G D2`` is unique, so it is the same for every ``D G D'``, and more iterations keep it."""
    g = gaussian(m, n)
    limit = sinkhorn(g, 200)
    assert_close(limit.square().mean(dim=1), torch.ones(m, dtype=torch.float64), 1e-9)
    assert_close(limit.square().mean(dim=0), torch.ones(n, dtype=torch.float64), 1e-9)
    assert_close(sinkhorn(limit, 1), limit, 1e-9)
    factors = limit / g  # D1 and D2: positive, of rank one
    assert (factors > 0).all() and torch.linalg.svdvals(factors)[1] < 1e-9 * factors.norm()
    scaled = torch.rand(m, 1, dtype=torch.float64).add(0.1) * g * torch.rand(1, n, dtype=torch.float64).add(0.1)
    assert_close(sinkhorn(scaled, 200), limit, 1e-8)


def test_five_iterations_are_enough_for_columns_and_almost_for_rows() -> None:
    """Columns come last, so they are exact after every iteration; the rest is within 1e-4 for badly scaled ones."""
    g = torch.logspace(-2, 2, 64).double()[:, None] * gaussian(64, 256) * torch.logspace(2, -2, 256).double()
    update = single(zoo.SinkGD, g, lr_ratio=1.0)
    assert_close(update.square().mean(dim=0), torch.ones(256, dtype=torch.float64), 1e-9)
    assert (update.square().mean(dim=1).sqrt() - 1).abs().max() < 1e-4
    assert (single(zoo.SinkGD, g, lr_ratio=1.0, iterations=1).square().mean(dim=1).sqrt() - 1).abs().max() > 1e-3


def test_sinkhorn_is_no_duality_map() -> None:
    """A duality map maximizes <g, d> over a ball, so <g, map(g)> >= <g, map(h)> for all h; Sinkhorn's can be beaten."""
    g, h = torch.tensor([[9.0, 1.0], [1.0, 1.0]]).double(), torch.tensor([[5.0, 1.0], [1.0, 5.0]]).double()
    assert (g * sinkhorn(g, 50)).sum() < (g * sinkhorn(h, 50)).sum() - 0.1


def test_zeros_stay_zeros() -> None:
    g = gaussian(6, 8)
    g[2], g[:, 5] = 0, 0
    for direction in Sinkhorn(), CoshScaled(), Aligned(), LowRank():
        state = direction.init_state(g)
        assert not direction(torch.zeros_like(g), state, None).any()  # type: ignore[arg-type]
        for _ in range(3):
            update = direction(g, state, None)  # type: ignore[arg-type]
            assert update.isfinite().all() and update.norm() > 1
            assert update[2].abs().max() < 1e-12 and update[:, 5].abs().max() < 1e-12


# ARO -----------------------------------------------------------------------------------------------------------------

INNER: dict[str, Callable[[Tensor], Tensor]] = {
    "sinkhorn": lambda x: sinkhorn(x, 5),
    "max": torch.sign,
    "row": lambda x: math.sqrt(x.shape[1]) * x / x.norm(dim=1, keepdim=True),
}


@pytest.mark.parametrize("base", INNER)
@pytest.mark.parametrize("options", [{}, {"momentum": 0.8, "weight_decay": 0.1, "scale": 0.5}], ids=str)
def test_aro_by_its_recurrence(base: str, options: dict[str, Any]) -> None:
    """The paper's rule with Householder's QR and a root mean square of 0.2, tall matrices transposed first.

    The last of the rotated rows of a square matrix are nearly 0, and their signs are a matter of rounding errors.
    """
    lr, f = 0.1, INNER[base]

    def update(g: Tensor, state: State, step: int) -> Tensor:
        tall = g.shape[0] > g.shape[1]
        m = average(g, state, options.get("momentum", 0.95), nesterov=False)
        m = m.mT if tall else m
        rotation = state.get("R", torch.eye(m.shape[0]))
        rotation = state["R"] = torch.linalg.qr(m @ f(rotation.mT @ m).mT).Q
        d = rotation @ f(rotation.mT @ m)
        return lr * options.get("scale", 0.2) * (d.mT if tall else d) / rms(d)

    assert_same_path(
        lambda p: zoo.ARO(p, lr, base=base, **options),
        lambda p: Written(p, update, lr * options.get("weight_decay", 0.01)),
        [(6, 16), (16, 6)] if base == "max" else MATRICES,
        2e-5,
    )


@pytest.mark.parametrize("base", INNER)
@pytest.mark.parametrize(("m", "n", "rank"), [(6, 10, 6), (10, 6, 6), (40, 6, 6), (8, 8, 3), (10, 6, 3), (6, 10, 3)])
def test_aro_rotates_nothing_that_the_momentum_has_not_got(base: str, m: int, n: int, rank: int) -> None:
    """Rows of R^T M beyond the rank are rounding errors, and f would make them as large as all others.

    ``R f(R^T M)`` is in the range of M if f is 0 there, whatever it does to the other rows. M is the wide one of the
    momentum and its transpose: for a tall matrix that is the space of its rows. It ends where ``M f(R^T M)^T`` has not
    got the rank of M, from two rows with the same signs: its factor Q then has columns that come from rounding errors.
    """
    g = from_spectrum(m, n, spectrum(rank))
    u, _, vh = torch.linalg.svd(g)
    u, v = u[:, :rank], vh[:rank].mT
    direction = Aligned(zoo.stateless.BASES[base])
    state = direction.init_state(g)
    wide = (g if m <= n else g.mT) / g.norm()
    for i in range(4):
        cross = wide @ direction._inner(wide, state["rotation"], None).mT  # type: ignore[arg-type]
        if base == "max" and i and torch.linalg.matrix_rank(cross) < rank:
            break
        update = direction(g, state, None)  # type: ignore[arg-type]
        assert_close(u @ u.mT @ update if m <= n else update @ v @ v.mT, update, 1e-7)
        if base == "row":  # a multiple of each row: R D R^T M, whose rows are those of M
            assert_close(u @ u.mT @ update @ v @ v.mT, update, 1e-7)


@pytest.mark.parametrize("base", INNER)
def test_rotating_the_longer_side_leaves_the_range(base: str) -> None:
    """The authors' code rotates the rows of a tall matrix: of R^T M, (10 x 6), 4 rows are rounding errors.

    f gives all rows one size, so that 4/10 of the update's square are outside of the range of M; exactly so where f
    divides by the lengths of rows, about that with the others: the sign of a rounding error may be 0.
    """
    g, f, rotation = from_spectrum(10, 6, spectrum(6)), INNER[base], torch.eye(10, dtype=torch.float64)
    for _ in range(4):
        rotation = torch.linalg.qr(g @ f(rotation.mT @ g).mT).Q
        update = rotation @ f(rotation.mT @ g)
    u = torch.linalg.svd(g, full_matrices=False).U
    share = ((update - u @ u.mT @ update).norm() / update.norm()).square().item()
    assert share == pytest.approx(0.4, abs=1e-9 if base == "row" else 0.1)
    ours = single(zoo.ARO, g, base=base)
    if base == "row":
        assert_close(u @ u.mT @ ours, ours, 1e-7)


def test_aro_with_rows_tends_to_the_polar_factor() -> None:
    """``R <- QR(M f(R^T M)^T)``, f dividing rows by their lengths, is a subspace iteration of M M^T.

    In the left singular vectors, R^T M has orthogonal rows, and divided by their lengths they are R^T U V^T.
    """
    for m, n in (6, 10), (10, 6):
        g = from_spectrum(m, n, 2.0 ** -torch.arange(6, dtype=torch.float64))
        direction = Aligned(Row("unit"))
        state = direction.init_state(g)
        for _ in range(60):
            update = direction(g, state, None)  # type: ignore[arg-type]
        assert_close(update, Spectral("unit", "exact").dualize(g), 1e-8)


@pytest.mark.parametrize("base", INNER)
def test_aro_has_one_length(base: str) -> None:
    """Also where f leaves rows at 0, and whatever the length of the gradient."""
    g = gaussian(6, 10)
    for x in g, g.mT, from_spectrum(6, 10, spectrum(2)):
        assert_close(rms(single(zoo.ARO, x, base=base)), torch.tensor(0.2, dtype=torch.float64), 1e-9)
    assert_close(single(zoo.ARO, 1e-30 * g), single(zoo.ARO, g), 1e-9)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a rotation that changes nothing": (lambda: Aligned(Spectral()), "the same in every basis"),
    "memory": (lambda: Aligned(Smoothed(Max())), "no memory"),
    "a length": (lambda: Aligned(normopt.Identity()), "ignore the length"),
    "a rank of 0": (lambda: LowRank(0.0), "rank_fraction must lie in"),
    "more than full rank": (lambda: LowRank(1.5), "rank_fraction must lie in"),
    "no decay": (lambda: LowRank(mu=1.0), "mu must lie in"),
    "no iterations": (lambda: Sinkhorn(0), "iterations must be a whole number"),
    "a negative length": (lambda: CoshScaled(-1.0), "gamma must lie in"),
    "an unknown base": (lambda: zoo.ARO([nn.Parameter(torch.zeros(2, 2))], base="rows"), "did you mean 'row'"),
}


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


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


# Bare norms ----------------------------------------------------------------------------------------------------------


def leading(g: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    return u[:, :1] @ vh[:1]


BARE: dict[str, tuple[Any, Callable[[Tensor], Tensor], Any]] = {
    "normalizedsgd": (zoo.NormalizedSGD, lambda g: g / g.norm(), Euclidean("unit")),
    "spectraldescent": (
        functools.partial(zoo.SpectralDescent, **EXACT),
        lambda g: math.sqrt(g.shape[0] / g.shape[1]) * polar(g),
        Spectral(method="exact"),
    ),
    "columndescent": (
        zoo.ColumnDescent,
        lambda g: math.sqrt(g.shape[0]) * g / g.norm(dim=0, keepdim=True),
        Column(),
    ),
    "rowdescent": (zoo.RowDescent, lambda g: g / g.norm(dim=1, keepdim=True) / math.sqrt(g.shape[1]), Row()),
    "nucleardescent": (
        zoo.NuclearDescent,
        lambda g: math.sqrt(g.shape[0] / g.shape[1]) * leading(g),
        Nuclear(),
    ),
}


@pytest.mark.parametrize("name", BARE)
@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "weight_decay": 0.1}], ids=str)
def test_bare_norms_by_their_recurrences(name: str, options: dict[str, Any]) -> None:
    make, dualize, _ = BARE[name]
    lr = 0.05

    def update(g: Tensor, state: State, step: int) -> Tensor:
        return lr * dualize(average(g, state, options.get("momentum", 0.9), nesterov=False))

    decay = lr * options.get("weight_decay", 0.0)
    assert_same_path(lambda p: make(p, lr, **options), lambda p: Written(p, update, decay), MATRICES, 2e-5)


@pytest.mark.parametrize("name", BARE)
def test_bare_norms_move_by_lr_in_their_norm_and_nothing_moves_further_down(name: str) -> None:
    """``<g, d>`` is largest over the unit ball at ``d = dualize(g)``, where it is the dual norm."""
    make, _, norm = BARE[name]
    g = gaussian(6, 10)
    update = single(make, g)
    assert_close(norm.norm(update), torch.ones((), dtype=torch.float64), 1e-9)
    best = (g * update).sum()
    for other in BARE:
        rival = BARE[other][1](g)
        assert (g * rival).sum() / norm.norm(rival) <= best + 1e-9


def test_spectral_descent_is_torchs_muon_without_nesterov() -> None:
    assert_same_path(
        lambda p: zoo.SpectralDescent(p, 0.02, 0.9, 0.1, scale="max1", orthogonalize="newton-schulz"),
        lambda p: torch.optim.Muon(p, 0.02, momentum=0.9, nesterov=False),
        MATRICES,
        2e-2,
    )


# Whole models --------------------------------------------------------------------------------------------------------

HIDDEN = ["normuon", "adamuon", "muonplus", "polargrad", "dion", "swan", "sinkgd", "aro", "auon", "hybridauon"]
RATIO = {"normuon": 0.5, "polargrad": 0.5, "auon": 0.1, "hybridauon": 0.1}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_is_no_hidden_matrix_moves_by_adamw(name: str) -> None:
    """Exactly as torch's AdamW moves it, and hidden matrices as without a model."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in LANGUAGE]
    a, b = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    whole = normopt.create(name, Language(a), lr=0.02, aux_weight_decay=0.1)
    own = normopt.create(name, [b[1]], lr=0.02)
    betas = (0.8, 0.95) if "auon" in name else (0.9, 0.95)
    adamw = torch.optim.AdamW([b[0], b[2], b[3]], lr=0.02 * RATIO.get(name, 1.0), betas=betas, weight_decay=0.1)
    for _ in range(5):
        for x, y in zip(a, b, strict=True):
            x.grad = torch.randn(x.shape)
            y.grad = x.grad.clone()
        whole.step()
        own.step()
        adamw.step()
    for x, y, w in zip(a, b, start, strict=True):
        assert (x - y).abs().max() <= 2e-5 * (y - w).abs().max()


@pytest.mark.parametrize("name", HIDDEN)
def test_aux_options(name: str) -> None:
    options = {"aux_lr": 0.5, "aux_betas": (0.1, 0.2), "aux_eps": 0.3, "aux_weight_decay": 0.4}
    optimizer = normopt.create(name, Language([nn.Parameter(torch.zeros(s)) for s in LANGUAGE]), lr=0.02, **options)
    groups = {group["role"]: group for group in optimizer.param_groups}
    for role in "embedding", "vector", "unembedding":
        assert groups[role]["lr"] == 0.5 and groups[role]["betas"] == (0.1, 0.2)
        assert groups[role]["eps"] == 0.3 and groups[role]["weight_decay"] == 0.4
    assert groups["linear"]["lr"] == 0.02
    with pytest.raises(TypeError):
        normopt.create(name, [nn.Parameter(torch.zeros(2, 2))], aux_learning_rate=0.1)


@pytest.mark.parametrize("name", ["normuon", "muonplus", "dion", "hybridauon"])
def test_a_learning_rate_can_be_found(name: str) -> None:
    """AdamW's ratio becomes the radius of what it moves."""
    model = Language([nn.Parameter(torch.randn(s)) for s in LANGUAGE])
    optimizer = normopt.create(name, model, lr=1.0, step_size="prodigy")
    radii = {group["role"]: group["radius"] for group in optimizer.param_groups}
    assert radii["linear"] == 1.0 and radii["embedding"] == RATIO.get(name, 1.0)
    assert {float(group["lr"]) for group in optimizer.param_groups} == {1.0}
    for other, error in ("polargrad", TypeError), ("auon", ValueError):  # a length of its own; that of the gradient
        with pytest.raises(error):
            normopt.create(other, [nn.Parameter(torch.zeros(2, 2))], step_size="prodigy")


def test_stages_that_keep_the_length_leave_the_dual_norm_to_those_before() -> None:
    """NorMuon's and HybridAuON's updates are as long as polar factors, SWAN's as rows; a momentum's, as gradients."""
    g, polar_factor = gaussian(6, 10), Spectral("max1", "exact")
    rows = normopt.Grafted(Smoothed(Row("unit")), normopt.Identity())
    for last in rows, CoshScaled():
        chain = Chain(polar_factor, last)
        assert_close(chain.steepness(g, {}), polar_factor.dual_norm(g), 1e-9)
        assert chain.rms((6, 10)) == polar_factor.rms((6, 10))
    swan = Chain(Row("sqrt_in"), normopt.Grafted(polar_factor, normopt.Identity()))
    assert swan.rms((6, 10)) == pytest.approx(1.0)
    for unbounded in Chain(EMA(0.9)), CoshScaled():
        with pytest.raises(ValueError, match="bounds its result in no norm"):
            unbounded.steepness(g, {})


@pytest.mark.parametrize("name", BARE)
def test_bare_norms_move_vectors_by_signs(name: str) -> None:
    params = [nn.Parameter(torch.ones(s)) for s in LANGUAGE]
    how = {"orthogonalize": "polar-express"} if name == "spectraldescent" else {}
    optimizer = normopt.create(name, Language(params), lr=0.25, weight_decay=0.5, **how)
    for p in params:
        p.grad = torch.randn(p.shape)
    optimizer.step()
    assert torch.equal(params[2], 1 - 0.25 * params[2].grad.sign())
    norm = BARE[name][2]
    for p, transpose in (params[0], True), (params[1], False), (params[3], False):
        update = 1 - 0.25 * 0.5 - p.detach()
        size = norm.norm(update.mT if transpose else update)
        assert size == pytest.approx(0.25, rel=0.02)  # SpectralDescent's polar factor is an iteration's


def test_the_bases_of_the_zoo_are_no_optimizers() -> None:
    assert not {"hidden", "normdescent"} & set(normopt.list_optimizers())
