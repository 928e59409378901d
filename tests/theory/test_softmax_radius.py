"""Steps within the softmax's radius."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normopt
from normopt import softmax_limited_step
from normopt.nn import GPT


def data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(4, 8, generator=draw)
    labels = torch.randint(0, 4, (256,), generator=draw)
    return centres[labels] + torch.randn(256, 8, generator=draw), labels


def test_the_ratio_is_that_of_the_derivative_along_the_step() -> None:
    """Of a linear model: the derivative of its logits is their change."""
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(8, 4), data()
    for lr in (1e-3, 10.0):
        twin = copy.deepcopy(model)
        optimizer, plain = torch.optim.SGD(model.parameters(), lr), torch.optim.SGD(twin.parameters(), lr)
        before = copy.deepcopy(model)
        for each, by in ((model, optimizer), (twin, plain)):
            by.zero_grad()
            F.cross_entropy(each(x), y).backward()
        ratio = softmax_limited_step(optimizer, model, x, target=0.5)
        plain.step()
        change = (twin(x) - before(x)).detach()
        spread = (change.amax(dim=1) - change.amin(dim=1)).max().item()
        assert ratio == pytest.approx(spread / math.pi, rel=1e-4)
        change = (model(x) - before(x)).detach()
        left = (change.amax(dim=1) - change.amin(dim=1)).max().item()
        assert left == pytest.approx(min(spread, 0.5 * math.pi), rel=1e-4)


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_a_spike_of_the_learning_rate_is_survived_where_clipping_does_not(name: str) -> None:
    """10^4 times the rate at one step of 60."""
    losses: dict[str, float] = {}
    x, y = data()
    for kind in ("limited", "clipped"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
        optimizer = normopt.create(name, model, lr=0.01)
        for i in range(60):
            normopt.set_lr(optimizer, 100.0 if i == 30 else 0.01)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if kind == "limited":
                softmax_limited_step(optimizer, model, x)
            else:
                optimizer.step()
            if i >= 30:
                losses[kind] = max(losses.get(kind, 0.0), F.cross_entropy(model(x), y).item())
            if i == 0:
                losses["start"] = loss.item()
    assert losses["limited"] < 2 * losses["start"] < losses["clipped"]


def test_it_sees_a_transformers_attention_and_leaves_the_mode() -> None:
    torch.manual_seed(0)
    model = GPT(vocab_size=11, d_model=8, n_layers=2, n_heads=2)
    tokens = torch.randint(0, 11, (3, 7))
    optimizer = normopt.create("muon", model, lr=5.0)
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    before = [p.detach().clone() for p in model.parameters()]
    ratio = softmax_limited_step(optimizer, model, tokens)
    assert ratio > 1 and model.training
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.isfinite().all() for p in model.parameters())


def test_what_makes_no_sense_is_refused_before_the_step() -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="target must be positive"):
        softmax_limited_step(optimizer, model, torch.ones(1, 3), target=0.0)
    with pytest.raises(ValueError, match="moves no parameter of the model"):
        softmax_limited_step(optimizer, other, torch.ones(1, 3))
    assert torch.equal(model.weight, before)
