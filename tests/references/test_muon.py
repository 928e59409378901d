"""Muon beside torch's, and Muon++, which keeps the leading singular pairs of the weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normopt import Complement, Max, zoo
from normopt.numerics.singular import singular_values
from tests.support.paths import MATRICES, assert_same_path
from tests.support.streams import gradients

# Muon ----------------------------------------------------------------------------------------------------------------

MUON = [
    {"lr": 0.02},
    {"lr": 0.02, "nesterov": False, "momentum": 0.8, "weight_decay": 0.5},
    {"lr": 0.02, "momentum": 1.0},
    {"lr": 0.02, "momentum": 1.0, "nesterov": False},
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


# Muon++ --------------------------------------------------------------------------------------------------------------


def with_gap(m: int, n: int, second: float, top: int = 1) -> Tensor:
    """A matrix of spectral norm sqrt(m / n), whose other singular values are at most ``second`` of it."""
    noise = torch.Generator().manual_seed(m * n)
    u, s, vh = torch.linalg.svd(torch.randn(m, n, generator=noise, dtype=torch.float64), full_matrices=False)
    s = s / s[0] * second
    s[:top] = torch.linspace(1.0, 0.9, top, dtype=torch.float64) if top > 1 else 1.0
    return (u * s) @ vh * math.sqrt(m / n)


@pytest.mark.parametrize("power_iterations", [None, 2])
@pytest.mark.parametrize("protect", [1, 3])
@pytest.mark.parametrize(("m", "n"), [(6, 10), (10, 6), (8, 8)])
def test_muon_plus_plus_keeps_the_spectral_norm(m: int, n: int, protect: int, power_iterations: int | None) -> None:
    """With S = sqrt(m / n), w = sum s_i u_i v_i^T and k protected pairs, the update d = polar(P) satisfies U_k^T d = 0
    and d V_k = 0, because P does and d has the row and column spaces of P. So (w - lr S d) v_i = w v_i = s_i u_i and
    (w - lr S d)^T u_i = s_i v_i for i <= k: these pairs stay. The rest, r = sum over i > k, moves at right angles to
    them, and |r - lr S d| <= |r| + lr S |d| = s_(k+1) + lr S (Weyl). Hence the norm is s_1 as long as
    s_(k+1) + lr S <= s_1, which is S: here for 20 steps of 0.02 from a second value of at most 0.5 S."""
    w = nn.Parameter(with_gap(m, n, 0.5, protect))
    u, s, vh = torch.linalg.svd(w.detach(), full_matrices=False)
    optimizer = zoo.MuonPlusPlus(
        [w], lr=0.02, protect=protect, power_iterations=power_iterations, orthogonalize="exact"
    )
    stream = gradients(3, (m, n))
    scale = math.sqrt(m / n)
    for _ in range(20):
        second = singular_values(w.detach())[protect]
        assert second + 0.02 * scale <= scale
        w.grad, before = next(stream)[0] + 3 * u[:, :1] @ vh[:1], w.detach().clone()
        optimizer.step()
        d = (before - w.detach()) / (0.02 * scale)
        torch.testing.assert_close(singular_values(d)[: min(m, n) - protect].min(), torch.tensor(1.0).double())
        torch.testing.assert_close(singular_values(w.detach())[:protect], s[:protect], rtol=1e-9, atol=0)
        torch.testing.assert_close(w.detach() @ vh[:protect].mT, u[:, :protect] * s[:protect], rtol=0, atol=1e-9)


def test_muon_lets_the_spectral_norm_go() -> None:
    """The same gradients, which push the leading pair, without protection."""
    w = nn.Parameter(with_gap(8, 8, 0.5))
    u, _, vh = torch.linalg.svd(w.detach())
    optimizer = zoo.Muon([w], lr=0.02, weight_decay=0.0, orthogonalize="exact", orthogonalize_dtype=None)
    for _ in range(20):
        w.grad = -u[:, :1] @ vh[:1]
        optimizer.step()
    assert singular_values(w.detach())[0] == pytest.approx(1.4)


def test_muon_plus_plus_lets_the_norm_grow_when_the_gap_closes() -> None:
    """The condition above is needed: the second value passes the first, and is then the one that stays."""
    w = nn.Parameter(with_gap(8, 8, 0.5))
    u, s, vh = torch.linalg.svd(w.detach())
    optimizer = zoo.MuonPlusPlus([w], lr=0.2, power_iterations=None, orthogonalize="exact")
    for i in range(6):
        w.grad = -u[:, 1:2] @ vh[1:2]
        optimizer.step()
        pushed = float(s[1]) + min(i + 1, 4) * 0.2
        assert singular_values(w.detach())[0] == pytest.approx(max(1.0, pushed))
    assert s[1] + 3 * 0.2 < 1 < s[1] + 4 * 0.2
    torch.testing.assert_close(singular_values(w.detach())[1:], torch.cat((s[:1], s[2:])))  # not moved by roundings


@pytest.mark.parametrize("orthogonalize", ["polar-express", "newton-schulz"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_muon_plus_plus_protects_its_pair_from_rounding_errors(orthogonalize: str, dtype: Any) -> None:
    w = nn.Parameter(with_gap(16, 24, 0.4).float())
    top = singular_values(w.detach())[0]
    optimizer = zoo.MuonPlusPlus([w], lr=0.01, orthogonalize=orthogonalize, orthogonalize_dtype=dtype)
    stream = gradients(4, (16, 24))
    for _ in range(20):
        w.grad = next(stream)[0].float()
        optimizer.step()
    torch.testing.assert_close(singular_values(w.detach())[0], top, rtol=1e-5, atol=0)


def test_muon_plus_plus_finds_the_leading_pairs_of_moving_weights() -> None:
    """Weights that something else moves too: warm vectors follow."""
    noise, w = torch.Generator().manual_seed(0), nn.Parameter(with_gap(9, 7, 0.5, 2))
    optimizer = zoo.MuonPlusPlus([w], lr=1e-3, protect=2, power_iterations=2)
    for _ in range(10):
        with torch.no_grad():
            w.add_(torch.randn(w.shape, generator=noise, dtype=torch.float64), alpha=0.01)
        before = w.detach().clone()
        u, _, vh = torch.linalg.svd(before, full_matrices=False)
        w.grad = torch.randn(w.shape, generator=noise, dtype=torch.float64)
        optimizer.step()
        left, right = optimizer.state[w]["left"], optimizer.state[w]["right"]
        for mine, exact in ((left[0], u[:, :2]), (right[0], vh[:2].mT)):
            torch.testing.assert_close(mine @ mine.mT, exact @ exact.mT, rtol=0, atol=2e-2)
        assert (left[0].mT @ before @ right[0]).fill_diagonal_(0.0).abs().max() < 1e-12  # pair by pair


def test_muon_plus_plus_of_what_has_no_complement() -> None:
    """A row has no complement that an update could move in, and moves as under Muon; so do weights that are 0."""
    for shape in ((1, 5), (5, 1), (4, 4)):
        a, b = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
        first = zoo.MuonPlusPlus([a], lr=0.1, orthogonalize="exact")
        second = zoo.Muon(
            [b], 0.1, 0.0, adjust_lr_fn="spectral_unclamped", orthogonalize="exact", orthogonalize_dtype=None
        )
        for p, optimizer in ((a, first), (b, second)):
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            optimizer.step()
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="changes with the basis"):
        Complement(Max())
    with pytest.raises(ValueError, match="protect must be a whole number"):
        zoo.MuonPlusPlus([nn.Parameter(torch.zeros(2, 2))], protect=0)
