"""Aurora by its rule, and what it promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import normopt
from normopt import EqualRows, Spectral, zoo
from normopt.ingredient import Context
from normopt.nn import GPT
from tests.support.paths import MATRICES, assert_same_path
from tests.support.written import FLOAT32, State, Written, average, gaussian, newton_schulz, polar


def once(direction: EqualRows, g: Tensor) -> Tensor:
    return direction(g[None], {}, Context(g[None], g[None], 1, 0.1, direction, lambda: g[None]))[0]


@pytest.mark.parametrize("shape", [(24, 6), (6, 24), (7, 7)])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_aurora_by_its_rule(shape: tuple[int, int], rounds: int) -> None:
    g = gaussian(*shape) * gaussian(shape[0], 1).exp()
    tall = g if shape[0] >= shape[1] else g.mT
    d = 1 / tall.norm(dim=1, keepdim=True)
    for _ in range(rounds):
        u = polar(d * tall)
        d = d * (tall.shape[1] / tall.shape[0]) ** 0.5 / u.norm(dim=1, keepdim=True)
    expected = polar(g) if shape[0] == shape[1] else u if shape[0] > shape[1] else u.mT
    for size in (1e-20, 1.0, 1e20):
        torch.testing.assert_close(
            once(EqualRows(Spectral("unit", "exact"), rounds), size * g), expected, rtol=0, atol=1e-9
        )


def test_rows_are_equally_long_and_columns_orthonormal() -> None:
    g = gaussian(256, 64) * gaussian(256, 1).exp()
    for rounds, spread in [(2, 0.05), (3, 0.015)]:
        u = once(EqualRows(Spectral("unit", "exact"), rounds), g)
        assert (2 * u.norm(dim=1) - 1).abs().max() < spread
        torch.testing.assert_close(u.mT @ u, torch.eye(64, dtype=torch.float64))
    g[3] = 0.0
    u = once(EqualRows(Spectral("unit", "exact")), g)
    assert u.isfinite().all() and not u[3].any()
    assert not once(EqualRows(Spectral("unit", "exact")), torch.zeros(5, 3).double()).any()


@pytest.mark.parametrize("options", [{}, {"rounds": 3, "momentum": 0.8, "nesterov": False}], ids=str)
def test_the_optimizer_by_its_recurrence(options: dict[str, Any]) -> None:
    lr = 0.02

    def update(g: Tensor, state: State, step: int) -> Tensor:
        m = average(g, state, options.get("momentum", 0.95), options.get("nesterov", True))
        tall = m if g.shape[0] >= g.shape[1] else m.mT
        d, u = 1 / tall.norm(dim=1, keepdim=True), newton_schulz(m)
        for _ in range(options.get("rounds", 2) if g.shape[0] != g.shape[1] else 0):
            u = newton_schulz(d * tall)
            d = d * (tall.shape[1] / tall.shape[0]) ** 0.5 / u.norm(dim=1, keepdim=True)
        u = u if u.shape == g.shape else u.mT
        return lr * max(1, g.shape[0] / g.shape[1]) ** 0.5 * u

    assert_same_path(
        lambda p: zoo.Aurora(p, lr, **FLOAT32, **options), lambda p: Written(p, update, lr * 0.1), MATRICES, 2e-5
    )


def test_aurora_moves_a_model() -> None:
    model = GPT(vocab_size=11, d_model=8, n_layers=1, n_heads=2)
    optimizer = normopt.zoo.Muon(model, lr=0.02, geometry={"linear": {"norm": "EqualRows(Spectral('max1'))"}})
    tokens = torch.randint(0, 11, (4, 6))
    losses = []
    for _ in range(10):
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
