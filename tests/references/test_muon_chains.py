"""Muon2, OLion, MuonEq, RMNP and AdaGO by their recurrences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normopt import zoo
from tests.support.paths import MATRICES, assert_same_path
from tests.support.strategies import assert_close
from tests.support.written import EXACT, FLOAT32, State, Written, average, gaussian, newton_schulz, polar, single


@pytest.mark.parametrize("options", [{}, {"betas": (0.8, 0.9), "weight_decay": 0.0, "eps": 0.1}], ids=str)
def test_muon2_by_its_recurrence(options: dict[str, Any]) -> None:
    lr, (beta1, beta2) = 0.02, options.get("betas", (0.95, 0.95))

    def update(g: Tensor, state: State, step: int) -> Tensor:
        m = average(g, state, beta1, nesterov=False)
        v = state.setdefault("v", torch.zeros_like(g))
        v.mul_(beta2).add_((1 - beta2) * g.square())
        return lr * math.sqrt(g.shape[0] / g.shape[1]) * newton_schulz(m / (v + options.get("eps", 1e-8)).sqrt())

    assert_same_path(
        lambda p: zoo.Muon2(p, lr, **FLOAT32, **options),
        lambda p: Written(p, update, lr * options.get("weight_decay", 0.1)),
        MATRICES,
        2e-5,
    )


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "momentum_2": 0.9}, {"nesterov": False}], ids=str)
def test_olion_by_its_recurrence(options: dict[str, Any]) -> None:
    """Signs are compared, so that an entry next to 0 may go either way: exact polar factors on both sides, float64."""
    settings = {"momentum": 0.95, "momentum_2": 0.98, "nesterov": True, **options}
    g = [gaussian(6, 10) for _ in range(4)]
    w, m, expected = nn.Parameter(torch.zeros_like(g[0])), torch.zeros_like(g[0]), torch.zeros_like(g[0])
    optimizer = zoo.OLion([w], 0.5, weight_decay=0.1, **EXACT, **options)
    for each in g:
        w.grad = each.clone()
        optimizer.step()
        m = settings["momentum_2"] * m + (1 - settings["momentum_2"]) * each
        u = settings["momentum"] * m + (1 - settings["momentum"]) * each if settings["nesterov"] else m
        s = polar(u).sign()
        expected = (1 - 0.05) * expected - 0.5 * 0.2 * math.sqrt(s.numel()) / s.norm() * s
        assert_close(w.detach(), expected, 1e-12)


@pytest.mark.parametrize("equilibrate", ["row", "column", "both"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.8, "nesterov": False, "weight_decay": 0.5}], ids=str)
def test_muoneq_by_its_recurrence(equilibrate: str, options: dict[str, Any]) -> None:
    lr = 0.02

    def update(g: Tensor, state: State, step: int) -> Tensor:
        u = average(g, state, options.get("momentum", 0.95), options.get("nesterov", True))
        rows, columns = (u.square().sum(dim=dim, keepdim=True).sqrt() for dim in (1, 0))
        u = u / {"row": rows, "column": columns, "both": rows * columns}[equilibrate]
        return lr * 0.2 * math.sqrt(max(g.shape)) * newton_schulz(u)

    assert_same_path(
        lambda p: zoo.MuonEq(p, lr, equilibrate=equilibrate, **FLOAT32, **options),
        lambda p: Written(p, update, lr * options.get("weight_decay", 0.1)),
        MATRICES,
        2e-5,
    )


def test_muoneq_ignores_the_sizes_of_rows() -> None:
    g, sizes = gaussian(6, 10), torch.rand(6, 1, dtype=torch.float64) + 0.1
    assert_close(single(zoo.MuonEq, sizes * g, **EXACT), single(zoo.MuonEq, g, **EXACT), 1e-9)
    with pytest.raises(ValueError, match="did you mean 'column'"):
        zoo.MuonEq([nn.Parameter(torch.zeros(2, 2))], equilibrate="columns")


@pytest.mark.parametrize("options", [{}, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.5}], ids=str)
def test_rmnp_by_its_recurrence(options: dict[str, Any]) -> None:
    """``diag(m m^T)^(-1/2) m``."""

    def update(g: Tensor, state: State, step: int) -> Tensor:
        m = average(g, state, options.get("momentum", 0.95), options.get("nesterov", False))
        return 0.02 * torch.diag((m @ m.mT).diagonal() ** -0.5) @ m

    assert_same_path(
        lambda p: zoo.RMNP(p, 0.02, **options),
        lambda p: Written(p, update, 0.02 * options.get("weight_decay", 0.1)),
        MATRICES,
        1e-5,
    )


@pytest.mark.parametrize(
    "options", [{}, {"gamma": 3.0, "eps": 0.01, "v": 0.5, "weight_decay": 0.1, "nesterov": True}], ids=str
)
def test_adago_by_its_recurrence(options: dict[str, Any]) -> None:
    """With the published ``v``; the gradients are longer than 3, and the steps reach 0.01."""
    lr, cap, least = 0.05, options.get("gamma", 10.0), options.get("eps", 5e-4)

    def update(g: Tensor, state: State, step: int) -> Tensor:
        m = average(g, state, 0.95, options.get("nesterov", False))
        square = state.setdefault("v", torch.tensor(options.get("v", 1e-3) ** 2))
        square += min(g.norm().item(), cap) ** 2
        return max(least, lr * min(g.norm().item(), cap) / square.sqrt().item()) * newton_schulz(m)

    assert_same_path(
        lambda p: zoo.AdaGO(p, lr, **FLOAT32, **options),
        lambda p: Written(p, update, lr * options.get("weight_decay", 0.0)),
        MATRICES,
        2e-5,
    )


def test_adago_moves_nothing_at_rate_0() -> None:
    w = nn.Parameter(gaussian(4, 3))
    before, optimizer = w.detach().clone(), zoo.AdaGO([w], torch.tensor(0.0), **EXACT)
    w.grad = gaussian(4, 3)
    optimizer.step()
    assert torch.equal(w, before)
