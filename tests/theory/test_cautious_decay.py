"""Weight decay that leaves alone what the update pulls the other way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from normopt import Max, Norm, Spectral, SteepestDescent, WeightDecay, zoo
from tests.support.streams import gradients


def cautiously(w: Tensor, d: Tensor, lr: float, decay: float) -> Tensor:
    return w - lr * d - lr * decay * torch.where(d * w >= 0, w, 0.0)


@pytest.mark.parametrize("norm", [Max(), Spectral(method="exact")], ids=["laid end to end", "matrices"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_cautious_weight_decay_is_its_recurrence(norm: Norm, dtype: torch.dtype) -> None:
    lr, decay, shape = 0.1, 0.5, (4, 6)
    stream = gradients(0, shape)
    w = nn.Parameter(next(stream)[0].to(dtype))
    optimizer = SteepestDescent([w], lr=lr, norm=norm, constraint=WeightDecay(decay, cautious=True))
    for _ in range(10):
        g = next(stream)[0].to(dtype)
        g[0] = 0.0  # where nothing is gained or lost the decay is that of AdamW
        before = w.detach().to(torch.promote_types(dtype, torch.float32), copy=True)
        w.grad = g.clone()
        optimizer.step()
        expected = cautiously(before, norm.dualize(g.to(before.dtype)), lr, decay).to(dtype)
        torch.testing.assert_close(w.detach(), expected, rtol=torch.finfo(dtype).eps * 8, atol=1e-7)


NAMED: dict[str, Callable[..., SteepestDescent]] = {
    "adamw": zoo.AdamW,
    "adam": lambda p, **o: zoo.Adam(p, decoupled_weight_decay=True, **o),
    "lion": zoo.Lion,
    "muon": lambda p, **o: zoo.Muon(p, orthogonalize="exact", orthogonalize_dtype=None, **o),
    "muon++": lambda p, **o: zoo.MuonPlusPlus(p, orthogonalize="exact", **o),
}


@pytest.mark.parametrize("make", NAMED.values(), ids=NAMED)
def test_cautious_weight_decay_of_the_named_optimizers(make: Callable[..., SteepestDescent]) -> None:
    """Against the same optimizer without decay, whose step tells the update."""
    lr, decay, shapes = 0.05, 0.8, ((4, 6), (6, 4))
    stream = gradients(1, *shapes)
    start = next(stream)
    ours, bare = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    first, second = make(ours, lr=lr, weight_decay=decay, cautious=True), make(bare, lr=lr, weight_decay=0.0)
    decayed = kept = 0
    for _ in range(8):
        for p, q, g in zip(ours, bare, next(stream), strict=True):
            p.grad, q.grad = g.clone(), g.clone()
            q.detach().copy_(p.detach())
        before = [p.detach().clone() for p in ours]
        first.step()
        second.step()
        for p, q, w in zip(ours, bare, before, strict=True):
            d = (w - q.detach()) / lr
            torch.testing.assert_close(p.detach(), cautiously(w, d, lr, decay), rtol=0, atol=1e-13)
            decayed, kept = decayed + int((d * w >= 0).sum()), kept + int((d * w < 0).sum())
    assert min(decayed, kept) > 20


def test_cautious_decay_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="after"):
        WeightDecay(after=True, cautious=True)
    with pytest.raises(ValueError, match="decoupled"):
        zoo.Adam([nn.Parameter(torch.zeros(2))], cautious=True)
