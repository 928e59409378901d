"""HTMuon, NuMuon and SPECTRA by their recurrences, and where they meet their relatives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normopt import zoo
from tests.support.paths import MATRICES, assert_same_path
from tests.support.strategies import assert_close
from tests.support.written import EXACT, State, Written, average, gaussian, single


@pytest.mark.parametrize("options", [{}, {"power": 0.5, "momentum": 0.8, "nesterov": True}, {"power": 1.0}], ids=str)
def test_htmuon_by_its_recurrence(options: dict[str, Any]) -> None:
    """U S^power V^T over its Schatten norm with p = 1 + 1 / power, which the paper does not divide by."""
    power = options.get("power", 0.125)

    def update(g: Tensor, state: State, step: int) -> Tensor:
        m = average(g, state, options.get("momentum", 0.95), options.get("nesterov", False))
        u, s, vh = torch.linalg.svd(m, full_matrices=False)
        s = s**power
        length = s.pow(1 + 1 / power).sum() ** (1 / (1 + 1 / power))
        return 0.02 * math.sqrt(max(1, g.shape[0] / g.shape[1])) * (u * s) @ vh / length

    assert_same_path(lambda p: zoo.HTMuon(p, **options), lambda p: Written(p, update, 0.02 * 0.1), MATRICES, 2e-5)


@pytest.mark.parametrize("options", [{}, {"rank_fraction": 0.5, "momentum": 0.8, "weight_decay": 0.0}], ids=str)
def test_numuon_by_its_recurrence(options: dict[str, Any]) -> None:
    lr = 0.02

    def update(g: Tensor, state: State, step: int) -> Tensor:
        u, _, vh = torch.linalg.svd(average(g, state, options.get("momentum", 0.95), False), full_matrices=False)
        k = math.ceil(options.get("rank_fraction", 0.25) * min(g.shape))
        return lr * u[:, :k] @ vh[:k]

    assert_same_path(
        lambda p: zoo.NuMuon(p, lr, **options),
        lambda p: Written(p, update, lr * options.get("weight_decay", 0.1)),
        MATRICES,
        2e-5,
    )


def test_numuon_goes_from_nuclear_descent_to_muon() -> None:
    g = gaussian(6, 10)
    one, all_of_them = (single(zoo.NuMuon, g, rank_fraction=fraction) for fraction in (0.01, 1.0))
    assert_close(one, single(zoo.NuclearDescent, g, scale="unit"), 1e-9)
    assert_close(all_of_them, single(zoo.Muon, g, **EXACT), 1e-9)


def test_the_rank_can_be_scheduled() -> None:
    w = nn.Parameter(torch.zeros(6, 10))
    optimizer = zoo.NuMuon([w], 1.0, weight_decay=0.0, momentum=0.0)
    for k in (6, 3, 1):
        before = w.detach().clone()
        optimizer.param_groups[0]["rank_fraction"] = k / 6
        w.grad = torch.randn(6, 10)
        optimizer.step()
        assert int(torch.linalg.matrix_rank(w.detach() - before)) == k


@pytest.mark.parametrize("options", [{}, {"clip": 1.0, "betas": (0.5, 0.9), "weight_decay": 0.0}], ids=str)
def test_spectra_by_its_recurrence(options: dict[str, Any]) -> None:
    lr, (beta1, beta2) = 1e-3, options.get("betas", (0.9, 0.95))

    def update(g: Tensor, state: State, step: int) -> Tensor:
        m, v = (state.setdefault(key, torch.zeros_like(g)) for key in "mv")
        m.mul_(beta1).add_((1 - beta1) * g)
        v.mul_(beta2).add_((1 - beta2) * g.square())
        d = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + 1e-8)
        u, s, vh = torch.linalg.svd(d, full_matrices=False)
        return lr * (u * s.clamp(max=options.get("clip", 10.0))) @ vh

    assert_same_path(
        lambda p: zoo.SPECTRA(p, lr, **options),
        lambda p: Written(p, update, lr * options.get("weight_decay", 0.1)),
        MATRICES,
        2e-5,
    )


def test_spectra_that_cuts_nothing_is_adamw() -> None:
    assert_same_path(
        lambda p: zoo.SPECTRA(p, 1e-3, clip=1e3),
        lambda p: zoo.AdamW(p, 1e-3, betas=(0.9, 0.95), weight_decay=0.1),
        MATRICES,
        1e-5,
    )
