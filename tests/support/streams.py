"""Random weights, streams of gradients, and single steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import normopt
from tests.support.strategies import assert_close

SMALL: list[tuple[int, ...]] = [(4, 6), (6, 4), (5,), ()]
STEPS = 25


def weights(shapes: list[tuple[int, ...]] = SMALL, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=noise, dtype=torch.float64).to(dtype)) for shape in shapes]


def stream(params: list[Tensor], sizes: tuple[float, ...] = (1.0,)) -> Iterator[list[Tensor]]:
    """Random gradients for ``params``, whose sizes change from step to step."""
    noise, step = torch.Generator().manual_seed(1), 0
    while True:
        size = sizes[step % len(sizes)]
        yield [size * torch.randn(p.shape, generator=noise, dtype=torch.float64) for p in params]
        step += 1


def move(optimizer: torch.optim.Optimizer, params: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """Take one step and return the changes."""
    before = [p.detach().clone() for p in params]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.to(p.dtype, copy=True)
    optimizer.step()
    return [p.detach() - w for p, w in zip(params, before, strict=True)]


def assert_without_memory(
    name: str, options: dict[str, Any], direction: Callable[[Tensor, Tensor], Tensor], tolerance: float = 1e-12
) -> None:
    """With these options an optimizer moves by a function of this step's gradient and weights alone."""
    params = weights()
    optimizer = normopt.create(name, params, lr=0.01, **options)
    for _, gs in zip(range(5), stream(params, (1.0, 1e-3, 1e3)), strict=False):
        before = [p.detach().clone() for p in params]
        for change, g, w in zip(move(optimizer, params, gs), gs, before, strict=True):
            assert_close(change, -0.01 * direction(g, w), tolerance)


def gradients(seed: int, *shapes: tuple[int, ...]) -> Iterator[list[Tensor]]:
    noise = torch.Generator().manual_seed(seed)
    while True:
        yield [torch.randn(shape, generator=noise, dtype=torch.float64) for shape in shapes]
