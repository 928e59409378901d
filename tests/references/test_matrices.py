"""Optimizers of hidden matrices leave the other tensors of a model to AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normopt
from tests.support.models import LANGUAGE, Language

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
