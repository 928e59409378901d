"""What the tests of Shampoo and its relatives share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normopt.ingredient import Context

WIDE, TALL, SQUARE, VECTOR = (6, 10), (10, 6), (8, 8), (7,)

NAMES = ("asgo", "dasgo", "klshampoo", "shampoo", "soap")
LOOKING = ("klshampoo", "soap")


def seeing(g: Tensor, step: int = 1) -> Context:
    return Context(g, g, step, 1.0, None, lambda: g)


def params(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=noise).to(dtype)) for s in shapes]


def give_gradients(weights: list[Tensor], seed: int, scale: float = 1.0) -> None:
    for p, g in zip(weights, params([tuple(p.shape) for p in weights], seed=seed + 1000), strict=True):
        p.grad = (g.detach() * scale).to(p.dtype)


def run(optimizers: list[Optimizer], weights: list[list[Tensor]], steps: int, first: int = 0) -> None:
    """The same gradients for several optimizers."""
    for i in range(first, first + steps):
        for optimizer, held in zip(optimizers, weights, strict=True):
            give_gradients(held, i)
            optimizer.step()
