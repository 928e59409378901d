"""QK-clip: logits of attention that are kept from growing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normopt import zoo
from normopt.nn import GPT, qk_clip_, record_logits
from normopt.nn.clip import largest_logits
from normopt.nn.layers import Attention
from tests.support.models import gpt

TAU = 2.0


def logits(layer: Attention, x: Tensor) -> Tensor:
    """The largest causal logit of each head, from attention's own inputs."""
    seen: list[Tensor] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        future = torch.ones(query.shape[-2], query.shape[-2], dtype=torch.bool).triu(1)
        seen.append((query @ key.mT).masked_fill(future, -torch.inf).amax(dim=(0, 2, 3)))
        return attend(query, key, value, **options)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        layer(x)
    return seen[0]


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("time", [7, 300])
def test_qk_clip_makes_the_largest_logit_tau(qk_norm: bool, time: int) -> None:
    """Of the heads that exceeded it; the others, and the values, are left as they are."""
    torch.manual_seed(0)
    layer, x = Attention(12, 3, rope_fraction=0.5, qk_norm=qk_norm).double(), torch.randn(2, time, 12).double()
    with torch.no_grad():
        if layer.gain is not None:
            layer.gain.copy_(torch.tensor([5.0, 0.5, 9.0]))
        else:
            layer.qkv.weight.unflatten(0, (3, 3, 4))[0].mul_(torch.tensor([9.0, 0.1, 20.0])[:, None, None])
    before, weights, values = logits(layer, x), copy.deepcopy(layer.state_dict()), layer.qkv.weight[24:].clone()
    assert before[0] > TAU and before[2] > TAU and before[1] < TAU
    record_logits(layer)
    layer(x)
    recorded = qk_clip_(layer, tau=TAU)
    torch.testing.assert_close(recorded[""], before)
    after = logits(layer, x)
    torch.testing.assert_close(after, torch.stack([torch.tensor(TAU).double(), before[1], torch.tensor(TAU).double()]))
    assert torch.equal(layer.qkv.weight[24:], values)
    changed = {name for name, w in layer.state_dict().items() if not torch.equal(w, weights[name])}
    assert changed == ({"gain"} if qk_norm else {"qkv.weight"})
    if not qk_norm:  # queries and keys by the same factor, one for each head
        factors = (layer.qkv.weight / weights["qkv.weight"])[:24].unflatten(0, (2, 3, 4))
        torch.testing.assert_close(factors, factors[:1, :, :1, :1].expand_as(factors))


def test_record_logits_over_batches_in_training_when_asked() -> None:
    model, tokens = gpt(qk_norm=False), torch.arange(24).reshape(2, 12) % 13
    attentions = [block.attention for block in model.blocks]
    model(tokens)
    assert all(layer.max_logits is None for layer in attentions)
    record_logits(model)
    model.eval()
    model(tokens)
    assert all(layer.max_logits is None for layer in attentions)
    model.train()
    model(tokens[:1])
    first = attentions[0].max_logits
    model(tokens[1:])
    model(tokens[:1])
    both = attentions[0].max_logits
    found = qk_clip_(model, tau=1e-3)
    assert set(found) == {"blocks.0.attention", "blocks.1.attention"}
    torch.testing.assert_close(both, torch.maximum(first, logits_of(model, tokens[1:], clipped=False)))
    model(tokens)
    assert all((layer.max_logits < 1e-2).all() for layer in attentions)
    record_logits(model, on=False)
    model(tokens)
    assert all(layer.max_logits is None for layer in attentions)


def logits_of(model: GPT, tokens: Tensor, clipped: bool) -> Tensor:
    fresh = model if clipped else gpt(qk_norm=False)
    return logits(fresh.blocks[0].attention, fresh.blocks[0].attention_norm(fresh.embed(tokens)))


def test_largest_logits_in_blocks_of_queries() -> None:
    query, key = torch.randn(2, 2, 3, 23, 4, generator=torch.Generator().manual_seed(0))
    for block in (1, 5, 23, 100):
        torch.testing.assert_close(largest_logits(query, key, block), largest_logits(query, key))


def test_qk_clip_refuses_what_it_cannot_do() -> None:
    for refused in (qk_clip_, record_logits):
        with pytest.raises(ValueError, match="Linear has no attention module"):
            refused(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"'blocks.0.attention' has no logits; call record_logits"):
        qk_clip_(gpt())
    with pytest.raises(ValueError, match="tau must be positive"):
        qk_clip_(gpt(), tau=0.0)


def test_qk_clip_of_infinite_logits_zeroes_no_head() -> None:
    layer = Attention(8, 2)
    layer.max_logits = torch.tensor([torch.inf, torch.nan])
    before = layer.gain.detach().clone()
    qk_clip_(layer)
    assert torch.equal(layer.gain, before)


def test_qk_clip_trains_a_gpt_without_qk_norm() -> None:
    model, tokens = gpt(qk_norm=False), torch.arange(24).reshape(2, 12) % 13
    record_logits(model)
    optimizer = zoo.Muon(model, lr=0.05)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        qk_clip_(model, tau=0.5)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
