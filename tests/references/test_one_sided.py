"""MOSO and COSMOS by their recurrences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from normopt import LeadingSubspace, zoo
from normopt.ingredient import Context
from tests.support.paths import MATRICES, assert_same_path
from tests.support.strategies import assert_close
from tests.support.written import FLOAT32, State, Written, average, gaussian, newton_schulz, rms


def leading(gram: Tensor, rank: int) -> Tensor:
    return torch.linalg.eigh(gram)[1].flip(-1)[:, :rank]


@pytest.mark.parametrize("options", [{}, {"momentum": 0.8, "rms_beta": 0.9, "shampoo_beta": 0.7}], ids=str)
def test_moso_by_its_recurrence(options: dict[str, Any]) -> None:
    """In float64; columns and rows that a new basis brings in another order take their second moments along."""
    lr, beta = 0.01, options.get("shampoo_beta", 0.95)

    def update(g: Tensor, state: State, step: int) -> Tensor:
        wide = g.shape[0] < g.shape[1]
        g = (g if wide else g.mT).double()
        if step == 1:
            state["c"], state["v"] = (1 - beta) * g @ g.mT, torch.zeros_like(g)
            state["q"] = leading(state["c"], len(g))
            return torch.zeros(g.shape if wide else g.mT.shape)
        m, q, often = average(g, state, options.get("momentum", 0.95), False), state["q"], options.get("rms_beta", 0.95)
        state["v"].mul_(often).add_((1 - often) * (q.mT @ m).square())
        d = q @ (q.mT @ m / (state["v"].sqrt() + 1e-8))
        state["c"].mul_(beta).add_((1 - beta) * m @ m.mT)
        order = (q * (state["c"] @ q)).sum(0).argsort(descending=True)
        state["q"], state["v"] = torch.linalg.qr(state["c"] @ q[:, order])[0], state["v"][order]
        return (lr * (d if wide else d.mT)).float()

    def plain(p: Any) -> Written:
        return Written(p, update)

    assert_same_path(lambda p: zoo.MOSO(p, lr, weight_decay=0.0, **options), plain, MATRICES, 1e-4)


@pytest.mark.parametrize("options", [{}, {"rank": 3, "betas": (0.8, 0.9), "gamma": 0.5, "scale": 0.2}], ids=str)
def test_cosmos_by_its_recurrence(options: dict[str, Any]) -> None:
    lr, (beta1, beta2) = 0.01, options.get("betas", (0.9, 0.95))

    def update(g: Tensor, state: State, step: int) -> Tensor:
        rank = min(options.get("rank", 4), g.shape[1])
        m = average(g, state, beta1, False) / (1 - beta1**step)
        if step == 1:
            u = leading(g.mT @ g, rank)
            s = torch.zeros(rank, rank)
        else:
            average_of_squares = beta2 * state["u"] @ state["s"] @ state["u"].mT + (1 - beta2) * g.mT @ g
            u = torch.linalg.qr(average_of_squares @ state["u"])[0]
            s = beta2 * u.mT @ state["u"] @ state["s"] @ state["u"].mT @ u
        state["u"], state["s"] = u, s + (1 - beta2) * (g @ u).mT @ (g @ u)
        v = state.setdefault("v", torch.zeros(len(g), rank))
        v.mul_(beta2).add_((1 - beta2) * (g @ u).square())
        a = (m @ u / ((v / (1 - beta2**step)).sqrt() + 1e-8)) @ u.mT
        rest = newton_schulz(m - m @ u @ u.mT)
        d = a + options.get("gamma", 0.2) * rest / rms(rest)
        return lr * options.get("scale", 0.1) * d / rms(d)

    def cosmos(p: Any) -> zoo.COSMOS:
        return zoo.COSMOS(p, lr, weight_decay=0.1, **FLOAT32, **{"rank": 4, **options})

    assert_same_path(cosmos, lambda p: Written(p, update, lr * 0.1), MATRICES, 1e-4)


def test_the_whole_space_leaves_no_rest() -> None:
    """Then it is Adam in the right eigenbasis, and rounding errors of the rest are not orthogonalized."""
    g = gaussian(6, 4)
    context = Context(g[None], g[None], 1, 0.1, None, lambda: g[None])
    direction = LeadingSubspace(rank=64)
    state = direction.init_state(g[None])
    d = direction(g[None], state, context)[0]
    q = leading(g.mT @ g, 4)
    assert_close(d, (g @ q).sign() @ q.mT, 1e-6)
    assert_close(direction.apply(g[None], state, context)[0], d, 1e-12)


def test_the_subspace_follows_the_leading_eigenvectors() -> None:
    """Of noisy gradients with three large right singular vectors."""
    basis = torch.linalg.qr(gaussian(12, 12))[0]
    spectrum = torch.tensor([10.0, 8.0, 6.0, *[0.1] * 9], dtype=torch.float64)
    direction = LeadingSubspace(rank=3, beta=0.9)
    state = direction.init_state(torch.zeros(1, 20, 12, dtype=torch.float64))
    for step in range(1, 40):
        g = (gaussian(20, 12) * spectrum @ basis.mT)[None]
        direction(g, state, Context(g, g, step, 0.1, None, lambda g=g: g))
    found = torch.linalg.svdvals(state["basis"][0].mT @ basis[:, :3])
    assert found.min() > 0.999
    torch.testing.assert_close(state["basis"][0].mT @ state["basis"][0], torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 0}, "rank must be a whole number"), ({"factor": -1.0}, "factor must lie"), ({"beta": 1.0}, "beta must")],
)
def test_leading_subspace_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LeadingSubspace(**options)
