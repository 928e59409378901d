"""Large parameters of rules that work entry by entry are worked through in pieces."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normopt
from normopt import SteepestDescent
from normopt.engine import batch
from normopt.engine import kernels as fused

ELEMENTWISE = [
    "sgd",
    "adam",
    "adamax",
    "ademamix",
    "lion",
    "rmsprop",
    "signum",
    "adagrad",
    "nadam",
    "dadaptadam",
    "prodigy",
]


def run(make: Any, steps: int = 5, resume_at: int = 3) -> tuple[list[Tensor], SteepestDescent]:
    """A parameter of several pieces, the last one short, beside small ones; saved and loaded on the way."""
    noise = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=noise, dtype=torch.float64)) for s in [(7, 9), (3, 4), (5,)]]
    optimizer = make(params)
    for i in range(steps):
        if i == resume_at:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = make(params)
            optimizer.load_state_dict(state)
        for p in params:
            p.grad = torch.randn(p.shape, generator=noise, dtype=torch.float64)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_pieces_make_the_same_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(params: list[Tensor]) -> SteepestDescent:
        options = {"weight_decay": 0.1} if name not in ("signum",) else {}
        return normopt.create(name, params, lr=0.1, **options)

    monkeypatch.setattr(fused, "kernel_of", lambda batch: None)
    whole, one = run(make)
    monkeypatch.setattr(batch, "FLAT_ENTRIES", 10)
    parts, several = run(make)
    (large,) = (b for batches in several._batches_of.values() for b in batches if b.params[0] is parts[0])
    assert len(large.pieces()) == 7 and large.taken() == 5
    tolerance = 1e-12 if name in ("prodigy", "dadaptadam") else 0  # their sums are in another order
    for p, q in zip(parts, whole, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        for entry, value in one.state[q].items():
            torch.testing.assert_close(several.state[p][entry], value, rtol=tolerance, atol=tolerance)


def test_what_is_not_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "FLAT_ENTRIES", 10)
    for name, options in [("muon", {}), ("prodigy", {"slice_p": 3}), ("novograd", {})]:
        _, optimizer = run(lambda params, n=name, o=options: normopt.create(n, params[:2], lr=0.1, **o), 2, 9)
        for batches in optimizer._batches_of.values():
            assert all(len(b.pieces()) == 1 for b in batches), name
