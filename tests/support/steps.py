"""Parameters, gradients, steps, and everything that a step may change."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normopt import SteepestDescent

SHAPES = [(6, 4), (4, 6), (4, 6), (2, 5, 3, 1)]


def tensors(shapes: list[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=noise, dtype=torch.float64).to(dtype)) for s in shapes]


def give_gradients(params: list[Tensor], seed: int) -> None:
    for p, g in zip(params, tensors([tuple(p.shape) for p in params], seed=seed + 1000), strict=True):
        p.grad = g.detach().to(p.dtype)


def run(optimizer: SteepestDescent, params: list[Tensor], steps: int, first: int = 0) -> None:
    for i in range(first, first + steps):
        optimizer.step(partial(give_gradients, params, i))


def assert_goes_on(
    optimizer: SteepestDescent, params: list[Tensor], twin: SteepestDescent, twins: list[Tensor]
) -> None:
    """After two steps, from its checkpoint, another one takes the same next two."""
    run(optimizer, params, 2)
    twin.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        torch._foreach_copy_(twins, params)
    run(optimizer, params, 2, first=2)
    run(twin, twins, 2, first=2)
    assert_equal(snapshot(twin), snapshot(optimizer))


def snapshot(optimizer: SteepestDescent) -> Any:
    """Everything that a step may change."""
    weights = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return weights, copy.deepcopy(optimizer.state_dict())


def assert_equal(a: Any, b: Any, tolerance: float = 0.0) -> None:
    """Nested dicts, lists and tensors, by default to the bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_equal(a[name], b[name], tolerance)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y, tolerance)
    elif isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    else:
        assert a == b
