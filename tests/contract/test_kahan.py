"""Kahan summation and stochastic rounding: small steps of half precision add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normopt
from normopt import zoo
from tests.support.bounded import noise


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["adamw", "sgd", "muon", "lion", "scion"])
def test_kahan_sum_adds_up_small_steps_of_half_precision(name: str, dtype: torch.dtype) -> None:
    """200 steps of a tenth of what rounding swallows: as far as in float32, to 5%; not at all without the sum."""

    def travelled(kind: torch.dtype, bounds: str | None) -> Tensor:
        start = 1 + noise((8, 8), 0, 0.2).to(dtype).to(kind).abs()
        w = nn.Parameter(start.clone())
        group = {"params": [w], **({} if bounds is None else {"bounds": bounds})}
        optimizer = normopt.create(name, [group], lr=0.1 * torch.finfo(dtype).eps / 2 / SIZES.get(name, 1))
        for _ in range(200):
            w.grad = direction.to(kind)
            optimizer.step()
        return (w.detach() - start).float()

    direction = noise((8, 8), 1).sign()
    expected, kept, lost = travelled(torch.float32, None), travelled(dtype, "KahanSum()"), travelled(dtype, None)
    assert (kept - expected).norm() < 0.05 * expected.norm()
    assert lost.norm() < 0.3 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("bound", ["KahanSum()", "StochasticRounding()"])
@pytest.mark.parametrize("name", ["adamw", "sgd", "muon", "lion", "scion", "prodigy", "prodigy-muon"])
def test_a_thousand_small_steps_in_bfloat16_go_nine_tenths_as_far(name: str, bound: str) -> None:
    """Each of a twentieth of what rounding swallows."""

    def travelled(kind: torch.dtype, bounds: tuple[str, ...]) -> Tensor:
        start = 1 + noise((8, 8), 0, 0.2).bfloat16().to(kind).abs()
        w = nn.Parameter(start.clone())
        w.grad = noise((8, 8), 1).sign().to(kind)
        group = {"params": [w], "bounds": bounds}
        options = RATE_FREE.get(name, {"lr": 0.05 * torch.finfo(torch.bfloat16).eps / 2 / SIZES.get(name, 1)})
        optimizer = normopt.create(name.removeprefix("prodigy-"), [group], **options)
        for _ in range(1000):
            optimizer.step()
        return (w.detach() - start).float()

    expected, kept = travelled(torch.float32, ()), travelled(torch.bfloat16, (bound,))
    assert 0.9 <= (kept * expected).sum() / (expected * expected).sum() <= 1.1
    # Rounding a step s up or down at random, to multiples of u, has variance |s| u or a little less: |way| u in all.
    noise_of_rounding = expected.abs().sum() * torch.finfo(torch.bfloat16).eps if bound == "StochasticRounding()" else 0
    assert kept.norm() ** 2 <= 1.1**2 * (expected.norm() ** 2 + noise_of_rounding)


#: The size of one entry of the update at rate 1, where it is not about 1.
SIZES = {"muon": 8**-0.5, "scion": 8**-0.5}

#: Where the rate is found, too: it stays d0, since the first estimate above d0 is taken whole, and of weights that are
#: rounded at random it is mostly noise.
RATE_FREE: dict[str, dict[str, Any]] = {
    "prodigy": {"d0": 2e-4, "d_coef": 1e-12},
    "prodigy-muon": {"lr": 8**0.5, "step_size": "Prodigy(d0=2e-4, d_coef=1e-12)"},
}


def test_kahan_summation_leaves_float32_alone_and_comes_after_bounds() -> None:
    plain, summed = (nn.Parameter(noise((4, 6), 0).float()) for _ in range(2))
    optimizers = [zoo.SGD([plain], 0.1), zoo.SGD([{"params": [summed], "bounds": "KahanSum()"}], 0.1)]
    for i in range(3):
        for p, optimizer in zip((plain, summed), optimizers, strict=True):
            p.grad = noise((4, 6), i).float()
            optimizer.step()
    assert torch.equal(plain, summed) and not optimizers[1].state[summed]["compensation"].any()
    w = nn.Parameter(noise((4, 60), 0).to(torch.bfloat16))
    optimizer = zoo.SGD([{"params": [w], "bounds": ["RowBound()", "KahanSum()"]}], 0.01)
    for i in range(20):
        w.grad = noise((4, 60), i).to(torch.bfloat16)
        optimizer.step()
        whole = w.float() + optimizer.state[w]["compensation"].float()
        assert (whole.norm(dim=1) <= 1 + 1e-5).all(), "to the last bit of the compensation"
