"""Steepest descent under bare norms."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normopt
from normopt import Column, Euclidean, Nuclear, Row, Spectral, zoo
from tests.support.models import LANGUAGE, Language
from tests.support.paths import MATRICES, assert_same_path
from tests.support.strategies import assert_close
from tests.support.written import EXACT, State, Written, average, gaussian, polar, single


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
